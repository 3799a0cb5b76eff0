"""The faults of `hub_server` do what they say, one at a time, beside a healthy server; and what a client makes of the rarer ones."""
from __future__ import annotations

import http.client
import os
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from fsdl_devinfra.hub.locks import lock
from fsdl_devinfra.hub.pulling import pull
from fsdl_devinfra.hub.remote import Remote, WrongBytes, fetch, find
from fsdl_devinfra.hub.server import LoopbackHub
from hub_server import Fault, FaultyHub

MIB, WEIGHTS = 2**20, "model.safetensors"
FILE = f"/org/tiny/resolve/main/{WEIGHTS}"
HUB_FILES = {"config.json": '{"model_type": "tiny"}', WEIGHTS: b"\2\0\0\0\0\0\0\0{}" + os.urandom(3 * MIB - 10)}


def get(url: str, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, bytes that came before the connection ended)."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
    try:
        connection.request(method, path, headers=headers)
        reply = connection.getresponse()
        try: body = reply.read()
        except http.client.IncompleteRead as e: body = e.partial
        return reply.status, {k.lower(): v for k, v in reply.getheaders()}, body
    finally: connection.close()


@pytest.fixture
def straight(hub):
    """The same Hub without redirects."""
    hub.blob_url = ""
    return hub


def test_a_hub_with_faults_but_without_one_is_the_package_s_server(straight):
    paths = [FILE, "/org/tiny/resolve/main/config.json", "/api/models/org/tiny?blobs=true", "/api/models/org/tiny/tree/main", "/api/models", "/org/tiny/resolve/main/none"]
    with LoopbackHub(straight.repo.parents[1]) as healthy:
        for path in paths:
            for headers in ({}, {"range": "bytes=5-1000"}, {"range": "bytes=9999999-"}):
                one, other = get(straight.url, path, **headers), get(healthy.url, path, **headers)
                for told in (one[1], other[1]): told.pop("date", None)
                assert one == other
        assert [(s.path, s.range, s.status, s.bytes_sent) for s in straight.seen] == [(s.path, s.range, s.status, s.bytes_sent) for s in healthy.seen]
        assert healthy.sent() == straight.sent() > 3 * MIB


def differing(one: bytes, other: bytes) -> list[int]: return [i for i, (a, b) in enumerate(zip(one, other)) if a != b]


def test_what_each_fault_does_to_the_bytes(straight):
    right = HUB_FILES[WEIGHTS]
    def sent(*faults: Fault, **headers: str) -> bytes:
        straight.faults[:] = faults
        return get(straight.url, FILE, **headers)[2]
    assert sent() == right
    assert differing(sent(Fault("flip")), right) == [len(right) // 2]
    assert differing(sent(Fault("flip", WEIGHTS, 7)), right) == [7]
    assert differing(sent(Fault("flip", WEIGHTS, 7), range="bytes=5-100"), right[5:101]) == [2]
    assert sent(Fault("flip", "config.json")) == right
    assert sent(Fault("zeros")) == right[:len(right) // 2] + bytes(len(right) - len(right) // 2)
    assert sent(Fault("long")) == right + b"x" * 100
    assert sent(Fault("short", WEIGHTS, 1000)) == right[:1000]
    assert sent(Fault("cut", WEIGHTS, MIB + 5)) == right[:MIB + 5]
    assert b"log in" in sent(Fault("html"))
    assert sent(Fault("no-range"), range="bytes=5-100") == right


def test_what_each_fault_says(straight):
    def said(*faults: Fault) -> dict[str, str]:
        straight.faults[:] = faults
        return get(straight.url, FILE, "HEAD")[1]
    usual = said()
    for fault, name, value in [(Fault("etag", "*", "0"), "etag", '"0"'), (Fault("commit", "*", "f"), "x-repo-commit", "f"), (Fault("size", "*", 7), "x-linked-size", "7"),
                               (Fault("encoding"), "content-encoding", "gzip"), (Fault("no-size"), "content-length", None), (Fault("no-size"), "x-linked-size", None)]:
        assert said(fault).get(name) == value != usual.get(name)
    straight.faults[:] = [Fault("status", "*", 503, times=1)]
    assert [get(straight.url, FILE, "HEAD")[0] for _ in range(2)] == [503, 200]


def test_a_listing_without_hashes_is_completed_from_the_tree(hub):
    """Page by page; a redirect is taken as well."""
    hub.page = 1
    remote = Remote()
    tiny = find(remote, "org/tiny")
    hub.faults[:] = [Fault("no-hash", "*", times=1)]
    assert find(remote, "org/tiny") == tiny
    hub.faults[:] = [Fault("status", "*", 503, times=1)]
    assert find(remote, "org/tiny").commit == tiny.commit


@pytest.mark.parametrize("fault, why", [(Fault("flip", "config.json"), "the bytes of config.json"), (Fault("etag", "config.json", "../../../escaped"), "not a hash")], ids=lambda v: getattr(v, "kind", ""))
def test_a_small_file_that_lies_is_refused(hub, fault, why):
    remote = Remote()
    tiny = find(remote, "org/tiny")
    hub.faults.append(fault)
    with pytest.raises(WrongBytes, match=why): fetch(remote, tiny, "config.json")


def test_a_range_that_is_ignored_is_refused(hub):
    remote = Remote()
    tiny = find(remote, "org/tiny")
    hub.faults.append(Fault("no-range", "*"))
    with pytest.raises(WrongBytes, match="ignores ranges"): remote.span(tiny.url(WEIGHTS), "org/tiny", 0, 10)
    hub.faults[:] = [Fault("commit", "info", "f" * 40)]
    with pytest.raises(WrongBytes, match="was asked at commit"): find(remote, "org/tiny", tiny.commit)


@pytest.mark.parametrize("fault", [Fault("flip", WEIGHTS), Fault("zeros", WEIGHTS), Fault("long", WEIGHTS), Fault("html", WEIGHTS), Fault("etag", WEIGHTS, "../../../escaped"),
                                   Fault("commit", "*", "f" * 40), Fault("size", WEIGHTS, 7)], ids=lambda f: f.kind)
def test_nothing_of_wrong_bytes_is_left(hub, fault):
    locked = lock("org/tiny")
    hub.faults[:] = [fault]
    with pytest.raises(WrongBytes): pull(locked)
    cache = Path(os.environ["HF_HOME"]) / "hub" / "models--org--tiny"
    assert not [p.name for p in cache.rglob("*") if p.is_file() and p.stat().st_size > 100]


def test_a_reply_that_ends_early_and_does_not_say_so_is_continued(hub):
    locked = lock("org/tiny")
    hub.faults[:] = [Fault("short", WEIGHTS, MIB), Fault("no-size", WEIGHTS)]
    assert (pull(locked) / WEIGHTS).read_bytes() == HUB_FILES[WEIGHTS]


def test_the_package_knows_no_faults():
    from fsdl_devinfra import hub
    from fsdl_devinfra.hub import server
    assert "Fault" not in dir(hub) and not hasattr(server, "Fault") and issubclass(FaultyHub, server.LoopbackHub)
