"""Pulling from a Hub that lies, cuts, rots and is killed. Every test plants its fault in a real loopback server."""
from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

from fsdl_devinfra.core.errors import BadInput, CheckError, Unreachable
from fsdl_devinfra.hub import pulling
from fsdl_devinfra.hub.checkpoint import inspect
from fsdl_devinfra.hub.locks import LockedFile, ModelLock, lock
from fsdl_devinfra.hub.pulling import pull
from fsdl_devinfra.hub.remote import WrongBytes
from fsdl_devinfra.hub.source import cache_folder
from fsdl_devinfra.hub.verification import verify
from hub_files import one
from hub_server import Fault

MIB = 2**20
WEIGHTS = "model.safetensors"
HUB_FILES = {"config.json": {"model_type": "tiny"}, WEIGHTS: one(size=3 * MIB, data=os.urandom(3 * MIB))}


@pytest.fixture(autouse=True)
def token(no_hub, monkeypatch): monkeypatch.setenv("HF_TOKEN", "hf_secret_of_the_test")


def files_in_cache() -> list[Path]:
    return [p for p in cache_folder().rglob("*") if p.is_file() and ".locks" not in p.parts and p.suffix != ".TAG"]


REFUSED = [
    Fault("flip", WEIGHTS), Fault("flip", WEIGHTS, 0), Fault("zeros", WEIGHTS), Fault("long", WEIGHTS), Fault("html", WEIGHTS),
    Fault("size", WEIGHTS, 12), Fault("etag", WEIGHTS, "../../../escaped_blob"), Fault("etag", WEIGHTS, "0" * 64), Fault("etag", WEIGHTS, "not-a-hash"),
    Fault("commit", WEIGHTS, "f" * 40), Fault("flip", "config.json"), Fault("html", "config.json"),
]


@pytest.mark.parametrize("fault", REFUSED, ids=lambda f: f"{f.kind}-{f.path}-{str(f.value)[:12]}")
def test_wrong_bytes_are_refused_and_nothing_stays(hub, fault, tmp_path):
    locked = lock("org/tiny")
    hub.faults[:] = [fault]
    with pytest.raises(WrongBytes) as error: pull(locked)
    assert "secret" not in str(error.value) and "signature" not in str(error.value)
    snapshot = cache_folder() / "models--org--tiny" / "snapshots" / locked.commit
    bad = snapshot / fault.path
    assert not os.path.lexists(bad)
    right = [(hub.repo / f.path).read_bytes() for f in locked.files]
    for file in files_in_cache():  # a file that another one's fault interrupted may stay as far as it came
        found = file.read_bytes()
        assert found in right or (file.name.endswith(".incomplete") and any(r.startswith(found) for r in right)), f"{file} stayed"
    assert not list(tmp_path.rglob("*escaped*"))
    hub.faults.clear()
    assert verify(locked, pull(locked)).ok  # and it is mended by the next pull


@pytest.mark.parametrize("fault", [Fault("cut", WEIGHTS, MIB, times=2), Fault("short", WEIGHTS, MIB), Fault("no-range", WEIGHTS), Fault("no-size", WEIGHTS),
                                   Fault("status", "*" + WEIGHTS, 503, times=2)], ids=lambda f: f.kind)
def test_what_can_be_repaired_is_repaired(hub, fault):
    locked = lock("org/tiny")
    hub.faults[:] = [fault] + ([Fault("no-size", WEIGHTS)] if fault.kind == "short" else [])
    assert (pull(locked) / WEIGHTS).read_bytes() == (hub.repo / WEIGHTS).read_bytes()
    if fault.kind == "cut": assert hub.sent("/blobs/*") < 3.1 * MIB


def test_server_that_ignores_the_range_after_a_cut_is_survived(hub):
    locked = lock("org/tiny")
    hub.faults[:] = [Fault("cut", WEIGHTS, MIB, times=1), Fault("no-range", WEIGHTS)]
    assert (pull(locked) / WEIGHTS).read_bytes() == (hub.repo / WEIGHTS).read_bytes()


def test_a_cut_of_what_is_sent_anew_is_survived(hub):
    locked = lock("org/tiny")
    hub.faults[:] = [Fault("cut", WEIGHTS, MIB, times=3), Fault("no-range", WEIGHTS)]
    assert (pull(locked) / WEIGHTS).read_bytes() == (hub.repo / WEIGHTS).read_bytes()


def test_server_that_always_begins_anew_and_always_cuts_is_given_up(hub, monkeypatch):
    monkeypatch.setattr(pulling, "TRIES", 2)
    locked = lock("org/tiny")
    hub.faults[:] = [Fault("cut", WEIGHTS, MIB), Fault("no-range", WEIGHTS)]
    with pytest.raises(Unreachable, match="http://127.0.0.1"): pull(locked)


