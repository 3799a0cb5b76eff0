"""No wrong byte on a full disk, no request without end, no header that takes minutes, nothing beside the lock."""
from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fsdl_devinfra.core.errors import BadInput, CheckError, Unreachable
from fsdl_devinfra.hub.checkpoint import inspect
from fsdl_devinfra.hub.header import parse_header
from fsdl_devinfra.hub.locks import lock
from fsdl_devinfra.hub.pulling import pull
from fsdl_devinfra.hub.remote import Remote, find
from fsdl_devinfra.hub.verification import verify
from hub_files import one

HUB_FILES = {"config.json": {"model_type": "tiny"}, "model.safetensors": one(size=3_500_000)}


# 1. Short writes

_LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
from fsdl_devinfra.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("where", ["cache", "folder"])
@pytest.mark.parametrize("short", [1, 100_000, 1_048_576, 2_000_000, -1])  # -1: the healthy control
def test_a_quota_never_leaves_wrong_bytes(hub, tmp_path, where, short):
    locked = lock("org/tiny")
    file = locked.save(tmp_path / "x.lock.json")
    size = max(f.size_bytes for f in locked.files)
    more = ["--local-dir", str(tmp_path / "here")] if where == "folder" else []
    command = [sys.executable, "-c", _LIMITED, str(size - short), "hub", "pull", str(file), *more, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    said = json.loads(done.stdout)
    if short < 0:
        assert done.returncode == 0 and verify(locked, said["path"], full=True).ok
        return
    assert done.returncode == 2 and "cannot be written" in said["error"], (done.returncode, said, done.stderr)
    seen = [p for p in tmp_path.rglob("model.safetensors") if "shelf" not in p.parts]
    assert not seen, "a file that is not whole became visible"
    assert verify(locked, pull(locked, local_dir=more[1] if more else None), full=True).ok  # and it resumes


def test_a_full_disk_never_leaves_wrong_bytes(hub, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3600k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode: pytest.skip("no right to mount a small disk")
    try:
        ballast = disk / "ballast"
        def fill(*_: object) -> int:
            ballast.write_bytes(bytes(600 * 1024))
            return 10 * 1024 * 1024
        locked = lock("org/tiny")
        import fsdl_devinfra.hub.pulling as pulling
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pulling, "_room", fill)  # another process fills the disk after the check
            with pytest.raises(CheckError, match="cannot be written"): pull(locked, local_dir=disk / "here")
        assert not (disk / "here" / "model.safetensors").exists()
        ballast.unlink()
        assert verify(locked, pull(locked, local_dir=disk / "here"), full=True).ok
    finally: subprocess.run(["umount", str(disk)], check=True)


# 7. Nothing without end

class Server:
    "A server that answers as a function says."
    def __init__(self, answer: Callable[[BaseHTTPRequestHandler], None]):
        outer = self
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            def do_GET(self) -> None:
                outer.count += 1
                answer(self)
            def log_message(self, *args: object) -> None: pass
        self.count, self.server = 0, ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self) -> Server: return self
    def __exit__(self, *args: object) -> None: self.server.shutdown()


COMMIT = "c" * 40


def send(h: BaseHTTPRequestHandler, body: bytes, status: int = 200, **headers: str) -> None:
    h.send_response(status)
    for k, v in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **{k.replace("_", "-"): v for k, v in headers.items()}}.items(): h.send_header(k, v)
    h.end_headers()
    h.wfile.write(body)


def listing(**files: bytes) -> bytes:
    import hashlib
    siblings = [{"rfilename": n.replace("__", "."), "size": len(b), "lfs": {"sha256": hashlib.sha256(b).hexdigest(), "size": len(b)}} for n, b in files.items()]
    return json.dumps({"sha": COMMIT, "siblings": siblings}).encode()


def test_an_empty_file_without_an_etag_is_asked_for_once(no_hub, monkeypatch):
    def answer(h: BaseHTTPRequestHandler) -> None: send(h, listing(empty__txt=b"") if "/api/" in h.path else b"")
    with Server(answer) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        assert (pull("org/tiny") / "empty.txt").read_bytes() == b"" and server.count == 2


