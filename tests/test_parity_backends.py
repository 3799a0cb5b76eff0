"Backends, commands and safety from outside."
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from fsdl_devinfra.parity import assert_parity, check, export


def command(*args: str, **how: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", "import sys; from fsdl_devinfra.cli import main; sys.exit(main())", *args], capture_output=True, text=True, timeout=300, **how)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path, torch.Tensor]:
    from fsdl_devinfra.hub.digits import DigitsViT
    torch.manual_seed(0)
    model, path = DigitsViT().eval(), tmp_path_factory.mktemp("digits") / "model.onnx"
    made = export(model, {"pixel_values": torch.rand(2, 1, 8, 8)}, path)
    assert (made.inputs[0].name, made.inputs[0].shape) == ("pixel_values", ["batch", 1, 8, 8])
    assert (made.outputs[0].name, made.outputs[0].shape) == ("logits", ["batch", 10])
    return model, path, torch.rand(360, 1, 8, 8)


def test_360_images(digits: tuple[nn.Module, Path, torch.Tensor]) -> None:
    model, path, images = digits
    report = check(model, path, {"pixel_values": images.numpy()}, providers=["cpu", "reference"])
    assert report.verdict == "pass" and len(report.cases[0].outputs[0].per_sample) == 360
    assert report.cases[1].provider_used.startswith("onnx.reference")
    assert report.cases[0].outputs[0].top1 == 1.0 and "<svg" in report.chart().svg


def jax_digits(state: dict[str, np.ndarray]) -> Any:
    "The digits model written again in JAX: an independent implementation."
    jax = pytest.importorskip("jax", reason="jax is not installed: pip install jax")
    import jax.numpy as jnp
    w = {k: jnp.asarray(v) for k, v in state.items()}

    def linear(x: Any, name: str) -> Any: return jnp.matmul(x, w[f"{name}.weight"].T, precision="highest") + w[f"{name}.bias"]

    def norm(x: Any, name: str) -> Any:
        centred = x - x.mean(-1, keepdims=True)
        return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def attention(x: Any, name: str, heads: int = 4) -> Any:
        q, k, v = (linear(x, f"{name}.{part}").reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3) for part in ("query", "key", "value"))
        scores = jax.nn.softmax(jnp.einsum("bhqd,bhkd->bhqk", q, k, precision="highest") / np.sqrt(q.shape[-1]), -1)
        mixed = jnp.einsum("bhqk,bhkd->bhqd", scores, v, precision="highest")
        return linear(mixed.transpose(0, 2, 1, 3).reshape(x.shape), f"{name}.out")

    def forward(pixel_values: np.ndarray) -> np.ndarray:
        x = jnp.asarray(pixel_values)
        b = x.shape[0]
        patches = x.reshape(b, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(b, 16, 4)
        x = jnp.matmul(patches, w["patches.weight"].reshape(64, 4).T, precision="highest") + w["patches.bias"]
        x = jnp.concatenate([jnp.broadcast_to(w["class_token"], (b, 1, 64)), x], 1) + w["positions"]
        for i in range(2):
            x = x + attention(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attention")
            x = x + linear(jax.nn.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.0"), approximate=False), f"blocks.{i}.mlp.2")
        return np.asarray(linear(norm(x[:, 0], "norm"), "head"))
    return forward


def test_jax_is_a_backend(digits: tuple[nn.Module, Path, torch.Tensor]) -> None:
    model, _, images = digits
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    report = check(model, jax_digits(state), {"pixel_values": images})
    assert report.verdict == "pass", str(report)
    assert (report.cases[0].provider, report.cases[0].provider_used) == ("callable", "callable")
    wrong = {k: v.copy() for k, v in state.items()}
    wrong["blocks.1.mlp.2.bias"][3] += 1e-3
    assert check(model, jax_digits(wrong), {"pixel_values": images}).verdict == "fail"


def test_external_weights_and_provenance(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    made = export(net, {"input": torch.randn(2, 64)}, tmp_path / "m.onnx", external_over=1000, lock={"repo": "a/b", "commit": "c" * 40})
    assert sorted(made.files) == ["m.onnx", "m.onnx.data"] and (tmp_path / "m.onnx").stat().st_size < 20_000
    assert check(net, tmp_path / "m.onnx", {"input": torch.randn(3, 64)}).verdict == "pass"
    with torch.no_grad(): net[2].weight[0, 0] += 0.01
    report = check(net, tmp_path / "m.onnx", {"input": torch.randn(3, 64)})
    assert report.first_divergence.module == "2" and report.causes[0].kind == "weight"
    told = {p.key: p.value for p in onnx.load(tmp_path / "m.onnx", load_external_data=False).metadata_props}
    assert told["fsdl_devinfra.model_commit"] == "c" * 40 and json.loads(told["fsdl_devinfra.versions"])["torch"] == torch.__version__
    data = bytearray((tmp_path / "m.onnx.data").read_bytes())
    (tmp_path / "m.onnx.data").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="beyond the end"): check(net, tmp_path / "m.onnx", {"input": torch.randn(3, 64)})


def test_weights_outside_the_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(np.ones(4, np.float32).tobytes())
    w = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    w.external_data.add(key="location", value="../secret")
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [4]) for n in "xy"]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "m.onnx").write_bytes(helper.make_model(helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", ports[:1], ports[1:], [w])).SerializeToString())
    with pytest.raises(ValueError, match="outside its own folder"): check(nn.ReLU(), tmp_path / "in" / "m.onnx", {"input": torch.ones(4)})


def test_fixed_tolerance_says_so(digits: tuple[nn.Module, Path, torch.Tensor]) -> None:
    from fsdl_devinfra.parity import Rule
    model, path, images = digits
    report = check(model, path, {"pixel_values": images[:4]}, rule=Rule(atol=1e-3, rtol=0.0))
    assert report.verdict == "pass" and report.rule.startswith("fixed tolerance")
    assert check(model, path, {"pixel_values": images[:4]}, rule=Rule(atol=1e-12)).verdict == "fail"


def test_pytest_helper(digits: tuple[nn.Module, Path, torch.Tensor]) -> None:
    model, path, images = digits
    assert_parity(model, path, {"pixel_values": images[:3]})
    with pytest.raises(AssertionError, match="not run"): assert_parity(model, path, {"pixel_values": images[:3]}, providers=["tensorrt"])


def test_modes_and_module_are_untouched(digits: tuple[nn.Module, Path, torch.Tensor]) -> None:
    model, path, images = digits
    model.train(); model.norm.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    try:
        assert check(model, path, {"pixel_values": images[:3]}).verdict == "pass"
        assert model.training and not model.norm.training
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    finally: model.eval()


@pytest.mark.parametrize("args", [["check", "builtin:digits", "nowhere.onnx"], ["check", "builtin:digits", "f.onnx", "--provider", "gpu9"], ["check", "m"], ["export", "builtin:digits"],
                                  ["check", "builtin:digits", "f.onnx", "--atol", "nan"], ["check", "builtin:digits", "f.onnx", "-o", "r.docx"]])
def test_command_mistakes_are_sentences(args: list[str], tmp_path: Path) -> None:
    done = command("onnx", *args, "--json", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert set(json.loads(done.stdout)) == {"error", "hint"} and "Traceback" not in done.stderr


def test_help_shows_an_example() -> None:
    for args in ([], ["export"], ["check"]):
        done = command("onnx", *args, "--help")
        assert done.returncode == 0 and "examples:" in done.stdout
