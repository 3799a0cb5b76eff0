"""Faults of folders, locks, indexes and caches: things in the way, links, names that command a terminal, files that two readers read differently."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from fsdl_devinfra.core.errors import BadInput, CheckError
from fsdl_devinfra.hub.checkpoint import inspect
from fsdl_devinfra.hub.loading import load, weights_of
from fsdl_devinfra.hub.locks import LockedFile, ModelLock, lock
from fsdl_devinfra.hub.pulling import pull
from fsdl_devinfra.hub.remote import WrongBytes
from fsdl_devinfra.hub.source import cache_folder, unsafe_path
from fsdl_devinfra.hub.verification import is_known, verify
from hub_files import one, safetensors

HUB_FILES = {"config.json": {"model_type": "tiny"}, "model.safetensors": one(size=3000), "unet/config.json": {}}


# Pull: what is in the way

@pytest.mark.parametrize("where", ["cache", "folder"])
def test_a_folder_where_a_file_belongs_and_a_file_where_a_folder_belongs(hub, tmp_path, where):
    locked = lock("org/tiny"); target = tmp_path / "here" if where == "folder" else None
    root = target or cache_folder() / "models--org--tiny" / "snapshots" / locked.commit; root.mkdir(parents=True)
    (root / "unet").write_text("in the way")
    with pytest.raises(CheckError, match="unet where a folder for unet/config.json belongs"): pull(locked, local_dir=target)
    assert (root / "unet").read_text() == "in the way"
    (root / "unet").unlink(); (root / "model.safetensors").unlink(missing_ok=True); (root / "model.safetensors").mkdir(); (root / "model.safetensors" / "x").write_text("mine")
    with pytest.raises(CheckError, match="a folder where model.safetensors belongs"): pull(locked, local_dir=target)
    assert [p.kind for p in verify(locked, root).problems if p.path == "model.safetensors"] == ["unreadable"]
    (root / "model.safetensors" / "x").unlink(); (root / "model.safetensors").rmdir()
    assert verify(locked, pull(locked, local_dir=target)).ok


@pytest.mark.parametrize("kind", ["symlink", "hard link"])
@pytest.mark.parametrize("where", ["cache", "folder"])
def test_a_partial_file_that_is_somebody_elses_is_not_written_to(hub, tmp_path, kind, where):
    locked = lock("org/tiny"); weights = next(f for f in locked.files if f.path == "model.safetensors"); mine = tmp_path / "mine.txt"; mine.write_text("mine")
    target = tmp_path / "here" if where == "folder" else None
    partial = target / ".cache" / "fsdl-devinfra" / f"{weights.sha256}.incomplete" if target else cache_folder() / "models--org--tiny" / "blobs" / f"{weights.sha256}.fsdl.incomplete"
    partial.parent.mkdir(parents=True)
    if kind == "symlink": partial.symlink_to(mine)
    else: os.link(mine, partial)
    folder = pull(locked, local_dir=target)
    assert mine.read_text() == "mine" and verify(locked, folder).ok


def test_partial_files_of_a_folder_stay_in_it(hub, tmp_path):
    locked = lock("org/tiny"); target, outside = tmp_path / "here", tmp_path / "outside"; target.mkdir(); outside.mkdir()
    (target / ".cache").symlink_to(outside)
    with pytest.raises(WrongBytes, match="outside of its folder"): pull(locked, local_dir=target)
    assert not list(outside.iterdir())


def test_a_cache_that_cannot_be_written_ends_in_a_sentence(hub, tmp_path):
    file = lock("org/tiny").save(tmp_path / "m.lock.json")
    shutil.rmtree(tmp_path / "home", ignore_errors=True)
    (tmp_path / "home").write_text("no folder")  # also for root, whom no permission stops
    ran = subprocess.run([sys.executable, "-m", "fsdl_devinfra", "hub", "pull", str(file)], capture_output=True, text=True)
    assert ran.returncode == 2 and "Traceback" not in ran.stderr and str(tmp_path / "home") in ran.stderr, ran.stderr


def test_the_commit_changes_between_the_listing_and_the_files(hub):
    locked = lock("org/tiny"); (hub.repo / "config.json").write_text('{"model_type": "evil"}')
    with pytest.raises(CheckError, match="no such revision|was asked at commit"): pull(locked)
    assert not [p for p in cache_folder().rglob("*") if p.is_file() and b"evil" in p.read_bytes()]


# Locks

@pytest.mark.parametrize("path", ["/etc/x", "../x", "a/../x", "C:\\x", "C:x", "a\\x", "\\\\server\\x", "~/x", "a//b", "./a", "a/", "a\x00b", "a\nb", "\x1b[2Jx", "", "."])
def test_paths_that_a_hand_wrote_into_a_lock(tmp_path, path):
    document = {"schema": "fsdl-devinfra/model-lock/1", "repo": "org/x", "commit": "a" * 40, "files": [{"path": path, "size_bytes": 1, "sha256": "0" * 64}]}
    (tmp_path / "x.lock.json").write_text(json.dumps(document))
    for call in ModelLock.load, verify, pull:
        with pytest.raises(BadInput) as error: call(tmp_path / "x.lock.json")
        assert str(error.value).isprintable()
    assert unsafe_path(path)


def test_a_file_twice_in_a_lock():
    for files in ([("a", "0"), ("a", "1")], [("a", "0"), ("a", "0")]):
        with pytest.raises(BadInput, match="names a file twice"): ModelLock(files=[LockedFile(p, 1, h * 64) for p, h in files])


# Verify: the record

def test_the_record_does_not_believe_clocks(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home")); folder = tmp_path / "m"; folder.mkdir(); file = folder / "model.safetensors"; file.write_bytes(one()); locked = lock(folder)
    for skew in (10**9, -10**9):
        os.utime(file, (time.time() + skew,) * 2); assert verify(locked, folder).ok and is_known(file, locked.files[0])
        with open(file, "r+b") as f: f.seek(-1, 2); f.write(b"x")
        os.utime(file, (time.time() + skew,) * 2)
        assert [p.kind for p in verify(locked, folder).problems] == ["hash"]
        file.write_bytes(one())


def test_a_change_through_a_hard_link_is_seen(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home")); folder = tmp_path / "m"; folder.mkdir(); file = folder / "model.safetensors"; file.write_bytes(one()); locked = lock(folder)
    os.link(file, tmp_path / "other name"); assert verify(locked, folder).ok
    then = file.stat()
    with open(tmp_path / "other name", "r+b") as f: f.seek(-1, 2); f.write(b"x")
    os.utime(tmp_path / "other name", ns=(then.st_atime_ns, then.st_mtime_ns))
    assert [p.kind for p in verify(locked, folder).problems] == ["hash"]


# Indexes: two readers, two models

def shards(folder: Path, index: dict[str, str], **files: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    for name, data in files.items(): (folder / f"model-{name}.safetensors").write_bytes(data)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {n: f"model-{f}.safetensors" for n, f in index.items()}}))
    return folder


def test_an_index_that_names_the_wrong_shard(tmp_path):
    right = shards(tmp_path / "a", {"v": "1", "w": "2"}, **{"1": one("v"), "2": one("w")}); assert inspect(right).risks == []
    wrong = shards(tmp_path / "b", {"v": "2", "w": "1"}, **{"1": one("v"), "2": one("w")})
    risk, = inspect(wrong).risks
    assert risk.kind == "path" and "'w' is in model-1.safetensors, and it is in model-2.safetensors (and 1 more)" in risk.why
    tied = shards(tmp_path / "c", {"v": "1", "w": "2", "head": "2"}, **{"1": one("v"), "2": one("w")})  # some indexes name tied tensors, which no file stores
    assert inspect(tied).risks == []


def test_two_shards_with_one_tensor_are_not_loaded(tmp_path):
    folder = shards(tmp_path / "m", {"v": "1", "w": "2"}, **{"1": one("v"), "2": safetensors({"w": ("U8", [8], bytes(8)), "v": ("U8", [8], b"x" * 8)})})
    assert [r.kind for r in inspect(folder).risks] == ["duplicate-key"]
    with pytest.raises(BadInput, match="two weight files hold a tensor of the same name"): weights_of(folder)


def test_a_single_file_beside_an_index_is_ambiguous(tmp_path):
    folder = shards(tmp_path / "m", {"w": "1"}, **{"1": one("w")}); (folder / "model.safetensors").write_bytes(safetensors({"w": ("U8", [8], b"x" * 8)}))
    assert "duplicate-key" in {r.kind for r in inspect(folder).risks}
    with pytest.raises(BadInput, match="libraries differ in which one they load"): weights_of(folder)


def test_gguf_and_onnx_that_name_a_tensor_twice(tmp_path):
    from test_hub_hostile import gguf_file, onnx_file
    body = onnx_file({"w": (1, [3], 12), "v": (1, [3], 12)})
    (tmp_path / "model.onnx").write_bytes(body.replace(b"\x42\x01v", b"\x42\x01w")); assert [r.kind for r in inspect(tmp_path).risks] == ["duplicate-key"]
    (tmp_path / "model.onnx").unlink(); data = gguf_file({"blk.0.w": (1, [4]), "blk.0.v": (1, [4])}, words=3)
    (tmp_path / "m.gguf").write_bytes(data.replace(b"blk.0.v", b"blk.0.w") + bytes(64)); assert [r.kind for r in inspect(tmp_path).risks] == ["duplicate-key"]


# Names that command a terminal

def test_reports_hold_no_control_characters(tmp_path):
    name = "layer\x1b[2J\x1b]0;owned\x07.weight\u202e"; text = {name: {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}, "__metadata__": {}}
    data = json.dumps(text, ensure_ascii=False).encode(); (tmp_path / "model.safetensors").write_bytes(len(data).to_bytes(8, "little") + data + bytes(2))
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["A\x1b[31m\rB"], "auto_map": {"x": 1}, "a\x1bb": {"trust_remote_code": True}}))
    (tmp_path / "README.md").write_text("---\nlicense: mit\x1b[2J\n---\n"); (tmp_path / "evil\x1b[2J.bin").write_text("x")
    found = inspect(tmp_path)
    assert all(c == "\n" or c.isprintable() for c in str(found)) and r"\x1b[2J" in str(found)
    assert name in found.tensor_index and "path" in {r.kind for r in found.risks}  # the document keeps the name as it is
    pytest.importorskip("torch"); import torch
    with pytest.raises(BadInput) as error: load(tmp_path, lambda: torch.nn.Linear(2, 2))
    assert str(error.value).isprintable()


# dtypes

ODD = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "BF16": "bfloat16", "BOOL": "bool", "U16": "uint16", "U64": "uint64", "C64": "complex64", "I8": "int8"}


@pytest.mark.parametrize("dtype", ODD)
@pytest.mark.parametrize("trust", ["map", "copy"])
def test_odd_dtypes_come_through_bit_for_bit(tmp_path, dtype, trust):
    torch = pytest.importorskip("torch"); kind = getattr(torch, ODD[dtype]); width = kind.itemsize; data = bytes(i % 2 if dtype == "BOOL" else i for i in range(6 * width))
    for pad in 0, 1:  # behind a tensor of one byte, nothing is aligned
        parts = {"pad": ("U8", [pad], bytes(pad)), "w": (dtype, [2, 3], data), "scalar": (dtype, [], data[:width]), "empty": (dtype, [0, 4], b"")}
        (tmp_path / "model.safetensors").write_bytes(safetensors(parts))
        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__(); self.register_buffer("pad", torch.empty(pad, dtype=torch.uint8)); self.register_buffer("w", torch.empty(2, 3, dtype=kind))
                self.register_buffer("scalar", torch.empty((), dtype=kind)); self.register_buffer("empty", torch.empty(0, 4, dtype=kind))
        found = load(tmp_path, Net, trust=trust)
        assert found.w.dtype == kind and bytes(found.w.contiguous().view(-1).view(torch.uint8).tolist()) == data and found.empty.shape == (0, 4) and found.scalar.shape == ()
        if dtype.startswith(("F8", "BF")):
            assert torch.equal(load(tmp_path, Net, dtype="float32", trust=trust).w.nan_to_num(), found.w.float().nan_to_num())


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "X9"])
def test_dtypes_that_torch_has_not_are_said(tmp_path, dtype):
    torch = pytest.importorskip("torch"); (tmp_path / "model.safetensors").write_bytes(safetensors({"w": (dtype, [4], bytes(2 if dtype == "F4" else 3))}))
    class Net(torch.nn.Module):
        def __init__(self): super().__init__(); self.register_buffer("w", torch.empty(4))
    with pytest.raises(BadInput, match=f"torch has no dtype for {dtype}"): load(tmp_path, Net)


def test_a_boolean_that_is_neither_true_nor_false_is_refused(tmp_path):
    torch = pytest.importorskip("torch"); (tmp_path / "model.safetensors").write_bytes(safetensors({"w": ("BOOL", [4], b"\0\1\2\xff")}))
    class Net(torch.nn.Module):
        def __init__(self): super().__init__(); self.register_buffer("w", torch.empty(4, dtype=torch.bool))
    for trust in "map", "copy":
        with pytest.raises(BadInput, match="neither 0 nor 1"): load(tmp_path, Net, trust=trust)


# Serve

def status(url: str, data: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=10) as reply: return reply.status, reply.read()
    except urllib.error.HTTPError as e: return e.code, e.read()


def test_a_config_that_is_not_json_does_not_hide_the_other_files(hub):
    for text in "{", "[" * 100_000, "\x00", '"x"':
        (hub.repo / "config.json").write_text(text); code, body = status(f"{hub.url}/api/models/org/tiny")
        assert code == 200 and len(json.loads(body)["siblings"]) == 3
        locked = lock("org/tiny"); assert verify(locked, pull(locked)).ok


@pytest.mark.parametrize("query, code", [("limit=x", 400), ("cursor=-1", 400), ("cursor=" + "9" * 5000, 400), ("limit=0", 200), ("cursor=99999", 200), ("limit=1&cursor=1", 200), ("cursor=%F0%9D%9F%98", 400)])
def test_pages_that_nobody_should_ask_for(hub, query, code):
    assert status(f"{hub.url}/api/models/org/tiny/tree/main?{query}")[0] == code


@pytest.mark.parametrize("body", [b"{}", b"[]", b"[" * 100_000, b'{"paths": 5}', b'{"paths": [[1], {}, null, "config.json"]}', b'{"paths": {"a": 1}}', b"\xff"])
def test_questions_for_paths_of_any_kind(hub, body):
    code, said = status(f"{hub.url}/api/models/org/tiny/paths-info/main", body, **{"Content-Type": "application/json"})
    assert code == 200 and [p["path"] for p in json.loads(said)] == (["config.json"] if b"config" in body else [])
