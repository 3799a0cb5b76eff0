"""What strangers write: files, listings, indexes and headers that are wrong in ways that nobody planned for. Each ends in a sentence or a risk, never in a traceback."""
from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time

import pytest

from fsdl_devinfra.core.errors import BadInput, CheckError
from fsdl_devinfra.hub import verification
from fsdl_devinfra.hub.checkpoint import inspect
from fsdl_devinfra.hub.header import gguf_header, onnx_header, parse_header
from fsdl_devinfra.hub.locks import LockedFile, ModelLock, lock
from fsdl_devinfra.hub.pulling import pull
from fsdl_devinfra.hub.remote import WrongBytes
from fsdl_devinfra.hub.source import cache_folder
from fsdl_devinfra.hub.verification import verify
from hub_files import one, raw
from hub_server import Fault

MIB = 2**20


HEADERS = [
    '{"w":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}', '{"w":{"dtype":"U8","shape":[1e3],"data_offsets":[0,1000]}}', '{"w":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}}',
    '{"w":{"dtype":"U8","shape":[true],"data_offsets":[0,1]}}', '{"w":{"dtype":"U8","shape":[1],"data_offsets":[0]}}', '{"w":{"dtype":"U8","shape":[1],"data_offsets":"01"}}',
    '{"w":{"dtype":["U8"],"shape":[1],"data_offsets":[0,1]}}', '{"w":[]}', '[]', '"x"', '{"w"', "\x00" * 40, '{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
    "[" * 5000, '{"w":{"dtype":"U8","shape":[' + "9" * 5000 + '],"data_offsets":[0,1]}}',
]


@pytest.mark.parametrize("header", HEADERS, ids=range(len(HEADERS)))
def test_headers_that_are_none(tmp_path, header):
    (tmp_path / "model.safetensors").write_bytes(raw(header, 1))
    with pytest.raises(BadInput, match="model.safetensors"): inspect(tmp_path)


RISKY = {'{"w":{"dtype":"U8","shape":[4611686018427387904,4611686018427387904],"data_offsets":[0,1]}}': "overlap", '{"w":{"dtype":"U8","shape":[1],"data_offsets":[9223372036854775807,9223372036854775808]}}': "overlap",
         '{"w":{"dtype":"U8","shape":[1],"data_offsets":[1,0]}}': "overlap", '{"w":{"dtype":"U8","dtype":"F32","shape":[1],"data_offsets":[0,1]}}': "duplicate-key",
         '{"w":{"dtype":"X9","shape":[1],"data_offsets":[0,7]}}': "overlap", '{"b":{"dtype":"U8","shape":[0],"data_offsets":[5,5]},"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}': "overlap"}


@pytest.mark.parametrize("header", RISKY, ids=range(len(RISKY)))
def test_headers_that_lie(tmp_path, header):
    (tmp_path / "model.safetensors").write_bytes(raw(header, 1))
    assert RISKY[header] in {r.kind for r in inspect(tmp_path).risks}