@pytest.mark.parametrize("what", ["listing", "file", "headers", "headers of a file"])
def test_a_reply_that_drips_ends_with_a_sentence(no_hub, monkeypatch, what):
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "1")
    body = bytes(100_000)
    def answer(h: BaseHTTPRequestHandler) -> None:
        at_listing = "/api/" in h.path
        if at_listing and "file" in what: return send(h, listing(a__txt=body))
        try:
            if "headers" in what: h.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
            else:
                h.send_response(200)
                h.send_header("Content-Length", "100000")
                h.end_headers()
            for _ in range(300): h.wfile.write(b" "); h.wfile.flush(); time.sleep(0.1)
        except OSError: pass
    with Server(answer) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        began = time.monotonic()
        with pytest.raises(Unreachable): pull("org/tiny")
        assert time.monotonic() - began < 40


def test_who_asks_to_wait_is_waited_for(no_hub, monkeypatch):
    body = b"x" * 1000; refusals = [{"Retry_After": "1"}, {"Retry_After": "1"}, {"RateLimit": '"api";r=0;t=1'}, {"Retry_After": "0"}]
    def answer(h: BaseHTTPRequestHandler) -> None:
        if "/api/" in h.path: return send(h, listing(a__txt=body))
        if refusals: return send(h, b"", 429, **refusals.pop())
        send(h, body)
    with Server(answer) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        assert (pull("org/tiny") / "a.txt").read_bytes() == body


def test_a_long_wait_is_said(no_hub, monkeypatch, capsys):
    refusals = [{"Retry_After": "2"}]
    def answer(h: BaseHTTPRequestHandler) -> None: send(h, *(b"", 429) if refusals else (listing(a__txt=b"x"),), **(refusals.pop() if refusals else {}))
    with Server(answer) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        assert lock("org/tiny").repo == "org/tiny" and "waiting 2 s, as it asks" in capsys.readouterr().err
        assert lock("org/tiny").repo == "org/tiny" and not capsys.readouterr().err


def test_an_expired_address_is_asked_for_again(no_hub, monkeypatch):
    body, expired = b"x" * 1000, [1, 1]
    def blob(h: BaseHTTPRequestHandler) -> None:
        if expired: return send(h, b"", 403 if expired.pop() else 200)
        send(h, body)
    with Server(blob) as away:
        def answer(h: BaseHTTPRequestHandler) -> None:
            if "/api/" in h.path: return send(h, listing(a__txt=body))
            send(h, b"", 302, Location=away.url + "/blob?signature=1")
        with Server(answer) as server:
            monkeypatch.setenv("HF_ENDPOINT", server.url)
            assert (pull("org/tiny") / "a.txt").read_bytes() == body


@pytest.mark.parametrize(("status", "headers", "words"), [
    (401, {}, "refused the token"), (403, {"X_Error_Message": "needs read permission on gated repos"}, "needs read permission"),
    (404, {"X_Xet_Hash": "a" * 64}, "Xet"), (404, {}, "has no model")])
def test_a_refusal_says_what_the_server_said(no_hub, monkeypatch, status, headers, words):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 20)
    with Server(lambda h: send(h, b"", status, **headers)) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        with pytest.raises(BadInput) as e: find(Remote(), "org/tiny")
    assert words in str(e.value) and "set HF_TOKEN" not in str(e.value).replace("has", "")


def test_a_name_of_255_letters_is_pulled(hub):
    name = "n" * 250 + ".json"
    (hub.repo / name).write_text("{}")
    assert (pull("org/tiny") / name).read_text() == "{}"


# 8. Hostile headers

def _entries(count: int) -> list[str]: return [f'"t{i}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{i + 1}]}}' for i in range(count)]


