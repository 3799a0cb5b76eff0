"""Files of weights that are empty or were cut, and folders without a model: `inspect` and `lock` say so in one sentence. Beside each the whole file."""
from __future__ import annotations

import collections
import gzip
import io
import json
import pickle
import shutil
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest

from fsdl_devinfra.core.errors import BadInput
from fsdl_devinfra.hub.checkpoint import inspect
from fsdl_devinfra.hub.layout import Wish
from fsdl_devinfra.hub.locks import lock
from fsdl_devinfra.hub.pulling import pull
from fsdl_devinfra.hub.server import LoopbackHub
from hub_files import safetensors, write
from test_hub_content import EVIL
from test_hub_hostile import onnx_file

PROGRAM = pickle.dumps(collections.OrderedDict(w=[1.5] * 60), 2)


def zipped(data: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/data/0", bytes(400))
    return made.getvalue()


def tarred(data: bytes) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for name in "ab":
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return made.getvalue()


def gguf() -> bytes:
    def text(t: str) -> bytes: return struct.pack("<Q", len(t)) + t.encode()
    head = b"GGUF" + struct.pack("<IQQ", 3, 2, 1) + text("general.architecture") + struct.pack("<I", 8) + text("llama")
    head += text("w") + struct.pack("<IQQIQ", 2, 32, 4, 2, 0) + text("b") + struct.pack("<IQIQ", 1, 4, 0, 96)  # Q4_0: 4 blocks of 18 bytes
    return head + bytes(-len(head) % 32 + 96 + 16)


def hdf5(version: int) -> bytes:
    """As much of an HDF5 file as says where it ends."""
    made = bytearray(b"\x89HDF\r\n\x1a\n" + bytes([version]) + bytes(191))
    at = {0: 40, 1: 44, 2: 28, 3: 28}[version]
    made[at:at + 8] = struct.pack("<Q", len(made))
    return bytes(made)


LEGACY = pickle.dumps(119547037146038801333356, 2) + pickle.dumps(1001, 2) + PROGRAM + bytes(range(64))  # torch before 1.6: raw numbers behind the programs
WHOLE = {
    "model.safetensors": safetensors({"w": [8, 8]}), "m.gguf": gguf(), "model.onnx": onnx_file({"w": (1, [4, 4], 64), "v": (1, [3], 12)}), "pytorch_model.bin": zipped(PROGRAM),
    "old.pt": LEGACY, "model.pkl": PROGRAM, "model.joblib": pickle.dumps({"a": 1.5}, 4), "last.ckpt": zipped(PROGRAM), "model.pth.tar": tarred(PROGRAM), "model.pkl.gz": gzip.compress(PROGRAM),
    "tf_model.h5": hdf5(0), "weights.hdf5": hdf5(2), "model.keras": zipped(b"{}"),
}
#: how much is left; old.pt has no end of its own behind its first programs, and a tar archive ends with kilobytes of zeros
CUTS = {name: [0, 1, 8, len(data) // 2, len(data) - 1] for name, data in WHOLE.items()} | {"old.pt": [0, 1, 8], "model.pth.tar": [0, 1, 8, 600, 1600]}


@pytest.fixture(params=["file", "folder", "hub"])
def place(request, tmp_path, monkeypatch):
    """A function that puts a file there and returns what to inspect and to lock."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN"): monkeypatch.delenv(name, raising=False)
    shelf = tmp_path / "shelf"
    (shelf / "org").mkdir(parents=True)

    def put(name: str, data: bytes) -> str | Path:
        shutil.rmtree(shelf / "org" / "m", ignore_errors=True)
        folder = write(shelf / "org" / "m", {name: data})
        return {"file": folder / name, "folder": folder, "hub": "org/m"}[request.param]

    if request.param != "hub":
        yield put
        return
    with LoopbackHub(shelf) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield put


@pytest.mark.parametrize("name", WHOLE)
def test_a_file_that_was_cut_is_named_and_a_whole_one_is_read(place, name):
    model = place(name, WHOLE[name])
    assert inspect(model).weight_bytes == len(WHOLE[name]) and [f.path for f in lock(model).files] == [name]
    for left in CUTS[name]:
        model = place(name, WHOLE[name][:left])
        with pytest.raises(BadInput, match=name.replace(".", r"\.")): inspect(model)
        if model == "org/m" and left: continue  # a lock on the Hub is made from its listing, which says no more than the size
        with pytest.raises(BadInput, match=name.replace(".", r"\.")): lock(model)


NO_MODEL = {"only words": {"README.md": "hi", "notes.txt": "x"}, "nothing": {}}
PARTS = {"a configuration": {"config.json": "{}"}, "a tokenizer": {"tokenizer.json": "{}"}, "an adapter's": {"adapter_config.json": "{}"}, "a program": {"run.py": "1"},
         "a pickle by another name": {"weights": pickle.dumps([1])}}


@pytest.mark.parametrize("name", NO_MODEL)
def test_a_folder_without_a_model(tmp_path, name):
    folder = write(tmp_path / "m", NO_MODEL[name])
    folder.mkdir(exist_ok=True)
    for call in inspect, lock:
        with pytest.raises(BadInput, match="there is no model in|there is no file to lock in"): call(folder)


@pytest.mark.parametrize("name", PARTS)
def test_a_part_of_a_model_is_one(tmp_path, name):
    folder = write(tmp_path / "m", PARTS[name])
    assert inspect(folder).tensors.count == 0 and [f.path for f in lock(folder).files] == list(PARTS[name])


@pytest.mark.parametrize("files, whole", [({"README.md": "hi"}, False), ({"config.json": "{}"}, True)])
def test_a_repository_without_a_model(tmp_path, monkeypatch, files, whole):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    write(tmp_path / "shelf" / "org" / "m", files)
    with LoopbackHub(tmp_path / "shelf") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        for call in inspect, lock:
            if whole: call("org/m")
            else:
                with pytest.raises(BadInput, match="there is no model in org/m: it holds only README.md"): call("org/m")


def test_a_program_that_was_cut_and_would_do_harm_is_a_risk_first(tmp_path):
    found = inspect(write(tmp_path / "m", {"pytorch_model.bin": EVIL[:-1]}))
    assert "dangerous" in found.risks[0].why


def test_weights_of_a_graph_that_were_cut(tmp_path):
    graph = onnx_file({"w": (1, [4, 4], 64)}, "model.onnx_data")
    inspect(write(tmp_path, {"model.onnx": graph, "model.onnx_data": bytes(64)}))
    write(tmp_path, {"model.onnx_data": bytes(63)})
    for call in inspect, lock:
        with pytest.raises(BadInput, match="model.onnx_data was cut: it has 63 bytes, and its tensors need 64"): call(tmp_path)


@pytest.mark.parametrize("verb", ["inspect", "lock"])
@pytest.mark.parametrize("files", [{"m.gguf": b""}, {"model.onnx": b"\x08\x07"}, {"pytorch_model.bin": zipped(PROGRAM)[:-9]}, {"README.md": "x"}], ids=lambda f: next(iter(f)))
def test_the_command_ends_with_2_and_one_sentence(cli, tmp_path, verb, files):
    folder = write(tmp_path / "m", files)
    output = ["-o", str(tmp_path / "out.json")] if verb == "lock" else []
    said = cli("hub", verb, str(folder), *output, "--json")
    assert said.status == 2 and set(said.json) == {"error", "hint"} and not (tmp_path / "out.json").exists()
    assert next(iter(files)) in said.json["error"]
    write(folder, {"config.json": json.dumps({"model_type": "x"}), next(iter(files)): b"x"} if "README.md" in files else {next(iter(files)): WHOLE[next(iter(files))]})
    assert cli("hub", verb, str(folder), *output, "--json").status == 0


@pytest.mark.parametrize("path", ["model.safetensors", "config.json"])
def test_a_spoilt_blob_of_the_cache_is_not_locked_in_place_of_the_hub(tmp_path, monkeypatch, path):
    """Where the Hub does not answer a lock is made from the cache: its blobs are named by their hash."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    write(tmp_path / "shelf" / "org" / "m", {"config.json": "{}", "model.safetensors": safetensors(), "a.txt": "x"})
    with LoopbackHub(tmp_path / "shelf") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        folder = pull("org/m")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    wish = Wish(exclude=("*.txt",))  # another wish than before: nothing is recorded
    blob = (folder / path).resolve()
    right = blob.read_bytes()
    assert lock("org/m", wish=wish).commit == folder.name
    blob.write_bytes(right[:-1] + b" ")
    with pytest.raises(BadInput, match=f"{path} in the HF cache"): lock("org/m", wish=wish)
