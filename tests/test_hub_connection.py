"""The kept connections under `inspect` and `lock`: the same refusals as over the official session, and what HTTP can do to a client."""
from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fsdl_devinfra.core.errors import BadInput, CheckError, Unreachable
from fsdl_devinfra.hub import connection, remote
from fsdl_devinfra.hub.checkpoint import inspect
from fsdl_devinfra.hub.connection import Broken, Connections
from fsdl_devinfra.hub.locks import lock
from fsdl_devinfra.hub.remote import Remote, WrongBytes, find
from hub_files import one
from hub_server import Fault, FaultyHub

SECRET = "hf_secret_of_the_test"
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home")); monkeypatch.setenv("HF_TOKEN", SECRET)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "SSL_CERT_FILE", *PROXIES, *map(str.upper, PROXIES)): monkeypatch.delenv(name, raising=False)


def make_repo(folder: Path) -> Path:
    folder.mkdir(parents=True); names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for i, name in enumerate(names): (folder / name).write_bytes(one(f"t{i}", 3000))
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {f"t{i}": n for i, n in enumerate(names)}}))
    return folder


@pytest.fixture(params=["kept connections", "official session"])
def hub(request, tmp_path, monkeypatch):
    """A Hub that is asked over each of the two transports."""
    repo = make_repo(tmp_path / "shelf" / "org" / "tiny"); official = request.param == "official session"
    monkeypatch.setattr(remote, "needs_official", lambda base: official)
    with FaultyHub(tmp_path / "shelf", redirect=True) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url); hub.repo = repo
        assert (Remote()._connections is None) == official
        yield hub


SHARD = "model-00002-of-00003.safetensors"
REFUSED = [(Fault("no-range", SHARD), "ignores ranges"), (Fault("commit", SHARD, "f" * 40), "was asked at commit"), (Fault("etag", SHARD, "../../x"), "not a hash"),
           (Fault("etag", SHARD, "0" * 64), "other bytes"), (Fault("long", SHARD), "sent more than"), (Fault("encoding", SHARD), "encoded reply"),
           (Fault("html", SHARD), "ignores ranges"), (Fault("flip", "config.json"), "the bytes of config.json"), (Fault("etag", "config.json", "W/\"1\""), "not a hash"),
           (Fault("commit", "config.json", "f" * 40), "was asked at commit"), (Fault("encoding", "config.json"), "encoded reply")]


@pytest.mark.parametrize("fault, why", REFUSED, ids=[f"{f.kind}-{f.path[-11:]}-{str(f.value)[:4]}" for f, _ in REFUSED])
def test_every_lie_is_refused(hub, fault, why):
    hub.faults.append(fault)
    with pytest.raises(WrongBytes, match=why) as error: inspect("org/tiny")
    assert SECRET not in str(error.value) and "signature" not in str(error.value)
    hub.faults.clear(); assert inspect("org/tiny").tensors.count == 3


@pytest.mark.parametrize("fault", [Fault("cut", SHARD, 5, times=1), Fault("cut", "config.json", 5, times=2), Fault("status", "*" + SHARD, 503, times=2), Fault("status", "/api/*", 429, times=1)],
                         ids=lambda f: f"{f.kind}-{f.path}")
def test_what_passes_is_tried_again(hub, fault):
    hub.faults.append(fault)
    assert inspect("org/tiny").tensors.count == 3


@pytest.mark.parametrize("fault, why", [(Fault("cut", SHARD, 5), "did not answer"), (Fault("status", "*" + SHARD, 503), "status 503"), (Fault("slow", "*" + SHARD, 3), "Timeout")],
                         ids=lambda f: getattr(f, "kind", ""))
def test_what_stays_is_said(hub, fault, why, monkeypatch):
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "0.5"); hub.faults.append(fault)
    with pytest.raises(Unreachable, match=why) as error: inspect("org/tiny")
    assert SHARD in str(error.value) and "signature" not in str(error.value) and SECRET not in str(error.value)


def test_the_token_goes_to_the_endpoint_alone(hub):
    hub.tokens["org/tiny"] = SECRET; inspect("org/tiny"); lock("org/tiny")
    assert {s.authorization for s in hub.seen if s.path.startswith("/blobs/")} == {None}
    assert {s.authorization for s in hub.seen if not s.path.startswith("/blobs/")} == {f"Bearer {SECRET}"}


@pytest.mark.parametrize("token", ["hf_a\r\nX-Evil: 1", "hf_ä", "hf_\x00"])
def test_a_token_that_is_no_header_is_not_shown(hub, token, monkeypatch):
    if "\0" in token: monkeypatch.delenv("HF_TOKEN"); (Path(os.environ["HF_HOME"])).mkdir(); (Path(os.environ["HF_HOME"]) / "token").write_text(token)
    else: monkeypatch.setenv("HF_TOKEN", token)
    for call in inspect, lock:
        with pytest.raises(BadInput, match="characters that no token has") as error: call("org/tiny")
        assert token[:4] not in str(error.value) and not hub.seen


# What HTTP can do to a client. `talk` is a server that answers each connection with a function's bytes.