@pytest.mark.parametrize("metadata", [{"w": ["a"]}, {"w": None}, {"w": {}}, ["w"], "w", 1, None])
def test_metadata_that_is_not_text_is_left_out(metadata):
    header = parse_header(json.dumps({"__metadata__": metadata, "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode())
    assert header.metadata == {} and list(header.tensors) == ["a"]


DOCUMENTS = {"config.json": ["[]", "3", '"x"', "null", '{"architectures": 5}', '{"architectures": [null]}', '{"architectures": {}}', '{"auto_map": 7}', '{"model_type": [1]}', '{"a": NaN}'],
             "model.safetensors.index.json": ['{"weight_map": {"w": null}}', '{"weight_map": {"w": ["model.safetensors"]}}', '{"weight_map": []}', "[]", '{"weight_map": {"\\u00e9": "model.safetensors"}}',
                                              '{"weight_map": {"w": "gone.safetensors"}}', '{"weight_map": {"w": "C:\\\\model.safetensors"}}', '{"weight_map": {"w": "..\\\\..\\\\model.safetensors"}}'],
             "model_index.json": ["[]", '{"_class_name": []}'], "adapter_config.json": ["[1]"], "README.md": ["---\nlicense:\n  - a\n---", "---\n---", "\xff"]}


@pytest.mark.parametrize("path", DOCUMENTS)
def test_documents_of_another_kind(hub, path):
    for text in DOCUMENTS[path]:
        (hub.repo / path).write_text(text, encoding="latin-1" if "\xff" in text else "utf-8")
        for found in inspect(hub.repo), inspect("org/tiny"):
            assert found.tensors.parameters == 3000 and str(found) and found.to_json(), text
            # an index that lies is a risk; one that names other shards lies beside model.safetensors as a second model
            second = set() if "\\u00e9" in text else {"duplicate-key"}
            if path.endswith(".index.json"): assert {r.kind for r in found.risks} == {"path"} | second, text


@pytest.mark.parametrize("text", ['{"a": "\\ud800"}', "[" * 5000, '{"a": 1', "\x00", '{"n": ' + "9" * 5000 + "}"])
def test_documents_that_cannot_be_read(hub, text):
    (hub.repo / "config.json").write_text(text)
    with pytest.raises(CheckError, match="config.json is not JSON"): inspect(hub.repo)


def test_a_tensor_in_two_shards_is_a_risk(tmp_path):
    for i in "12": (tmp_path / f"model-0000{i}-of-00002.safetensors").write_bytes(one("layer.weight"))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"layer.weight": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}')
    # and "b", which the index names, is in no shard
    assert [(r.kind, "layer.weight" in r.why) for r in inspect(tmp_path).risks] == [("duplicate-key", True), ("path", False)]


def test_links_in_a_circle(tmp_path):
    folder = tmp_path / "m"; folder.mkdir(); (folder / "model.safetensors").write_bytes(one()); locked = lock(folder)
    (folder / "loop").symlink_to(folder)  # a folder that holds itself: not followed
    assert [f.path for f in inspect(folder).files] == [f.path for f in lock(folder).files] == ["model.safetensors"]
    (folder / "loop").unlink(); (folder / "a.txt").symlink_to("b.txt"); (folder / "b.txt").symlink_to("a.txt")
    for call in inspect, lock:
        with pytest.raises(BadInput, match="a.txt is a link to a file that is not there"): call(folder)
    circle = ModelLock(files=[*locked.files, LockedFile("a.txt", 1, "0" * 64)])
    assert [(p.path, p.kind) for p in verify(circle, folder).problems] == [("a.txt", "missing")]


def test_a_pipe_is_no_file_and_nobody_waits_for_it(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(one()); os.mkfifo(tmp_path / "config.json")
    assert [f.path for f in inspect(tmp_path).files] == ["model.safetensors"]
    assert [p.kind for p in verify(ModelLock(files=[LockedFile("config.json", 1, "0" * 64)]), tmp_path).problems] == ["unreadable"]


def test_a_lock_in_which_a_file_is_also_a_folder_is_refused():
    with pytest.raises(BadInput, match="both a file and a folder"): ModelLock(files=[LockedFile(p, 1, "0" * 64) for p in ("a", "a/b")])


@pytest.mark.parametrize("text", ["{}", "[]", "null", '{"schema": "fsdl-devinfra/model-lock/1", "files": null}', '{"schema": "fsdl-devinfra/model-lock/1", "files": [null]}', "\x00",
                                  '{"schema": "fsdl-devinfra/model-lock/1", "files": [{"path": 3, "size_bytes": "1", "sha256": null}]}', '{"schema": "fsdl-devinfra/env/1"}',
                                  '{"schema": "fsdl-devinfra/model-lock/1", "repo": 5, "commit": [1], "files": [{"path": "a", "size_bytes": 1, "sha256": "' + "0" * 64 + '"}]}'])
def test_files_that_are_no_lock(tmp_path, text):
    (tmp_path / "x.lock.json").write_text(text)
    for call in ModelLock.load, verify, pull:
        with pytest.raises(CheckError): call(tmp_path / "x.lock.json")


@pytest.mark.parametrize("fault", [Fault("encoding", "model.safetensors"), Fault("encoding", "config.json")], ids=lambda f: f.path)
def test_an_encoded_reply_is_refused(hub, fault):
    locked = lock("org/tiny"); hub.faults[:] = [fault]
    with pytest.raises(WrongBytes, match="encoded reply"): pull(locked)
    with pytest.raises(WrongBytes, match="encoded reply"): inspect("org/tiny")
    hub.faults.clear(); assert verify(locked, pull(locked)).ok


def test_a_whole_file_in_answer_to_a_range_costs_nothing(hub):
    (hub.repo / "model.safetensors").write_bytes(one(size=8 * MIB)); hub.faults[:] = [Fault("no-range", "*.safetensors")]
    with pytest.raises(WrongBytes, match="ignores ranges"): inspect("org/tiny")


def test_markers_of_missing_files_are_no_files(hub):
    locked = lock("org/tiny"); folder = pull(locked)
    marker = cache_folder() / "models--org--tiny" / ".no_exist" / locked.commit; marker.mkdir(parents=True); (marker / "model.safetensors").write_text("")
    assert verify(locked).ok and pull(locked) == folder and inspect(folder).tensors.count == 1


# ONNX and GGUF

def field(number: int, body: bytes | int) -> bytes:
    def varint(n: int) -> bytes:
        out = b""
        while n > 127: out += bytes([n & 127 | 128]); n >>= 7
        return out + bytes([n])
    return varint(number << 3) + varint(body) if isinstance(body, int) else varint(number << 3 | 2) + varint(len(body)) + body


def onnx_file(tensors: dict[str, tuple[int, list[int], int]], location: str = "") -> bytes:
    def tensor(name: str, kind: int, shape: list[int], size: int) -> bytes:
        where = b"".join(field(13, field(1, k) + field(2, v)) for k, v in ((b"location", location.encode()), (b"length", str(size).encode())))
        return b"".join(field(1, n) for n in shape) + field(2, kind) + field(8, name.encode()) + (where + field(14, 1) if location else field(9, bytes(size)))
    nodes = b"".join(field(1, field(1, b"x") + field(4, b"MatMul")) for _ in range(50))
    return field(1, 8) + field(7, nodes + field(2, b"graph") + b"".join(field(5, tensor(n, *t)) for n, t in tensors.items())) + field(8, field(2, 17))


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_onnx_weights_are_counted_without_reading_them(hub, where):
    shutil.rmtree(hub.repo); (hub.repo / "onnx").mkdir(parents=True)
    plain = onnx_file({"a.weight": (1, [500, 1000], 2_000_000), "a.bias": (10, [1000], 2000), "ids": (7, [], 8)})
    (hub.repo / "onnx" / "model.onnx").write_bytes(plain); (hub.repo / "onnx" / "model_int8.onnx").write_bytes(onnx_file({"a.weight": (3, [500, 1000], 500_000)}))
    found = inspect(hub.repo if where == "folder" else "org/tiny")
    assert found.weight_format == "onnx" and (found.tensors.count, found.tensors.by_dtype) == (3, {"F32": 500_000, "F16": 1000, "I64": 1})
    assert [s.path for s in found.skipped] == ["onnx/model_int8.onnx"] and "Skipped" in str(found) and found.bytes_read < 50_000
    assert sum(m.size_bytes for m in found.modules if m.name == "a") == 2_002_000


def test_onnx_weights_beside_the_graph(tmp_path):
    for location, kinds in ("model.onnx_data", set()), ("../../etc/passwd", {"path"}):
        (tmp_path / "model.onnx").write_bytes(onnx_file({"w": (16, [10, 20], 400)}, location)); (tmp_path / "model.onnx_data").write_bytes(bytes(400))
        found = inspect(tmp_path)
        assert (found.tensors.by_dtype, {r.kind for r in found.risks}) == ({"BF16": 200}, kinds)
        assert found.uncounted == ([] if not kinds else ["model.onnx_data"])


def test_onnx_as_the_library_writes_it(tmp_path):
    onnx = pytest.importorskip("onnx"); np = pytest.importorskip("numpy")
    weights = {"w": np.zeros((7, 5), np.float32), "half": np.zeros(3, np.float16), "scalar": np.array(2, np.int64), "empty": np.zeros((0, 4), np.float32)}
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [onnx.helper.make_tensor_value_info("x", 1, [1])], [onnx.helper.make_tensor_value_info("y", 1, [1])],
                                   [onnx.numpy_helper.from_array(v, k) for k, v in weights.items()] + [onnx.helper.make_tensor("typed", 1, [4], [1.0, 2, 3, 4])])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "model.onnx")
    found = inspect(tmp_path).tensor_index
    assert {n: t.shape for n, t in found.items()} == {n: v.shape for n, v in weights.items()} | {"typed": (4,)}
    assert {n: t.dtype for n, t in found.items()} == {"w": "F32", "half": "F16", "scalar": "I64", "empty": "F32", "typed": "F32"}


def gguf_file(tensors: dict[str, tuple[int, list[int]]], words: int = 20_000) -> bytes:
    def text(t: str) -> bytes: return struct.pack("<Q", len(t)) + t.encode()
    pairs = text("general.name") + struct.pack("<I", 8) + text("x") + text("tokens") + struct.pack("<IIQ", 9, 8, words) + b"".join(text(f"word{i}") for i in range(words)) + text("f") + struct.pack("<If", 6, 1.5)
    infos = b"".join(text(n) + struct.pack("<I", len(s)) + struct.pack(f"<{len(s)}Q", *s) + struct.pack("<IQ", kind, 0) for n, (kind, s) in tensors.items())
    return b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 3) + pairs + infos + bytes(100)


