"""What else a lock can be of: a single file, a data set."""
from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from safetensors.numpy import save_file

from fsdl_devinfra.core.errors import BadInput
from fsdl_devinfra.hub import LoopbackHub, diff, inspect, lock, pull, verify
from fsdl_devinfra.hub.source import cache_name, resolve, split_data_set_id


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN", "HF_ENDPOINT"): monkeypatch.delenv(name, raising=False)


def gguf(file: Path, values: list[float]) -> None:
    """One F32 tensor "w" in a GGUF file of version 3."""
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 0)
    head += struct.pack("<Q", 1) + b"w" + struct.pack("<IQIQ", 1, len(values), 0, 0)
    head += bytes(-len(head) % 32)
    file.write_bytes(head + np.array(values, "f4").tobytes())


def graph(file: Path, outside: bool) -> None:
    weight = helper.make_tensor("w", TensorProto.FLOAT, [64, 64], np.ones(64 * 64, "f4").tobytes(), raw=True)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    sides = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 64]) for n in "xy"]
    model = helper.make_model(helper.make_graph(nodes, "g", sides[:1], sides[1:], [weight]))
    onnx.save(model, file, save_as_external_data=outside, location=f"{file.name}.data", size_threshold=0)


@pytest.fixture
def downloads(tmp_path) -> Path:
    """A folder like everybody's: single files of several models beside each other."""
    folder = tmp_path / "downloads"
    folder.mkdir()
    save_file({"w": np.ones((4, 4), "f4")}, folder / "one.safetensors")
    save_file({"w": np.zeros((4, 4), "f4")}, folder / "other.safetensors")
    gguf(folder / "x.gguf", [1.0, 2.0])
    graph(folder / "inside.onnx", outside=False)
    graph(folder / "outside.onnx", outside=True)
    (folder / "notes.txt").write_text("not a model")
    return folder


@pytest.mark.parametrize("name,kind,parameters,files", [("one.safetensors", "safetensors", 16, 1), ("x.gguf", "gguf", 2, 1), ("inside.onnx", "onnx", 4096, 1),
                                                         ("outside.onnx", "onnx", 4096, 2)])
def test_a_single_file_is_a_model(name, kind, parameters, files, downloads, tmp_path, cli):
    ran = cli("hub", "inspect", downloads / name, "--json")
    assert ran.status == 0 and ran.json["weight_format"] == kind and ran.json["tensors"]["parameters"] == parameters
    assert len(ran.json["files"]) == files and not ran.json["risks"]
    env = {"HF_HOME": str(tmp_path / "home")}
    assert cli("hub", "lock", downloads / name, "-o", tmp_path / "l.json", env=env).status == 0
    assert len(json.loads((tmp_path / "l.json").read_text())["files"]) == files
    for path in ((), (downloads / name,)): assert cli("hub", "verify", tmp_path / "l.json", *path, env=env).status == 0
    content = bytearray((downloads / name).read_bytes())
    content[-1] ^= 1
    (downloads / name).write_bytes(bytes(content))
    for path in ((), (downloads / name,)): assert cli("hub", "verify", tmp_path / "l.json", *path, env=env).status == 1


def test_a_changed_file_of_external_data_is_found(downloads):
    locked = lock(downloads / "outside.onnx")
    assert verify(locked, downloads / "outside.onnx").ok
    data = downloads / "outside.onnx.data"
    data.write_bytes(data.read_bytes()[:-1] + b"\1")
    assert [p.path for p in verify(locked, downloads / "outside.onnx").problems] == ["outside.onnx.data"]


def test_single_files_are_compared(downloads):
    same, other = diff(downloads / "one.safetensors", downloads / "one.safetensors"), diff(downloads / "one.safetensors", downloads / "other.safetensors")
    assert same.verdict == "same" and [t.change for t in other.tensors] == ["changed"]
    gguf(downloads / "y.gguf", [1.0, 3.0])
    found = diff(downloads / "x.gguf", downloads / "y.gguf", full=True)
    assert [t.change for t in found.tensors] == ["changed"] and found.tensors[0].statistics.max_abs_difference == 1.0