def test_truncated_reply_without_a_size_that_never_grows_is_refused(hub):
    locked = lock("org/tiny")
    hub.faults[:] = [Fault("short", WEIGHTS, 0), Fault("no-size", WEIGHTS)]
    with pytest.raises(WrongBytes, match="ended after 0 of"): pull(locked)


def test_persistent_cut_is_reported_with_the_address(hub, monkeypatch):
    monkeypatch.setattr(pulling, "TRIES", 2)
    locked = lock("org/tiny")
    hub.faults[:] = [Fault("cut", WEIGHTS, 0)]
    with pytest.raises(Unreachable, match="http://127.0.0.1"): pull(locked)


def test_another_commit_than_the_pinned_one_is_refused_everywhere(hub):
    commit = lock("org/tiny").commit
    hub.faults[:] = [Fault("commit", "info", "e" * 40)]
    with pytest.raises(WrongBytes, match="was asked at commit"): lock(f"org/tiny@{commit}")
    hub.faults[:] = [Fault("commit", "config.json", "e" * 40)]
    with pytest.raises(WrongBytes, match="was asked at commit"): inspect(f"org/tiny@{commit}")


@pytest.mark.parametrize("name", ["../outside.json", "/etc/outside", "a/../../outside", "C:/outside", "a\\..\\outside"])
def test_listed_paths_that_leave_the_folder_are_refused(hub, name, tmp_path):
    hub.faults[:] = [Fault("listing", value=name)]
    with pytest.raises(WrongBytes, match="leaves the folder"): lock("org/tiny")
    assert any(r.kind == "path" for r in inspect("org/tiny").risks)
    with pytest.raises(BadInput, match="leaves the folder"): ModelLock("org/tiny", "0" * 40, [LockedFile(name, 1, "0" * 64)])


def test_linked_folder_that_leads_outside_is_refused(hub, tmp_path):
    (hub.repo / "sub").mkdir(); (hub.repo / "sub" / "notes.txt").write_text("x")
    locked = lock("org/tiny"); target, outside = tmp_path / "here", tmp_path / "outside"
    target.mkdir(); outside.mkdir(); (target / "sub").symlink_to(outside)
    with pytest.raises(WrongBytes, match="outside of its folder"): pull(locked, local_dir=target)
    assert not list(outside.iterdir())


def test_linked_file_is_replaced_not_written_through(hub, tmp_path):
    locked = lock("org/tiny"); target, outside = tmp_path / "here", tmp_path / "outside.bin"
    target.mkdir(); outside.write_text("mine"); (target / WEIGHTS).symlink_to(outside)
    pull(locked, local_dir=target)
    assert outside.read_text() == "mine" and verify(locked, target).ok


@pytest.mark.parametrize("damage", ["rot", "truncate", "delete", "link"])
def test_what_rotted_in_the_cache_is_found_and_repaired(hub, damage, tmp_path):
    locked = lock("org/tiny"); file = pull(locked) / WEIGHTS; blob = file.resolve()
    if damage == "rot": data = bytearray(blob.read_bytes()); data[-1] ^= 4; blob.write_bytes(data)
    if damage == "truncate": os.truncate(blob, 1000)
    if damage == "delete": blob.unlink()
    if damage == "link": other = tmp_path / "other"; other.write_bytes(blob.read_bytes()); file.unlink(); file.symlink_to(other)
    kind = {"rot": "hash", "truncate": "size", "delete": "missing", "link": "link"}[damage]
    assert [p.kind for p in verify(locked).problems] == [kind]
    assert verify(locked, pull(locked)).ok


def test_the_token_goes_to_the_endpoint_alone(hub):
    hub.tokens["org/tiny"] = "hf_secret_of_the_test"
    inspect("org/tiny"); pull(lock("org/tiny"))
    away = [s for s in hub.seen if s.path.startswith("/blobs/")]
    assert away and all(s.authorization is None for s in away)
    assert all(s.authorization == "Bearer hf_secret_of_the_test" for s in hub.seen if not s.path.startswith("/blobs/"))


def test_gated_model_says_what_to_do(hub, monkeypatch):
    hub.tokens["org/tiny"] = "another"
    with pytest.raises(BadInput, match="is gated.*Accept its terms at http://127.0.0.1"): lock("org/tiny")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(BadInput, match="is gated"): inspect("org/tiny")


def test_only_the_endpoint_is_asked(hub):
    pull("org/tiny")
    assert {s.path.split("/")[1] for s in hub.seen} == {"api", "org", "blobs"}
    assert not [s for s in hub.seen if s.method == "POST"]


def test_disk_too_small_is_said_before_the_first_byte(hub, monkeypatch):
    locked = lock("org/tiny"); hub.seen.clear()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("U", "total used free")(10**9, 10**9, 1000))
    with pytest.raises(CheckError, match="needs 3.00 MiB and the disk has 1000 B left"): pull(locked)
    assert not hub.seen