def test_gguf_counts_the_largest_version(hub):
    (hub.repo / "model.safetensors").unlink()
    (hub.repo / "m.Q4_K_M.gguf").write_bytes(gguf_file({"blk.0.weight": (12, [256, 8])})); (hub.repo / "m.F16.gguf").write_bytes(gguf_file({"blk.0.weight": (1, [256, 8]), "n": (0, [8])}) + bytes(5 * MIB))
    for found in inspect(hub.repo), inspect("org/tiny"):
        assert (found.weight_format, found.tensors.by_dtype, [s.path for s in found.skipped]) == ("gguf", {"F16": 2048, "F32": 8}, ["m.Q4_K_M.gguf"])
        assert found.bytes_read < MIB


def test_damaged_onnx_and_gguf_end_in_a_sentence(tmp_path):
    import random
    chance = random.Random(0); good = {"model.onnx": onnx_file({"w": (1, [3, 4], 48), "v": (1, [3], 12)}), "model.gguf": gguf_file({"w": (1, [4, 4])}, words=5)}
    for name, data in good.items():
        walk = (lambda d: onnx_header(lambda a, b: d[a:b], len(d))) if name == "model.onnx" else (lambda d: gguf_header(lambda a, b: d[a:b], len(d)))
        walk(data); refused = 0
        for _ in range(300):
            bad = bytearray(data)
            for _ in range(chance.randint(1, 4)): bad[chance.randrange(len(bad))] = chance.randrange(256)
            bad = bytes(bad[:chance.randrange(len(bad))] if chance.random() < 0.5 else bad)
            try: walk(bad)
            except (ValueError, RecursionError): refused += 1
        assert refused > 50
        (tmp_path / name).write_bytes(data[:20])
        with pytest.raises(BadInput, match=f"{name} is not an? (ONNX|GGUF) file, or it was cut"): inspect(tmp_path)
        (tmp_path / name).write_bytes(data)
        assert inspect(tmp_path).tensors.count
        (tmp_path / name).unlink()


