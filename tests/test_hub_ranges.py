"""Several ranges of one file at once: the right bytes or one sentence, whatever the server, the disk or a kill does; what has arrived is not asked for again."""
from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fsdl_devinfra.core.errors import CheckError
from fsdl_devinfra.hub import pulling
from fsdl_devinfra.hub.locks import LockedFile, lock
from fsdl_devinfra.hub.pulling import pulled
from fsdl_devinfra.hub.remote import Reply, WrongBytes
from fsdl_devinfra.hub.verification import verify
from hub_server import Fault, FaultyHub

WEIGHTS, KIB = "model.safetensors", 1024


@pytest.fixture
def hub(no_hub, tmp_path, monkeypatch):
    """A Hub with a file of 23.4 ranges, where a range is 64 KiB."""
    monkeypatch.setattr(pulling, "RANGE_BYTES", 64 * KIB)
    monkeypatch.setattr(pulling, "LARGE_BYTES", 256 * KIB)
    folder = tmp_path / "shelf" / "org" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / WEIGHTS).write_bytes(b"\2\0\0\0\0\0\0\0{}" + os.urandom(1500 * KIB))
    with FaultyHub(tmp_path / "shelf", redirect=True) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.lock, hub.file = lock("org/tiny"), folder / WEIGHTS
        hub.seen.clear()
        yield hub


def asked(hub) -> list[tuple[int, int]]:
    """The ranges that the store answered, as (first byte, one after the last)."""
    found = [re.fullmatch(r"bytes=(\d+)-(\d+)", s.range) for s in hub.seen if s.range and s.path.startswith("/blobs/")]
    return sorted((int(m[1]), int(m[2]) + 1) for m in found if m)


def size_of(spans: list[tuple[int, int]]) -> int: return sum(end - start for start, end in spans)


def weights_of(lock_): return next(f for f in lock_.files if f.path == WEIGHTS)


def right(hub, out: Path) -> bool: return verify(hub.lock, pulled(hub.lock, local_dir=out).path, full=True).ok


def test_every_range_once(hub, tmp_path):
    done = pulled(hub.lock, local_dir=tmp_path / "out")
    assert verify(hub.lock, done.path, full=True).ok and done.bytes_read == hub.lock.size_bytes
    assert len(asked(hub)) == 24 and size_of(asked(hub)) == weights_of(hub.lock).size_bytes
    assert not list((tmp_path / "out").rglob("*.ranges"))