class Talk:
    def __init__(self, answer: Callable[[socket.socket, bytes], None]):
        self.server, self.answer, self.asked = socket.create_server(("127.0.0.1", 0)), answer, []
        self.url = "http://127.0.0.1:%d" % self.server.getsockname()[1]

    def __enter__(self) -> Talk: threading.Thread(target=self._run, daemon=True).start(); return self

    def __exit__(self, *_: object) -> None: self.server.close()

    def _run(self) -> None:
        while True:
            try: client, _ = self.server.accept()
            except OSError: return
            threading.Thread(target=self._one, args=(client,), daemon=True).start()

    def _one(self, client: socket.socket) -> None:
        with client:
            try:
                while request := client.recv(65536): self.asked.append(request); self.answer(client, request)
            except OSError: return


def ok(body: bytes = b"ok", extra: str = "") -> bytes: return f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n{extra}\r\n".encode() + body


def get(connections: Connections, url: str, timeout: float = 2) -> bytes:
    with connections.stream("GET", url, {}, timeout) as answer: return b"".join(answer.iter_raw())


BAD = {"no HTTP": b"hello\r\n\r\n", "empty": b"", "status": b"HTTP/1.1 abc OK\r\n\r\n", "version": b"HTTP/7.1 200 OK\r\n\r\n", "long line": b"HTTP/1.1 200 OK\r\nA: " + b"a" * 70_000 + b"\r\n\r\n",
       "many headers": b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n", "short": b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort",
       "chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nxx", "short chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
       "hints": b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * 20}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_http_is_broken(kind):
    def answer(client: socket.socket, request: bytes) -> None: client.sendall(BAD[kind]); client.shutdown(socket.SHUT_RDWR)
    connections = Connections()
    with Talk(answer) as talk, pytest.raises(Broken): get(connections, talk.url)
    assert not any(connections._idle.values())  # nothing of it is used again


def test_early_hints_and_chunks_are_understood():
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n1\r\n!\r\n0\r\n\r\n"
    with Talk(lambda client, _: client.sendall(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + chunked)) as talk:
        connections = Connections()
        assert [get(connections, talk.url) for _ in range(3)] == [b"ok!"] * 3


def test_a_connection_that_the_server_closed_meanwhile_is_not_used():
    with Talk(lambda client, _: (client.sendall(ok()), client.shutdown(socket.SHUT_RDWR))) as talk:
        connections = Connections()
        for _ in range(3): assert get(connections, talk.url) == b"ok"; time.sleep(0.05)
        assert len(talk.asked) == 3


def test_a_body_of_which_nobody_read_the_rest_spoils_nothing():
    with Talk(lambda client, _: client.sendall(ok(b"a" * 100_000))) as talk:
        connections = Connections()
        with connections.stream("GET", talk.url, {}, 2) as answer: assert len(next(answer.iter_raw(10))) == 10
        assert not any(connections._idle.values()) and get(connections, talk.url) == b"a" * 100_000


def test_many_threads_get_their_own_answers():
    from concurrent.futures import ThreadPoolExecutor
    with Talk(lambda client, request: client.sendall(ok(request.split()[1] * 50))) as talk, ThreadPoolExecutor(32) as pool:
        connections = Connections(); paths = [f"/{i}" for i in range(600)]
        assert list(pool.map(lambda p: get(connections, talk.url + p), paths)) == [p.encode() * 50 for p in paths]
        kept = sum(len(c) for c in connections._idle.values())
        assert 0 < kept <= 32


def redirect(location: str, body: bytes = b"", length: int | None = None) -> bytes:
    return f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


@pytest.mark.parametrize("location, why", [("file:///etc/passwd", "not encrypted"), ("http://[::1", "no address"), ("http://127.0.0.1:1/x", "another server"), ("/a", "in a circle"),
                                           ("http://127.0.0.1:99999/", "another server"), ("//evil.example/x?token=1", "another server")])
def test_redirects_that_lead_nowhere(location, why, monkeypatch):
    with Talk(lambda client, _: client.sendall(redirect(location))) as talk:
        monkeypatch.setenv("HF_ENDPOINT", talk.url)
        with pytest.raises(CheckError, match=why) as error: find(Remote(), "org/tiny")
        assert "token=1" not in str(error.value)


def test_a_redirect_with_an_endless_body_is_left(monkeypatch):
    sent = []
    def answer(client: socket.socket, request: bytes) -> None:
        if b"/there" in request: client.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"); return
        client.sendall(redirect("/there", length=10**12))
        for _ in range(5000): sent.append(client.send(bytes(10_000)))
    with Talk(answer) as talk:
        monkeypatch.setenv("HF_ENDPOINT", talk.url)
        with pytest.raises(BadInput, match="has no model"): find(Remote(), "org/tiny")
    assert sum(sent) < 20_000_000