PULL = "import sys; from fsdl_devinfra.hub.pulling import pull; pull(sys.argv[1])"


@pytest.mark.slow
def test_killed_ten_times_at_any_moment(hub, tmp_path):
    import random
    size = 48 * MIB; (hub.repo / "model.safetensors").write_bytes(one(size=size)); chance = random.Random(1)
    file = lock("org/tiny").save(tmp_path / "m.lock.json"); hub.faults[:] = [Fault("slow-body", "model.safetensors", 0.02)]; kills = 0
    for _ in range(10):
        process = subprocess.Popen([sys.executable, "-c", PULL, str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        time.sleep(chance.uniform(0.2, 1.2))
        if process.poll() is None: os.killpg(process.pid, signal.SIGKILL); kills += 1
        process.communicate()
        shown = cache_folder() / "models--org--tiny" / "snapshots"
        for p in shown.rglob("*") if shown.exists() else ():  # whatever is visible is right, at every moment
            if p.is_file(): assert p.read_bytes() == (hub.repo / p.name).read_bytes()
    hub.faults.clear(); pull(file)
    assert kills and verify(file, full=True).ok and not list(cache_folder().rglob("*incomplete"))


@pytest.mark.parametrize("error,said", [(OSError(5, "Input/output error", "weights"), "Input/output error"), (OSError("the disk is gone"), "the disk is gone")])
def test_a_file_that_cannot_be_read_to_its_end_says_why(error, said, tmp_path, monkeypatch):
    """In the words of the system, which has no number for some; never with a path of this machine."""
    def broken(*_): raise error
    monkeypatch.setattr(verification, "is_right", broken)
    problem = verification._read_problem(tmp_path, LockedFile("weights", 1, "0" * 64), True, lambda size: None)
    assert (problem.kind, problem.why) == ("unreadable", f"reading it failed ({said})")


def test_a_pointer_of_git_lfs_is_called_one_where_the_file_is_missing(tmp_path):
    """The control is a pointer that was locked as such: it is the file."""
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1000\n"
    (tmp_path / "weights").write_bytes(pointer)
    seen = {size: verification.seen_problem(tmp_path, LockedFile("weights", size, "0" * 64)) for size in (1000, len(pointer))}
    assert seen[1000].kind == "lfs-pointer" and "git lfs pull" in seen[1000].why
    assert seen[len(pointer)] is None
