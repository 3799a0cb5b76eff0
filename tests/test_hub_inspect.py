"""Inspecting layouts of all kinds, risks of all kinds, and what it costs."""
from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fsdl_devinfra.core.errors import Unreachable
from fsdl_devinfra.hub.checkpoint import Checkpoint, inspect
from fsdl_devinfra.hub.layout import choose
from fsdl_devinfra.hub.locks import ModelLock, lock
from fsdl_devinfra.hub.remote import WrongBytes
from hub_files import gguf, onnx
from hub_server import Fault, FaultyHub


def shard(file: Path, tensors: dict[str, list[int]], dtype: str = "BF16", width: int = 2) -> int:
    at, entries = 0, {}
    for name, shape in tensors.items():
        size = width
        for n in shape: size *= n
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}; at += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    file.parent.mkdir(parents=True, exist_ok=True); file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(at))
    return 8 + len(text)


def write(folder: Path, files: dict[str, object]) -> Path:
    for path, content in files.items():
        file = folder / path; file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else (content if isinstance(content, str) else json.dumps(content)).encode())
    return folder


@pytest.fixture(params=["folder", "hub"])
def see(request, tmp_path, monkeypatch):
    """A function that inspects a folder, directly or through a loopback Hub."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN"): monkeypatch.delenv(name, raising=False)
    if request.param == "folder": yield inspect; return
    (tmp_path / "shelf" / "org").mkdir(parents=True)
    with FaultyHub(tmp_path / "shelf", redirect=True) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        def through(folder: Path) -> Checkpoint:
            shutil.copytree(folder, tmp_path / "shelf" / "org" / "model")
            return inspect("org/model")
        yield through


def kinds(checkpoint: Checkpoint) -> set[str]: return {r.kind for r in checkpoint.risks}


def test_diffusers_pipeline(see, tmp_path):
    folder = write(tmp_path / "m", {"model_index.json": {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.30"}, "unet/config.json": {"_class_name": "UNet2DConditionModel"},
                                    "README.md": "---\nlicense: openrail\n---\n"})
    shard(folder / "unet" / "diffusion_pytorch_model.safetensors", {"conv.weight": [4, 4]}); shard(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors", {"conv.weight": [4, 4]}, "F16")
    shard(folder / "vae" / "diffusion_pytorch_model.safetensors", {"conv.weight": [2, 2]}, "F32", 4); shard(folder / "text_encoder" / "model.safetensors", {"e": [3]})
    found = see(folder)
    assert (found.library, found.architecture, found.license) == ("diffusers", "StableDiffusionPipeline", "openrail")
    assert found.tensors.parameters == 16 + 4 + 3 and found.tensors.by_dtype == {"BF16": 19, "F32": 4}
    assert set(found.tensor_index) == {"unet:conv.weight", "vae:conv.weight", "text_encoder:e"}


def test_timm(see, tmp_path):
    folder = write(tmp_path / "m", {"config.json": {"architecture": "resnet18", "num_classes": 10, "pretrained_cfg": {}}, "pytorch_model.bin": pickle.dumps(1)})
    shard(folder / "model.safetensors", {"fc.weight": [10, 8]})
    found = see(folder)
    assert (found.library, found.architecture, found.weight_format) == ("timm", "resnet18", "safetensors")
    assert [(r.kind, r.path) for r in found.risks] == [("pickle", "pytorch_model.bin")]


FORMATS = [({"onnx/model.onnx": onnx(), "onnx/model.onnx_data": b"12345"}, "onnx"), ({"model-q4.gguf": gguf()}, "gguf"), ({"pytorch_model.bin": pickle.dumps(1)}, "pickle"),
           ({"tf_model.h5": b"\x89HDF\r\n\x1a\n\x09"}, "other"), ({}, "none")]


@pytest.mark.parametrize("files, kind", FORMATS, ids=[kind for _, kind in FORMATS])
def test_formats(see, tmp_path, files, kind):
    found = see(write(tmp_path / "m", {"config.json": {"model_type": "x"}} | files))
    assert (found.weight_format, found.weight_bytes, found.tensors.count) == (kind, sum(map(len, files.values())), 0)
    assert ("pickle" in kinds(found)) == (kind == "pickle")


RISKS = {
    "pickle": {"a/training_args.bin": b"x"}, "remote-code": {"config.json": {"auto_map": {"AutoModel": "m.M"}}},
    "remote-code ": {"config.json": {"text": [{"deep": {"trust_remote_code": True}}]}}, "remote-code  ": {"modeling_x.py": "1"},
    "remote-code   ": {"config.json": "{}", "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["t.T", None]}}},
    "path": {"model.safetensors.index.json": {"weight_map": {"a": "../../evil.safetensors"}}}, "path ": {"model.safetensors.index.json": {"weight_map": {"a": "evil.bin"}}},
    "path  ": {"model.safetensors.index.json": {"weight_map": {"a": "/etc/evil.safetensors"}}},
    "duplicate-key": '{"w":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"w":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
    "overlap": '{"w":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"v":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}',
    "overlap ": '{"w":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}',
    "header-size": (26_000_000).to_bytes(8, "little") + b"{" + bytes(100),
}


@pytest.mark.parametrize("kind", RISKS)
def test_risks(see, tmp_path, kind):
    files = RISKS[kind]
    if isinstance(files, str): files = {"model.safetensors": len(files).to_bytes(8, "little") + files.encode() + bytes(2 if kind == "duplicate-key" else 3)}
    if isinstance(files, bytes): files = {"model.safetensors": files}
    found = see(write(tmp_path / "m", {"config.json": "{}"} | files))
    assert kinds(found) == {kind.strip()}
    assert Checkpoint.from_dict(found.to_dict()) == found


def test_a_clean_repository_has_no_risk(see, tmp_path):
    folder = write(tmp_path / "m", {"config.json": {"model_type": "x", "trust_remote_code": False, "auto_map": {}}})
    shard(folder / "model.safetensors", {"w": [3, 3]})
    assert see(folder).risks == []


def test_hub_and_folder_agree_and_bytes_are_few(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home")); folder = tmp_path / "shelf" / "org" / "wide"; weight_map, headers = {}, 0
    for i in range(20):
        name = f"model-{i + 1:05}-of-00020.safetensors"
        tensors = {f"model.layers.{i}.{p}.weight": [64, 512] for p in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")} | {f"model.layers.{i}.norm.weight": [512]}
        headers += shard(folder / name, tensors); weight_map |= {t: name for t in tensors}
    write(folder, {"model.safetensors.index.json": {"weight_map": weight_map}, "config.json": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}})
    small = sum((folder / n).stat().st_size for n in ("config.json", "model.safetensors.index.json"))
    with FaultyHub(tmp_path / "shelf") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        far = inspect("org/wide"); sent = hub.sent()
        listing = far.bytes_read - sent
        assert sent < 1.1 * (headers + small) and 0 < listing < 20_000
        assert len([s for s in hub.seen if s.range]) == 20  # one request a shard
    near = inspect(folder)
    assert far.tensor_index == near.tensor_index and far.modules == near.modules and far.config == near.config
    assert [m.name for m in near.modules][:3] == ["model", "model.layers", "model.layers.0-19"]
    assert near.bytes_read < 2 * (headers + small)


@pytest.mark.parametrize("fault, error", [(Fault("no-range", "*.safetensors"), WrongBytes), (Fault("flip", "config.json"), WrongBytes), (Fault("html", "config.json"), WrongBytes),
                                          (Fault("status", "*", 500), Unreachable), (Fault("etag", "config.json", "../x"), WrongBytes)], ids=lambda f: getattr(f, "kind", ""))
def test_a_hub_that_lies(tmp_path, monkeypatch, fault, error):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home")); folder = write(tmp_path / "shelf" / "org" / "m", {"config.json": {"a": 1}}); shard(folder / "model.safetensors", {"w": [1000]})
    with FaultyHub(tmp_path / "shelf", faults=[fault]) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        with pytest.raises(error, match="config.json|http://127.0.0.1"): inspect("org/m")


def test_a_dead_and_a_silent_hub_are_named_and_do_not_hang(tmp_path, monkeypatch):
    import socket
    monkeypatch.setenv("HF_HOME", str(tmp_path)); monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(Unreachable, match="http://127.0.0.1:9/api/models/org/m"): inspect("org/m")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0)); silent.listen(1); port = silent.getsockname()[1]
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}"); monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "1")
        start = time.monotonic()
        with pytest.raises(Unreachable, match=f"127.0.0.1:{port}.*Timeout"): inspect("org/m")
        assert time.monotonic() - start < 5


def test_lock_never_holds_two_formats_and_is_the_same_everywhere(tmp_path):
    files = {"config.json": "{}", "pytorch_model.bin": b"p", "tf_model.h5": b"h", "onnx/model.onnx": b"o", "model.gguf": b"g", ".git/config": b"x", "__pycache__/a.pyc": b"c", "vocab.txt": "v"}
    for place in "a", "b": shard(write(tmp_path / place, files) / "model.safetensors", {"w": [4]})
    one = lock(tmp_path / "a"); one.save(tmp_path / "a" / "any-name.json")
    assert [f.path for f in one.files] == ["config.json", "model.safetensors", "vocab.txt"]
    assert lock(tmp_path / "a").to_json() == lock(tmp_path / "b").to_json() == (tmp_path / "a" / "any-name.json").read_text()
    assert json.loads(one.to_json())["commit"] is None and list(json.loads(one.to_json())) == ["schema", "repo", "commit", "files", "skipped"]
    assert ModelLock.load(tmp_path / "a" / "any-name.json") == one


def test_choose_takes_each_weight_once():
    both = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    assert choose([*both, "model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors", "model.safetensors.index.fp16.json"])[:3] == both


CLI = "import sys; from fsdl_devinfra.core.command import Parser, run; from fsdl_devinfra.hub.commands import register; p = Parser('hub'); register(p); sys.exit(run(lambda: (a := p.parse_args(sys.argv[1:])).run(a), '--json' in sys.argv))"


def test_command_line_is_light_and_prints_one_document(tmp_path):
    folder = write(tmp_path / "m", {"config.json": {"architectures": ["X"], "model_type": "x"}}); shard(folder / "model.safetensors", {"w": [10, 10]})
    ran = subprocess.run([sys.executable, "-X", "importtime", "-c", CLI, "inspect", str(folder), "--json"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    document = json.loads(ran.stdout)
    assert {"repo", "revision", "commit", "files", "tensors", "weight_format", "weight_bytes", "license", "gated", "library", "architecture", "risks", "bytes_read"} <= set(document)
    loaded = {line.split("|")[-1].strip() for line in ran.stderr.splitlines() if "|" in line}
    assert not {"torch", "transformers", "numpy", "huggingface_hub", "starlette"} & loaded
    bad = subprocess.run([sys.executable, "-c", CLI, "inspect", str(tmp_path / "none"), "--json"], capture_output=True, text=True)
    assert bad.returncode == 2 and set(json.loads(bad.stdout)) == {"error", "hint"} and "Traceback" not in bad.stderr
    for line in (["lock", str(folder), "-o", str(tmp_path / "l.json")], ["verify", str(tmp_path / "l.json"), str(folder)]):
        assert subprocess.run([sys.executable, "-c", CLI, *line], capture_output=True).returncode == 0
    (folder / "config.json").write_text("{}")
    assert subprocess.run([sys.executable, "-c", CLI, "verify", str(tmp_path / "l.json"), str(folder)], capture_output=True).returncode == 1
    for verb in ([], ["inspect"], ["lock"], ["pull"], ["verify"], ["serve"]):
        assert "examples:" in subprocess.run([sys.executable, "-c", CLI, *verb, "--help"], capture_output=True, text=True).stdout


def test_serve_as_a_process(tmp_path):
    folder = write(tmp_path / "shelf" / "org" / "m", {"config.json": {"model_type": "x"}}); shard(folder / "model.safetensors", {"w": [10]})
    process = subprocess.Popen([sys.executable, "-c", CLI, "serve", str(tmp_path / "shelf"), "--port", "0"], stderr=subprocess.PIPE, text=True)
    try:
        line = process.stderr.readline(); assert "Serving 1 model at http://127.0.0.1:" in line
        url = line.split(" at ")[1].split(": ")[0]
        ran = subprocess.run([sys.executable, "-c", CLI, "inspect", "org/m", "--json"], env=os.environ | {"HF_ENDPOINT": url}, capture_output=True, text=True)
        assert ran.returncode == 0 and json.loads(ran.stdout)["tensors"]["parameters"] == 10
        import signal
        process.send_signal(signal.SIGINT); assert process.wait(10) == 0
    finally: process.kill()