def test_files_that_are_no_model(downloads, tmp_path, cli):
    for name in ("notes.txt", "absent.safetensors"): assert cli("hub", "inspect", downloads / name).status == 2
    locked = lock(downloads / "one.safetensors").save(tmp_path / "l.json")
    ran = cli("hub", "verify", locked, downloads / "other.safetensors")
    assert ran.status == 2 and "does not name" in ran.sentence()
    with pytest.raises(BadInput, match="not a model folder"): resolve(downloads / "one.safetensors")  # where only a folder is of use


@pytest.fixture
def data_set(tmp_path, monkeypatch):
    """A Hub with a data set of parquet and webdataset shards, and a model of the same name."""
    shelf = tmp_path / "shelf"
    folder = shelf / "datasets" / "org" / "words"
    (folder / "data").mkdir(parents=True)
    for i in range(3):
        (folder / "data" / f"train-{i:05}-of-00003.parquet").write_bytes(b"PAR1" + os.urandom(5000) + b"PAR1")
        (folder / f"{i:06}.tar").write_bytes(os.urandom(10240))
    (folder / "original.bin").write_bytes(os.urandom(100))
    (folder / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    (shelf / "org" / "words").mkdir(parents=True)
    (shelf / "org" / "words" / "config.json").write_text("{}")
    with LoopbackHub(shelf, redirect=True) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.folder = folder
        yield hub


def test_a_data_set_on_a_hub(data_set, tmp_path, cli):
    env = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": data_set.url, "HF_HOME": str(tmp_path / "home")}
    ran = cli("hub", "lock", "datasets/org/words", "-o", tmp_path / "d.json", "--json", env=env)
    assert ran.status == 0 and ran.json["repo"] == "datasets/org/words" and len(ran.json["files"]) == 8
    assert cli("hub", "pull", tmp_path / "d.json", env=env).status == 0
    assert cli("hub", "verify", tmp_path / "d.json", "--full").status == 0 or cli("hub", "verify", tmp_path / "d.json", "--full", env=env).status == 0
    only = cli("hub", "lock", "datasets/org/words", "--include", "data/*", "-o", tmp_path / "p.json", "--json", env=env)
    assert [f["path"][-8:] for f in only.json["files"]] == [".parquet"] * 3
    assert len(lock("org/words").files) == 1  # the model of the same name is another repository


def test_the_official_client_reads_what_was_pulled(data_set, tmp_path, monkeypatch):
    from huggingface_hub import snapshot_download
    theirs = Path(snapshot_download("org/words", repo_type="dataset", endpoint=data_set.url, cache_dir=tmp_path / "theirs"))
    ours = pull("datasets/org/words")
    names = {p.relative_to(theirs).as_posix(): p.read_bytes() for p in theirs.rglob("*") if p.is_file()}
    assert {p.relative_to(ours).as_posix(): p.read_bytes() for p in ours.rglob("*") if p.is_file()} == names and len(names) == 8
    found = snapshot_download("org/words", repo_type="dataset", endpoint=data_set.url, cache_dir=tmp_path / "home" / "hub", local_files_only=True)
    assert Path(found) == ours


def test_a_data_set_that_changed(data_set, tmp_path):
    folder = data_set.folder
    locked = lock(folder)
    assert len(locked.files) == 8 and verify(locked, folder).ok
    (folder / "data" / "train-00003-of-00004.parquet").write_bytes(b"PAR1")
    assert [p.kind for p in verify(locked, folder).problems] == ["unlocked"]  # a loader of the folder would read it
    (folder / "data" / "train-00003-of-00004.parquet").unlink()
    (folder / "000001.tar").write_bytes(os.urandom(10240))
    assert [p.path for p in verify(locked, folder).problems] == ["000001.tar"]


def test_names_of_data_sets():
    assert split_data_set_id("datasets/org/name@v1") == ("datasets/org/name", "v1")
    assert split_data_set_id("https://huggingface.co/datasets/org/name/tree/v1") == ("datasets/org/name", "v1")
    assert split_data_set_id("datasets/squad") == ("datasets/squad", None)
    assert split_data_set_id("org/name") is None and split_data_set_id("datasets/a/b/c") is None
    assert cache_name("datasets/org/name") == "datasets--org--name" and cache_name("org/name") == "models--org--name"


def test_inspecting_a_data_set(data_set):
    found = inspect("datasets/org/words")
    assert found.repo == "datasets/org/words" and len(found.files) == 8 and found.license == "cc-by-4.0"