def test_a_small_file_comes_in_one(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(pulling, "LARGE_BYTES", 10**9)
    assert right(hub, tmp_path / "out") and asked(hub) == []


def test_never_more_than_the_window_ahead(hub, tmp_path, monkeypatch):
    """The range that is waited for is held back: the others run ahead of it by no more than the window."""
    monkeypatch.setattr(pulling, "STREAMS", 4)  # two files: two streams each, so a window of four ranges
    plain, seen = pulling._fill_range, []

    def held(ranges, start, end):
        if not start: time.sleep(1)
        seen.append((start, len(seen)))
        plain(ranges, start, end)

    monkeypatch.setattr(pulling, "_fill_range", held)
    assert right(hub, tmp_path / "out")
    before_the_first = [start for start, turn in seen if turn < dict(seen)[0]]
    assert before_the_first and max(before_the_first) < 4 * 64 * KIB


HEALED = [Fault("cut", WEIGHTS, 30 * KIB, times=3), Fault("status", "*" + WEIGHTS, 503, times=2), Fault("no-range", WEIGHTS), Fault("short", WEIGHTS, 5, times=2)]


@pytest.mark.parametrize("fault", HEALED, ids=lambda f: f.kind)
def test_what_heals(hub, tmp_path, fault):
    hub.faults.append(fault)
    assert right(hub, tmp_path / "out")


REFUSED = [Fault("flip", WEIGHTS, 700 * KIB), Fault("zeros", WEIGHTS), Fault("long", WEIGHTS), Fault("size", WEIGHTS, 12), Fault("etag", WEIGHTS, "0" * 64),
           Fault("commit", WEIGHTS, "f" * 40), Fault("html", WEIGHTS)]


@pytest.mark.parametrize("fault", REFUSED, ids=lambda f: f.kind)
def test_what_is_refused_and_pulled_again(hub, tmp_path, fault):
    hub.faults.append(fault)
    with pytest.raises(CheckError): pulled(hub.lock, local_dir=tmp_path / "out")
    assert not (tmp_path / "out" / WEIGHTS).exists()
    hub.faults.clear()
    assert right(hub, tmp_path / "out")


def test_an_etag_that_changes_in_the_middle(hub, tmp_path):
    hub.faults.append(Fault("etag", WEIGHTS, "a" * 40, times=9))  # of a file in git: no hash that could be compared
    with pytest.raises(WrongBytes, match=f"{WEIGHTS} changed while it was downloaded"): pulled(hub.lock, local_dir=tmp_path / "out")
    hub.faults[:] = [Fault("etag", WEIGHTS, "a" * 40)]  # the control: the same one all the time
    assert right(hub, tmp_path / "out")


def test_a_full_disk_keeps_what_arrived(hub, tmp_path, monkeypatch):
    put = pulling._put

    def failing(file, data, start, path):
        if start is not None and start >= 640 * KIB: raise CheckError("the disk is full", "Free space")
        put(file, data, start, path)

    monkeypatch.setattr(pulling, "_put", failing)
    with pytest.raises(CheckError, match="disk is full"): pulled(hub.lock, local_dir=tmp_path / "out")
    place = pulling._folder_place(tmp_path / "out", weights_of(hub.lock))
    kept = pulling._there(place)
    assert kept and all(place.partial.read_bytes()[a:b] == hub.file.read_bytes()[a:b] for a, b in kept)
    monkeypatch.setattr(pulling, "_put", put)
    hub.seen.clear()
    assert right(hub, tmp_path / "out")
    assert size_of(asked(hub)) == weights_of(hub.lock).size_bytes - size_of(kept)


KILLED = """
import sys
from fsdl_devinfra.hub import pulling
pulling.RANGE_BYTES, pulling.LARGE_BYTES = 64 * 1024, 256 * 1024
pulling.pulled(sys.argv[1], local_dir=sys.argv[2])
"""


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_killed_pull_asks_only_for_what_is_missing(hub, tmp_path, share):
    """kill -9 in the middle: what was recorded is there, bit for bit, and not one byte of it is asked for again."""
    hub.faults.append(Fault("slow-body", WEIGHTS, 0.15))
    file = hub.lock.save(tmp_path / "x.lock.json")
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(file), str(tmp_path / "out")])
    while process.poll() is None and hub.sent("/blobs/*") < share * weights_of(hub.lock).size_bytes: time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    place = pulling._folder_place(tmp_path / "out", weights_of(hub.lock))
    kept, data = pulling._there(place), hub.file.read_bytes()
    assert kept and all(place.partial.read_bytes()[a:b] == data[a:b] for a, b in kept)
    window = pulling.STREAMS * 64 * KIB
    assert hub.sent("/blobs/*") - size_of(kept) <= window  # sent, and not recorded
    time.sleep(0.5)  # until the server has noticed
    hub.faults.clear()
    hub.seen.clear()
    assert right(hub, tmp_path / "out")
    assert size_of(asked(hub)) == len(data) - size_of(kept)


def test_a_torn_record_is_believed_as_far_as_it_goes(hub, tmp_path):
    place = pulling._folder_place(tmp_path / "out", weights_of(hub.lock))
    place.partial.parent.mkdir(parents=True)
    data = hub.file.read_bytes()
    place.partial.write_bytes(data[:100 * KIB] + bytes(100 * KIB) + data[200 * KIB:300 * KIB])
    place.record.write_text(f"0 {100 * KIB}\n{200 * KIB} {300 * KIB}\n{100 * KIB} {200 * KIB}")  # the last line was being written
    assert pulling._there(place) == [(0, 100 * KIB), (200 * KIB, 300 * KIB)]
    assert right(hub, tmp_path / "out")
    assert size_of(asked(hub)) == len(data) - 200 * KIB


