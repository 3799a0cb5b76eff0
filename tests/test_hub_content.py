"""Bytes, not names: what a file is, what unpickling it would do, and what was never fetched. Every attack has a healthy file of its kind beside it."""
from __future__ import annotations

import bz2
import collections
import gzip
import io
import json
import lzma
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest

from fsdl_devinfra.core.errors import BadInput, Unreachable
from fsdl_devinfra.hub.checkpoint import Checkpoint, inspect
from fsdl_devinfra.hub.locks import ModelLock, lock
from fsdl_devinfra.hub.pickles import danger_of, scan_pickle
from fsdl_devinfra.hub.content import content_of
from fsdl_devinfra.hub.pulling import pull
from fsdl_devinfra.hub.server import LoopbackHub
from fsdl_devinfra.hub.verification import verify
from hub_files import safetensors, write


class Attack:
    def __reduce__(self): return os.system, ("true",)


EVIL, GOOD = pickle.dumps(Attack(), 2), pickle.dumps(collections.OrderedDict(w=[1.0]), 2)


def zipped(**members: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in members.items(): archive.writestr(f"archive/{name.replace('__', '.')}", content)
    return made.getvalue()


def tarred(content: bytes) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        member = tarfile.TarInfo("model.ckpt")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return made.getvalue()


def npy(dtype: str, content: bytes) -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': (), }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


PACKED = {
    "pytorch_model.bin": lambda p: zipped(data__pkl=p, version=b"3"), "last.pth.tar": lambda p: p, "model.sav": lambda p: p, "model.pkl.gz": gzip.compress,
    "model.pkl.bz2": bz2.compress, "model.pkl.xz": lzma.compress, "model.joblib": zlib.compress, "model.safetensors": lambda p: zipped(data__pkl=p),
    "weights.safetensors": lambda p: p, "data.txt": lambda p: p, "old.pt": lambda p: pickle.dumps(119547037146038801333356, 2) + pickle.dumps(1001, 2) + p + bytes(64),
    "data.mdb": lambda p: zipped(data__pkl=p), "model.nemo": tarred, "vectors.npy": lambda p: npy("|O", p),
    "notes.md": lambda p: pickle.dumps(pickle.loads(p), 0) if p is GOOD else b"cos\nsystem\n(S'true'\ntR.",
}


@pytest.fixture(params=["folder", "hub"])
def see(request, tmp_path, monkeypatch):
    """A function that inspects a folder, directly or through a loopback Hub."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN"): monkeypatch.delenv(name, raising=False)
    if request.param == "folder":
        yield inspect
        return
    (tmp_path / "shelf" / "org").mkdir(parents=True)
    with LoopbackHub(tmp_path / "shelf", redirect=True) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        def through(folder: Path) -> Checkpoint:
            shutil.copytree(folder, tmp_path / "shelf" / "org" / "model")
            return inspect("org/model")
        yield through


def risk(found: Checkpoint, kind: str = "pickle") -> str: return "; ".join(r.why for r in found.risks if r.kind == kind)


@pytest.mark.parametrize("name", PACKED)
def test_a_pickle_under_any_name_is_followed_to_what_it_imports(see, tmp_path, name):
    found = see(write(tmp_path / "m", {"config.json": {}, name: PACKED[name](EVIL)}))
    assert "dangerous" in risk(found) and "system" in risk(found), found.risks


@pytest.mark.parametrize("name", PACKED)
def test_a_harmless_pickle_is_a_pickle_and_no_attack(see, tmp_path, name):
    found = see(write(tmp_path / "m", {"config.json": {}, name: PACKED[name](GOOD)}))
    assert "dangerous" not in risk(found) and "collections.OrderedDict" in risk(found), found.risks


NO_PICKLES = {
    "openvino_model.bin": {"openvino_model.bin": bytes(range(1, 200)), "openvino_model.xml": "<net/>"},
    "encoder.bin": {"encoder.bin": bytes(range(1, 200)), "encoder.xml": "<net/>"},
    "model.bin": {"model.bin": struct.pack("<IH", 6, 12) + b"WhisperSpec\0" + bytes(300)},
    "ggml-base.bin": {"ggml-base.bin": b"lmgg" + bytes(300)},
    "params_shard_0.bin": {"params_shard_0.bin": struct.pack("<60f", *range(60))},
}


@pytest.mark.parametrize("name", NO_PICKLES)
def test_raw_numbers_are_no_pickle(see, tmp_path, name):
    found = see(write(tmp_path / "m", {"config.json": {}} | NO_PICKLES[name]))
    assert (found.risks, found.weight_format) == ([], "other")


@pytest.mark.parametrize("name", NO_PICKLES)
def test_a_pickle_under_the_same_names_is_one(see, tmp_path, name):
    found = see(write(tmp_path / "m", {"config.json": {}} | NO_PICKLES[name] | {name: EVIL}))
    assert "dangerous" in risk(found)


@pytest.mark.parametrize("name, content", [("plugin.so", b"\x7fELF\x02\x01\x01" + bytes(60)), ("plugin.dll", b"MZ" + bytes(90)), ("helper.pyc", b"\xa7\r\r\n" + bytes(20)),
                                           ("libx.so.1.2", b"text"), ("tool", b"\x7fELF\x02\x01\x01" + bytes(60)), ("readme.txt", b"\xcf\xfa\xed\xfe" + bytes(60))])
def test_compiled_code_is_code(see, tmp_path, name, content):
    found = see(write(tmp_path / "m", {"config.json": {}, name: content, "plain.txt": "text about a .so file"}))
    assert [(r.kind, r.path) for r in found.risks] == [("remote-code", name)]


def test_honest_files_of_every_kind_have_no_risk(see, tmp_path):
    files = {"config.json": {"model_type": "x"}, "model.safetensors": safetensors(), "README.md": "# c\nos\nsystem\n", "tokenizer.model": b"\n\x0e\n\x05<unk>" + bytes(20),
             "data.npz": zipped(a__npy=npy("<f4", bytes(4))),
             "page.docx": zipped(word__xml=b"<x/>"), "log.txt.gz": gzip.compress(b"epoch 1"), "vocab.txt": "(\n)\n.\n", "merges.txt": "#version: 0.2\nc o\n", "empty.txt": "",
             "logo.png": b"\x89PNG\r\n\x1a\n" + bytes(40), "model.onnx": b"\x08\x07\x12\x07pytorch"}
    assert see(write(tmp_path / "m", files)).risks == []


@pytest.mark.parametrize("data", [EVIL[:-1], EVIL[:20] + b"\xff" * 40, pickle.dumps(1, 2) + EVIL, GOOD + b"junk" + EVIL, pickle.dumps(Attack(), 5)], ids=range(5))
def test_a_program_that_breaks_off_has_run_up_to_there(data):
    scan = scan_pickle(lambda a, b: data[a:b], len(data), content_of(data[:512]), True)
    assert scan.verdict == "dangerous" or (data.startswith(GOOD) and not scan.whole)


def test_a_hidden_name_is_dangerous():
    for data in b"\x80\x04NN\x93.", b"\x80\x04\x8c\x02os\x940\x8c\x06systemh\x05\x93.", b"\x80\x02\x82\x01.":
        scan = scan_pickle(lambda a, b: data[a:b], len(data), content_of(data), True)
        assert scan.verdict in ("dangerous", "suspicious") and scan.imports, data


def test_an_archive_that_unpacks_to_gigabytes_ends_early(tmp_path):
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive: archive.writestr("archive/data.pkl", EVIL + bytes(200 * 2**20))
    data = made.getvalue()
    assert scan_pickle(lambda a, b: data[a:b], len(data), "zip", True).verdict == "dangerous"


def test_the_verdict_of_picklescan():
    picklescan = pytest.importorskip("picklescan.scanner")
    torch = pytest.importorskip("torch")
    made = io.BytesIO()
    torch.save({"w": torch.ones(3, dtype=torch.bfloat16), "n": 3}, made)
    for data, safe in ((made.getvalue(), True), (zipped(data__pkl=EVIL), False), (EVIL, False), (GOOD, True)):
        theirs = picklescan.scan_bytes(io.BytesIO(data), "x.bin", ".bin" if data[:2] == b"PK" else ".pkl")
        ours = scan_pickle(lambda a, b: data[a:b], len(data), content_of(data[:512]), True)
        assert (theirs.issues_count == 0) == safe == (ours.verdict == "innocuous")


def test_the_list_is_picklescans_and_more():
    listed = pytest.importorskip("picklescan.scanner")._unsafe_globals
    names = [(m, n) for m, found in listed.items() for n in (["anything"] if found == "*" else [found] if isinstance(found, str) else found)]
    assert len(names) > 80 and [n for n in names if danger_of(*n) != "dangerous"] == []


def test_what_torch_saves_is_innocuous(tmp_path):
    torch = pytest.importorskip("torch")
    for old in False, True:
        torch.save({"w": torch.ones(3, 4), "p": torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)), "f": torch.zeros(1, dtype=torch.float8_e4m3fn)},
                   tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
        found = inspect(tmp_path)
        assert "imports are those of tensors" in risk(found), found.risks


# Git LFS pointers

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 4368439584\n"
CLI = [sys.executable, "-m", "fsdl_devinfra", "hub"]


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.gguf", "config.json", "tokenizer.model"])
def test_a_pointer_is_called_one(see, tmp_path, name):
    files = {"config.json": {"model_type": "x"}, "model.safetensors": safetensors()} if name in ("config.json", "tokenizer.model") else {"config.json": {}}
    with pytest.raises(BadInput, match="Git LFS pointer") as error: see(write(tmp_path / "m", files | {name: POINTER}))
    assert name in str(error.value) and "git lfs pull" in error.value.hint


def test_a_pointer_beside_the_model_is_no_matter(see, tmp_path):
    found = see(write(tmp_path / "m", {"config.json": {}, "model.safetensors": safetensors(), "pytorch_model.bin": POINTER}))
    assert found.tensors.count == 1 and not risk(found)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_every_command_says_so(tmp_path, name):
    folder = write(tmp_path / "m", {"config.json": {}, name: POINTER})
    good = write(tmp_path / "good", {"config.json": {}, name: safetensors() if name.endswith("s") else GOOD})
    locked = lock(good).save(tmp_path / "x.lock.json")
    for command, status in ((["inspect", folder], 2), (["lock", folder, "-o", tmp_path / "y.json"], 2), (["verify", locked, folder], 1), (["verify", locked, good], 0), (["inspect", good], 0)):
        done = subprocess.run([*CLI, *map(str, command), "--json"], capture_output=True, text=True)
        assert done.returncode == status and ("LFS pointer" in done.stdout) == (status > 0), (command, done)
        json.loads(done.stdout)
    assert [p.kind for p in verify(locked, folder).problems] == ["lfs-pointer"] and not (tmp_path / "y.json").exists()


def test_load_says_so(tmp_path):
    pytest.importorskip("torch")
    from fsdl_devinfra.hub.loading import load
    folder = write(tmp_path / "m", {"config.json": {"model_type": "llama"}, "model.safetensors": POINTER})
    with pytest.raises(BadInput, match="LFS pointer"): load(folder)
    (folder / "model.safetensors").write_bytes(zipped(data__pkl=EVIL))
    with pytest.raises(BadInput, match="zip archive"): load(folder)


def test_a_lock_on_the_hub_of_what_was_never_uploaded(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    write(tmp_path / "shelf" / "org" / "m", {"config.json": {}, "weights.gguf": POINTER})
    write(tmp_path / "shelf" / "org" / "raw", {"config.json": {}, "model.bin": NO_PICKLES["model.bin"]["model.bin"], "pytorch_model.bin": GOOD})
    with LoopbackHub(tmp_path / "shelf") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        with pytest.raises(BadInput, match="LFS pointer"): lock("org/m")
        assert [s.path for s in lock("org/raw").skipped] == [s.path for s in inspect("org/raw").skipped] == [s.path for s in lock(tmp_path / "shelf" / "org" / "raw").skipped]


# Chat templates

@pytest.mark.parametrize("where", ["tokenizer_config.json", "chat_template.jinja", "chat_template.json", "additional_chat_templates/tool.jinja", "named", "gguf"])
@pytest.mark.parametrize("template, bad", [("{{ ''.__class__.__mro__[1].__subclasses__() }}", True), ("{{ x|attr('pop') }}", True), ("{% for m in messages %}{{ m['content'] }}{% endfor %}", False)])
def test_chat_templates(see, tmp_path, where, template, bad):
    files: dict[str, object] = {where: template if where.endswith(".jinja") else {"chat_template": template}}
    if where == "named": files = {"tokenizer_config.json": {"chat_template": [{"name": "default", "template": "x"}, {"name": "tool", "template": template}]}}
    if where == "gguf":
        def text(t: str) -> bytes: return struct.pack("<Q", len(t)) + t.encode()
        files = {"m.gguf": b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + text("general.name") + struct.pack("<I", 8) + text("x")
                 + text("tokenizer.chat_template") + struct.pack("<I", 8) + text(template)}
    found = see(write(tmp_path / "m", {"config.json": {}} | files))
    assert ("chat template reaches for" in risk(found, "remote-code")) == bad and len(found.risks) == bad


# What was left out of a lock

def test_a_skipped_file_that_changed_is_found(tmp_path):
    folder = write(tmp_path / "m", {"config.json": {}, "model.safetensors": safetensors(), "pytorch_model.bin": GOOD, "original/model.safetensors": safetensors()})
    locked = lock(folder)
    assert {s.path: s.sha256 is not None for s in locked.skipped} == {"pytorch_model.bin": True, "original/model.safetensors": False}
    assert verify(locked, folder).ok
    (folder / "original" / "model.safetensors").write_bytes(b"x")  # no loader looks there
    assert verify(locked, folder).ok
    (folder / "pytorch_model.bin").write_bytes(bytes(len(GOOD)))  # the same size
    assert [(p.path, p.kind) for p in verify(locked, folder).problems] == [("pytorch_model.bin", "unlocked")]
    (folder / "pytorch_model.bin").unlink()
    assert verify(locked, folder).ok


def test_a_skipped_file_of_the_hub_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    write(tmp_path / "shelf" / "org" / "m", {"config.json": {}, "model.safetensors": safetensors(), "pytorch_model.bin": GOOD})
    with LoopbackHub(tmp_path / "shelf") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        locked, folder = lock("org/m"), pull("org/m")
        assert ModelLock.from_dict(json.loads(locked.to_json())) == locked and lock("org/m").to_json() == locked.to_json()
    for content, right in ((GOOD, True), (bytes(len(GOOD)), False), (EVIL, False)):
        (folder / "pytorch_model.bin").write_bytes(content)
        assert verify(locked).ok == right


def test_the_cache_says_that_it_answers(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    write(tmp_path / "shelf" / "org" / "m", {"config.json": {}, "model.safetensors": safetensors()})
    with LoopbackHub(tmp_path / "shelf") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        commit = pull("org/m").name
        inspect("org/m"), lock("org/m")
        assert "answered from" not in capsys.readouterr().err
        for offline in "1", "":
            monkeypatch.setenv("HF_HUB_OFFLINE", offline)
            if not offline: monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
            for ask in inspect, lock:
                ask("org/m")
                said = capsys.readouterr()
                assert f"org/m is answered from the HF cache, commit {commit[:12]}" in said.err and not said.out


def test_a_part_of_a_model_in_the_cache_is_not_counted_as_the_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    shards = {f"model-0000{i}-of-00002.safetensors": safetensors({f"w{i}": [i]}) for i in (1, 2)}
    index = {"weight_map": {f"w{i}": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}}
    write(tmp_path / "shelf" / "org" / "m", {"config.json": {}, "model.safetensors.index.json": index} | shards)
    with LoopbackHub(tmp_path / "shelf") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        folder = pull("org/m")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert inspect("org/m").tensors.parameters == 3
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(Unreachable, match="only a part"): inspect("org/m")