@pytest.mark.parametrize("after, waits", [("1", True), ("3600", False), ("Wed, 21 Oct 2026 07:28:00 GMT", True), ("-5", True), ("9" * 400, True)])
def test_the_server_says_how_long_to_wait(after, waits, monkeypatch):
    slept = []; monkeypatch.setattr(time, "sleep", slept.append)
    body = json.dumps({"sha": "a" * 40, "siblings": [{"rfilename": "x", "size": 1, "blobId": "b" * 40}]}).encode()
    def answer(client: socket.socket, _: bytes) -> None:
        client.sendall(ok(body) if len(talk.asked) > 1 else f"HTTP/1.1 429 Too Many\r\nRetry-After: {after}\r\nContent-Length: 0\r\n\r\n".encode())
    with Talk(answer) as talk:
        monkeypatch.setenv("HF_ENDPOINT", talk.url)
        if waits: assert find(Remote(), "org/tiny").commit == "a" * 40 and slept == [1.0 if after == "1" else 0.2]
        else:
            with pytest.raises(Unreachable, match="status 429"): find(Remote(), "org/tiny")


@pytest.mark.parametrize("location", ["https://127.0.0.1:1/there"])
def test_the_address_of_a_redirect_that_does_not_answer_is_not_signed(location, monkeypatch):
    with Talk(lambda client, _: client.sendall(redirect(location + "?signature=secret"))) as talk:
        monkeypatch.setenv("HF_ENDPOINT", talk.url)
        with pytest.raises(Unreachable, match="did not answer") as error: Remote().read(talk.url + "/x", "org/tiny", away=True)
        assert "secret" not in str(error.value)


# Whose settings count

def test_a_proxy_is_used(tmp_path, monkeypatch):
    make_repo(tmp_path / "shelf" / "org" / "tiny")
    with Talk(lambda client, _: client.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")) as proxy:
        for name in "HTTP_PROXY", "http_proxy": monkeypatch.setenv(name, proxy.url)
        monkeypatch.setenv("HF_ENDPOINT", "http://hub.example.org")
        from huggingface_hub.utils import close_session
        close_session()
        try:
            with pytest.raises(Unreachable): inspect("org/tiny")
        finally: close_session()
        assert proxy.asked and proxy.asked[0].startswith(b"GET http://hub.example.org/api/models/org/tiny/")


def test_a_client_factory_is_used(tmp_path, monkeypatch):
    import huggingface_hub as h
    from huggingface_hub.utils import _http
    made, usual = [], _http.default_client_factory
    make_repo(tmp_path / "shelf" / "org" / "tiny")
    with FaultyHub(tmp_path / "shelf") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        try:
            h.set_client_factory(lambda: made.append(1) or usual())
            assert inspect("org/tiny").tensors.count == 3 and made
        finally: h.set_client_factory(usual)
        assert not connection.needs_official(hub.url)


def test_small_requests_do_not_import_the_official_client(tmp_path):
    make_repo(tmp_path / "shelf" / "org" / "tiny")
    with FaultyHub(tmp_path / "shelf") as hub:
        code = "import sys; from fsdl_devinfra.hub import inspect; assert inspect('org/tiny').tensors.count == 3; print(sorted({'huggingface_hub', 'httpx', 'httpx2'} & set(sys.modules)))"
        ran = subprocess.run([sys.executable, "-W", "error::ResourceWarning", "-c", code], env=os.environ | {"HF_ENDPOINT": hub.url}, capture_output=True, text=True)
        assert (ran.stdout.strip(), ran.stderr) == ("[]", "")


@pytest.fixture
def certificate(tmp_path) -> Iterator[tuple[Path, Path]]:
    if not shutil.which("openssl"): pytest.skip("openssl is not installed")
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert, "-days", "2", "-subj", "/CN=localhost",
                    "-addext", "subjectAltName=DNS:localhost"], check=True, capture_output=True)
    return key, cert


def test_certificates_are_checked_before_the_token_is_sent(certificate, monkeypatch):
    key, cert = certificate; context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER); context.load_cert_chain(cert, key); asked = []
    body = json.dumps({"sha": "a" * 40, "siblings": [{"rfilename": "x", "size": 1, "blobId": "b" * 40}]}).encode()
    def one(plain: socket.socket) -> None:
        with contextlib.suppress(OSError), context.wrap_socket(plain, server_side=True) as client:
            while request := client.recv(65536): asked.append(request); client.sendall(ok(body))
    def run() -> None:
        with contextlib.suppress(OSError):
            while True: threading.Thread(target=one, args=(server.accept()[0],), daemon=True).start()
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=run, daemon=True).start(); port = server.getsockname()[1]
        monkeypatch.setenv("HF_ENDPOINT", f"https://localhost:{port}")
        with pytest.raises(Unreachable, match="CERTIFICATE_VERIFY_FAILED|certificate verify failed"): find(Remote(), "org/tiny")
        assert not asked
        monkeypatch.setenv("SSL_CERT_FILE", str(cert)); at = Remote()
        assert [find(at, "org/tiny").commit for _ in range(3)] == ["a" * 40] * 3
        assert len(asked) == 3 and all(SECRET.encode() in a for a in asked) and sum(len(c) for c in at._connections._idle.values()) == 1
        monkeypatch.setenv("HF_ENDPOINT", f"https://127.0.0.1:{port}")  # the certificate is for another name
        with pytest.raises(Unreachable, match="ertificate"): find(Remote(), "org/tiny")
        assert len(asked) == 3
