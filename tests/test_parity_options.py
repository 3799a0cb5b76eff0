"Nothing passes because an option, an output or a difference was passed over in silence."
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from fsdl_devinfra.cli import main

W = np.random.default_rng(0).normal(size=(8, 4)).astype("f4")
MODEL = """
import numpy as np, torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.from_numpy(np.load({weights!r})))
    def forward(self, x):
        y = x @ self.w
        return {{"logits": y, "{second}": torch.relu(y)}}
"""


def ran(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    status = main(["onnx", "check", *args, "--json"])
    return status, json.loads(capsys.readouterr().out)


def written(path: Path, nodes: list[Any], outputs: tuple[str, ...] = ("logits",), weight: np.ndarray = W) -> str:
    "A file without notes of an exporter."
    info = helper.make_tensor_value_info
    graph = helper.make_graph(nodes, "g", [info("x", 1, ["batch", 8])], [info(o, 1, ["batch", 4]) for o in outputs], [numpy_helper.from_array(weight, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return str(path)


def product(path: Path, weight: np.ndarray = W) -> str:
    return written(path, [helper.make_node("MatMul", ["x", "w"], ["logits"], name="m")], weight=weight)


def reduced(path: Path, bits: int = 8) -> str:
    "The same product with its weights held as integers of so many bits."
    scale = np.float32(np.abs(W).max() / 2 ** (bits - 1))
    steps = np.clip(np.round(W / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).astype("i1")
    info, held = helper.make_tensor_value_info, numpy_helper.from_array
    nodes = [helper.make_node("DequantizeLinear", ["steps", "scale"], ["w"]), helper.make_node("MatMul", ["x", "w"], ["logits"], name="m")]
    graph = helper.make_graph(nodes, "g", [info("x", 1, ["batch", 8])], [info("logits", 1, ["batch", 4])], [held(steps, "steps"), held(np.array(scale), "scale")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return str(path)


@pytest.mark.parametrize(("second", "status"), [("boxes", 1), ("pooler_output", 0)])
def test_only_what_a_task_leaves_out_may_be_missing(tmp_path: Path, second: str, status: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    np.save(tmp_path / "w.npy", W)
    (tmp_path / "net.py").write_text(MODEL.format(second=second, weights=str(tmp_path / "w.npy")))
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(1).normal(size=(4, 8)).astype("f4"))
    matmul, relu = helper.make_node("MatMul", ["x", "w"], ["logits"]), helper.make_node("Relu", ["logits"], [second])
    args = (f"{tmp_path / 'net.py'}:Net", "--inputs", str(tmp_path / "x.npz"))
    found, document = ran(capsys, args[0], written(tmp_path / "lost.onnx", [matmul]), *args[1:])
    assert found == status, document
    told = json.dumps([document["causes"], document["coverage"]["not_covered"]])
    assert second in told
    whole = written(tmp_path / "whole.onnx", [matmul, relu], ("logits", second))
    assert ran(capsys, args[0], whole, *args[1:])[0] == 0


@pytest.mark.parametrize(("args", "word"), [(("--precision", "fp16"), "own precision"), (("--weights", "w.pt"), "--weights does not go"),
                                            (("--as", "int8", "--precision", "fp16"), "--precision does not go"), (("--as", "int8", "--atol", "0"), "--atol does not go")])
def test_options_that_would_say_nothing_are_refused(tmp_path: Path, args: tuple[str, ...], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = product(tmp_path / "a.onnx")
    status, document = ran(capsys, file, file, *args)
    assert status == 2 and word in document["error"] and document["hint"], document


def test_own_precision_may_be_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = product(tmp_path / "a.onnx")
    assert ran(capsys, file, file, "--precision", "fp32")[0] == 0


def test_a_compiled_package_hears_no_precision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, document = ran(capsys, "builtin:digits", str(tmp_path / "m.pt2"), "--precision", "fp16")
    assert status == 2 and "--precision does not go" in document["error"]


@pytest.mark.parametrize("bits", [8, 1])
def test_a_reduced_file_against_a_file_without_inputs(tmp_path: Path, bits: int, capsys: pytest.CaptureFixture[str]) -> None:
    status, document = ran(capsys, product(tmp_path / "a.onnx"), reduced(tmp_path / "q.onnx", bits), "--as", "int8")
    assert status == (0 if bits == 8 else 1), document


def test_a_budget_for_loss_is_not_spent_on_a_file_that_was_not_reduced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = product(tmp_path / "a.onnx")
    status, document = ran(capsys, file, product(tmp_path / "b.onnx", W * np.float32(1.001)), "--as", "int8")
    assert status == 2 and document["verdict"] == "not-run", document


def test_a_changed_forward_is_not_judged_by_an_earlier_one(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    "The same weights, class and file name: the float64 reference of the earlier code must not be taken from the disk."
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    np.save(tmp_path / "w.npy", W)
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(1).normal(size=(4, 8)).astype("f4"))
    net, file = tmp_path / "net.py", product(tmp_path / "a.onnx")
    code = f"import numpy as np, torch\n# f\nclass Net(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.w = torch.nn.Parameter(torch.from_numpy(np.load({str(tmp_path / 'w.npy')!r})))\n    def forward(self, x): return f(x @ self.w)\n"
    for body, status in (("x", 0), ("x.abs()", 1), ("x", 0)):
        net.write_text(code.replace("# f", f"def f(x): return {body}"))
        assert ran(capsys, f"{net}:Net", file, "--inputs", str(tmp_path / "x.npz"))[0] == status


def test_the_digest_holds_the_code_of_a_file_that_was_not_imported(tmp_path: Path) -> None:
    from fsdl_devinfra.parity.commands import own_module
    from fsdl_devinfra.parity.original import module_digest
    net, found = tmp_path / "net.py", []
    for body in ("x", "x.abs()", "x"):
        net.write_text(f"import torch\nclass Net(torch.nn.Module):\n    def forward(self, x): return {body}\n")
        found.append(module_digest(own_module(f"{net}:Net")).hexdigest())
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize(("body", "status"), [("return 1.0", 0), ("return outputs['nothing']", 2)])
def test_a_metric_that_fails_says_nothing_about_the_file(tmp_path: Path, body: str, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metric.py").write_text(f"def score(outputs, inputs): {body}\n")
    file = product(tmp_path / "a.onnx")
    found, document = ran(capsys, file, reduced(tmp_path / "q.onnx"), "--as", "int8", "--metric", f"{tmp_path / 'metric.py'}:score")
    assert found == status and (not status or "the metric fails" in document["error"]), document


@pytest.mark.parametrize(("value", "status"), [(1.0, 0), (np.nan, 1)])
def test_outputs_without_a_finite_number_are_no_pass(tmp_path: Path, value: float, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "x.npz", x=np.full((4, 8), value, "f4"))
    file = product(tmp_path / "a.onnx")
    assert ran(capsys, file, reduced(tmp_path / "q.onnx"), "--as", "int8", "--inputs", str(tmp_path / "x.npz"))[0] == status


@pytest.mark.parametrize(("text", "status"), [("top1=0.95", 0), ("top1=95", 2), ("top1=-1", 2)])
def test_a_share_is_no_percentage(tmp_path: Path, text: str, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    file = product(tmp_path / "a.onnx")
    assert ran(capsys, file, reduced(tmp_path / "q.onnx"), "--as", "int8", "--budget", text)[0] == status


@pytest.mark.parametrize("name", ["gone.onnx", "gone.pt2"])
def test_a_file_that_is_not_there_is_told_before_the_model_is_loaded(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, document = ran(capsys, str(tmp_path / "no.py:Net"), str(tmp_path / name))
    assert status == 2 and name in document["error"], document