@pytest.mark.parametrize("lies", ["0 921600\n", "nonsense\n", "5 3\n-1 9\n0 99999999999\n", ""], ids=range(4))
def test_a_record_that_lies_costs_a_download_and_no_wrong_byte(hub, tmp_path, lies):
    place = pulling._folder_place(tmp_path / "out", weights_of(hub.lock))
    place.partial.parent.mkdir(parents=True)
    place.partial.write_bytes(bytes(900 * KIB))
    place.record.write_text(lies)
    assert right(hub, tmp_path / "out") and not place.record.exists()


def test_holes_without_a_record_are_not_believed(hub, tmp_path):
    """A file with holes whose record is gone: its bytes are hashed like any others, and it begins again."""
    place = pulling._folder_place(tmp_path / "out", weights_of(hub.lock))
    place.partial.parent.mkdir(parents=True)
    content = bytearray(hub.file.read_bytes()[:900 * KIB])
    content[100 * KIB:200 * KIB] = bytes(100 * KIB)
    place.partial.write_bytes(bytes(content))
    assert right(hub, tmp_path / "out")


def test_one_stream_goes_on_behind_the_first_bytes(hub, tmp_path, monkeypatch):
    """A server without ranges, or a mirror, takes up a file with holes: its first bytes are kept, the rest is not believed."""
    place = pulling._folder_place(tmp_path / "out", weights_of(hub.lock))
    place.partial.parent.mkdir(parents=True)
    data = hub.file.read_bytes()
    place.partial.write_bytes(data[:100 * KIB] + bytes(100 * KIB) + data[200 * KIB:300 * KIB])
    place.record.write_text(f"0 {100 * KIB}\n{200 * KIB} {300 * KIB}\n")
    pulled(hub.lock, local_dir=tmp_path / "out", mirrors=[str(hub.file.parent)])
    assert verify(hub.lock, tmp_path / "out", full=True).ok and asked(hub) == []


def test_random_faults_end_in_right_bytes_or_one_sentence(hub, tmp_path):
    rng = random.Random(17)
    kinds = [lambda: Fault("cut", WEIGHTS, rng.randrange(1, 64 * KIB), times=rng.randint(1, 4)), lambda: Fault("flip", WEIGHTS, rng.randrange(1500 * KIB), times=1),
             lambda: Fault("status", "*" + WEIGHTS, 503, times=1), lambda: Fault("short", WEIGHTS, rng.randrange(64 * KIB), times=1), lambda: Fault("long", WEIGHTS, times=1),
             lambda: Fault("no-range", WEIGHTS, times=1), lambda: Fault("zeros", WEIGHTS, times=1)]
    good = 0
    for case in range(12):
        hub.faults[:] = [rng.choice(kinds)() for _ in range(rng.randint(0, 2))]
        out = tmp_path / f"out{case}"
        try: pulled(hub.lock, local_dir=out)
        except CheckError: pass
        else: good += 1
        if (out / WEIGHTS).exists(): assert (out / WEIGHTS).read_bytes() == hub.file.read_bytes()
        hub.faults.clear()
        assert right(hub, out)
        shutil.rmtree(out)
    assert good >= 4, good


@pytest.mark.parametrize("said, refused", [("bytes 100-199/1000", False), ("bytes 100-150/1000", False), ("bytes 0-99/1000", True), ("bytes 100-200/1000", True), ("bytes 100-199/999", True), ("", True)])
def test_a_reply_to_a_range_says_which_one_it_is(said, refused):
    reply = Reply("http://hub.example.org", 206, {"content-range": said, "content-length": "100"}, None, None, None, None)
    locked = LockedFile("a", 1000, "0" * 64)
    if not refused: pulling._check_sizes(reply, locked, 100, 200)
    else:
        with pytest.raises(WrongBytes): pulling._check_sizes(reply, locked, 100, 200)