def test_a_branch_is_known_offline_afterwards(hub, monkeypatch):
    folder = pull("org/tiny"); commit = folder.name
    assert (cache_folder() / "models--org--tiny" / "refs" / "main").read_text() == commit
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    locked = ModelLock("org/tiny", commit, lock(folder).files)
    assert pull(locked) == folder and verify(locked).ok
    (folder / "config.json").unlink()
    with pytest.raises(Unreachable, match="HF_HUB_OFFLINE"): pull(locked)


def test_orphans_of_the_official_client_are_used_and_removed(hub):
    locked = lock("org/tiny"); weights = next(f for f in locked.files if f.path == WEIGHTS)
    blobs = cache_folder() / "models--org--tiny" / "blobs"; blobs.mkdir(parents=True)
    good = (hub.repo / WEIGHTS).read_bytes()
    (blobs / f"{weights.sha256}.1a2b3c4d.incomplete").write_bytes(good[:2 * MIB])
    (blobs / f"{weights.sha256}.5e6f7a8b.incomplete").write_bytes(good[:MIB])
    old = blobs / f"{'0' * 64}.12345678.incomplete"; old.write_bytes(b"x" * MIB); os.utime(old, (time.time() - 1e6,) * 2)
    young = blobs / f"{'1' * 64}.12345678.incomplete"; young.write_bytes(b"x")
    hub.seen.clear(); pull(locked)
    assert hub.sent("/blobs/*") <= MIB + 1000
    assert [p.name for p in blobs.glob("*incomplete")] == [young.name]


def test_a_wrong_prefix_is_fetched_again_from_the_start(hub):
    locked = lock("org/tiny"); weights = next(f for f in locked.files if f.path == WEIGHTS)
    blobs = cache_folder() / "models--org--tiny" / "blobs"; blobs.mkdir(parents=True)
    (blobs / f"{weights.sha256}.fsdl.incomplete").write_bytes(bytes(MIB))
    assert verify(locked, pull(locked)).ok


PULL = """
import sys
from fsdl_devinfra.core.command import Parser, run
from fsdl_devinfra.hub.commands import register
def pull():
    parser = Parser("hub"); register(parser); args = parser.parse_args(["pull", sys.argv[1], "--json"])
    return args.run(args)
sys.exit(run(pull, as_json=True))
"""


def start(file: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", PULL, str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["SIGKILL", "Ctrl-C"])
def test_a_killed_pull_continues_where_it_stopped(hub, tmp_path, how):
    size = 64 * MIB
    (hub.repo / WEIGHTS).write_bytes(one(size=size, data=os.urandom(size)))
    file = lock("org/tiny").save(tmp_path / "m.lock.json")
    hub.seen.clear(); hub.faults[:] = [Fault("slow-body", WEIGHTS, 0.02)]
    process = start(file)
    while hub.sent("/blobs/*") < 24 * MIB and process.poll() is None: time.sleep(0.01)
    os.kill(process.pid, how); out, _ = process.communicate(timeout=30)
    if how == signal.SIGINT: assert process.returncode == 130 and "interrupted" in json.loads(out)["error"]
    time.sleep(0.3); hub.faults.clear()
    again = start(file); out, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    starts = [int(s.range.split("=")[1].split("-")[0]) for s in hub.seen if s.range and s.path.startswith("/blobs/")]
    assert starts and starts[-1] > 0
    assert hub.sent("/blobs/*") < size + 32 * MIB  # what was in the buffers of four connections
    assert verify(file).ok
    assert not list(cache_folder().rglob("*incomplete"))


def test_two_processes_that_pull_the_same_model_both_end_right(hub, tmp_path):
    (hub.repo / WEIGHTS).write_bytes(one(size=16 * MIB, data=os.urandom(16 * MIB)))
    file = lock("org/tiny").save(tmp_path / "m.lock.json")
    hub.seen.clear(); hub.faults[:] = [Fault("slow-body", WEIGHTS, 0.1)]
    both = [start(file), start(file)]
    for process in both: assert process.wait(60) == 0, process.stderr.read()
    assert verify(file, full=True).ok
    assert hub.sent("/blobs/*") < 17 * MIB  # once


def test_pull_says_wrong_bytes_with_status_1_and_a_dead_hub_with_2(hub, tmp_path, monkeypatch):
    file = lock("org/tiny").save(tmp_path / "m.lock.json")
    hub.faults[:] = [Fault("flip", WEIGHTS)]
    process = start(file); out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "not those of the lock" in json.loads(out)["error"] and "Traceback" not in err
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    process = start(file); out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "http://127.0.0.1:9/org/tiny" in json.loads(out)["error"] and "Traceback" not in err