@pytest.mark.parametrize("twice", [True, False])
def test_one_key_that_stands_twice_among_many_takes_no_time(twice):
    text = ("{" + ",".join(_entries(40_000) + ([_entries(1)[0]] if twice else [])) + "}").encode()
    began = time.process_time()
    risks = parse_header(text, "x.safetensors", 8 + len(text) + 40_000).risks
    assert [r.kind for r in risks] == (["duplicate-key"] if twice else []) and time.process_time() - began < 3


@pytest.mark.parametrize("shape", ["[" + "9" * 400 + "]", "[" + ",".join(["9223372036854775807"] * 64) + "]",
                                   "[" + ",".join(["2"] * 200_000) + "]", "[" + "9" * 5000 + "]"])
def test_a_shape_that_no_file_holds_is_refused_in_a_sentence(tmp_path, shape):
    text = f'{{"w":{{"dtype":"U8","shape":{shape},"data_offsets":[0,8]}}}}'.encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    began = time.process_time()
    with pytest.raises(BadInput): inspect(tmp_path)
    assert time.process_time() - began < 2


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "utf-8-sig", "utf-8"])
def test_only_utf_8_is_a_header(encoding):
    text = ("{" + _entries(1)[0] + "}").encode(encoding)
    if encoding == "utf-8": assert list(parse_header(text).tensors) == ["t0"]
    else:
        with pytest.raises(BadInput, match="not JSON"): parse_header(text)


def test_a_name_of_a_hundred_thousand_parts_is_no_fault_of_ours(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(one("a." * 100_000 + "b"))
    assert inspect(tmp_path).to_dict()["tensors"]["count"] == 1


# 2. Only what is locked counts

@pytest.fixture
def sharded(tmp_path, no_hub) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for i in (1, 2): (folder / f"model-0000{i}-of-00002.safetensors").write_bytes(one(f"w{i}"))
    index = {"weight_map": {f"w{i}": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    return folder


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json", "model.fp16.safetensors", "adapter_config.json",
                                  "adapter_model.safetensors", "modeling_tiny.py", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                                  "generation_config.json", "tokenizer.model", "merges.txt"])
def test_a_further_file_that_a_loader_reads_fails_by_name(sharded, tmp_path, name):
    locked = lock(sharded)
    assert verify(locked, sharded).ok
    (sharded / name).write_bytes(one("w1"))
    found = verify(locked, sharded)
    assert not found.ok and [(p.path, p.kind) for p in found.problems] == [(name, "unlocked")]
    file = locked.save(tmp_path / "x.lock.json")
    command = [str(Path(sys.executable).with_name("fsdl-devinfra")), "hub", "verify", str(file), str(sharded), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and name in done.stdout


@pytest.mark.parametrize("name", ["notes.txt", "report.html", "optimizer.pt", "training_args.bin", "images/a.png", "runs/model.safetensors"])
def test_a_further_file_that_no_loader_reads_is_only_recorded(sharded, name):
    locked = lock(sharded)
    (sharded / name).parent.mkdir(exist_ok=True)
    (sharded / name).write_bytes(b"x")
    found = verify(locked, sharded)
    assert found.ok and found.unlocked == [name]


def test_a_copy_that_was_left_out_when_locking_is_known(sharded):
    (sharded / "pytorch_model.bin").write_bytes(b"x")
    locked = lock(sharded)
    assert [s.path for s in locked.skipped] == ["pytorch_model.bin"] and verify(locked, sharded).ok


@pytest.mark.parametrize("kind", ["Llama", "Mixtral"])  # the second one is converted by Transformers
def test_a_lock_loads_locked_files_only(tmp_path, no_hub, kind):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file, save_file
    from fsdl_devinfra.hub.loading import load
    more = {"num_local_experts": 4} if kind == "Mixtral" else {}
    config = getattr(transformers, f"{kind}Config")(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                                    num_key_value_heads=2, vocab_size=60, **more)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    model.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    locked, stored = lock(tmp_path / "m"), {}
    for file in (tmp_path / "m").glob("*.safetensors"): stored |= load_file(file)
    save_file({k: torch.zeros_like(v) for k, v in stored.items()}, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    loaded = load(locked, folder=tmp_path / "m").state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in model.state_dict().items())
