"""`hub pull LOCK --mirror`: mirrors that lie, die, or hold half, and that only the locked bytes become visible."""
from __future__ import annotations

import http.server
import os
import random
import shutil
import threading
from pathlib import Path

import fsspec
import pytest

from fsdl_devinfra.core.errors import BadInput, CheckError, Unreachable
from fsdl_devinfra.hub import LoopbackHub, lock, verify
from fsdl_devinfra.hub.pulling import pulled
from fsdl_devinfra.hub.remote import WrongBytes
from hub_server import Fault, FaultyHub

FILES = ("config.json", "model.safetensors", "sub/tokenizer.json")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub with a model, its lock, and a mirror folder that holds the same."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_the_test")
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE"): monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "shelf" / "org" / "tiny"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "tokenizer.json").write_text("{}\n")
    (folder / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}" + os.urandom(3 * 2**20))
    with FaultyHub(tmp_path / "shelf", redirect=True) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.lock = lock("org/tiny")
        hub.mirror = Path(shutil.copytree(folder, tmp_path / "mirror"))
        hub.seen.clear()
        yield hub


def spoil(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def test_a_right_mirror_spares_the_hub(hub, tmp_path):
    done = pulled(hub.lock, mirrors=[str(hub.mirror)])
    assert verify(hub.lock, done.path, full=True).ok and not hub.seen
    assert [(m.files, m.problems) for m in done.mirrors] == [(3, [])] and done.bytes_read == 0


@pytest.mark.parametrize("wrong", FILES)
def test_wrong_bytes_are_said_and_the_next_source_is_taken(hub, tmp_path, wrong, cli):
    spoil(hub.mirror / wrong)
    file = hub.lock.save(tmp_path / "l.json")
    env = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    ran = cli("hub", "pull", file, "--mirror", hub.mirror.as_uri(), "--json", env=env)
    assert ran.status == 0, ran.err
    assert verify(hub.lock, full=True).ok and [m["files"] for m in ran.json["mirrors"]] == [2]
    assert len(ran.json["mirrors"][0]["problems"]) == 1 and wrong in ran.json["mirrors"][0]["problems"][0] and wrong in ran.err
    assert {s.path.split("/resolve/")[1].split("/", 1)[1] for s in hub.seen if "/resolve/" in s.path} == {wrong}


def test_a_short_a_long_and_a_missing_file(hub, tmp_path):
    content = (hub.mirror / "model.safetensors").read_bytes()
    for bad in (content[:-1], content + b"x", b"", None):
        (hub.mirror / "model.safetensors").unlink(missing_ok=True)
        if bad is not None: (hub.mirror / "model.safetensors").write_bytes(bad)
        shutil.rmtree(tmp_path / "home", ignore_errors=True)
        done = pulled(hub.lock, mirrors=[str(hub.mirror)])
        assert verify(hub.lock, full=True).ok and len(done.mirrors[0].problems) == 1


def test_where_no_source_is_right_nothing_becomes_visible(hub, tmp_path):
    spoil(hub.mirror / "model.safetensors")
    hub.faults.append(Fault("flip", "model.safetensors"))
    with pytest.raises(WrongBytes): pulled(hub.lock, mirrors=[str(hub.mirror)], local_dir=tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()
    hub.faults.clear()
    assert verify(hub.lock, pulled(hub.lock, mirrors=[str(hub.mirror)], local_dir=tmp_path / "out").path, full=True).ok


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None: pass

    def do_GET(self) -> None:
        self.server.authorizations.append(self.headers.get("authorization"))
        super().do_GET()


@pytest.fixture
def web(hub, tmp_path):
    """The mirror folder behind Python's own web server, which knows no ranges."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: Quiet(*a, directory=str(hub.mirror)))
    server.authorizations = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_plain_web_server_and_the_token_stays_home(hub, web):
    server, url = web
    done = pulled(hub.lock, mirrors=[url])
    assert verify(hub.lock, full=True).ok and done.mirrors[0].files == 3 and set(server.authorizations) == {None}


def test_another_hub_is_a_mirror(hub, tmp_path):
    with LoopbackHub(tmp_path / "shelf") as other:
        done = pulled(hub.lock, mirrors=[other.url])
        assert done.mirrors[0].files == 3 and not hub.seen and {s.authorization for s in other.seen} == {None}


def test_a_mirror_that_is_down_is_left_alone(hub):
    done = pulled(hub.lock, mirrors=["http://127.0.0.1:9", str(hub.mirror)])
    assert verify(hub.lock, full=True).ok and done.mirrors[1].files == 3 and done.mirrors[0].problems and not hub.seen


def test_a_bucket_through_fsspec(hub):
    for f in hub.lock.files:
        with fsspec.open(f"memory://models/org/tiny/{f.path}", "wb") as file: file.write((hub.mirror / f.path).read_bytes())
    done = pulled(hub.lock, mirrors=["memory://models"])
    assert done.mirrors[0].files == 3 and verify(hub.lock, full=True).ok and not hub.seen


def test_offline_a_folder_will_do(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(Unreachable): pulled(hub.lock)
    with pytest.raises(Unreachable): pulled(hub.lock, mirrors=["http://127.0.0.1:9"])
    assert verify(hub.lock, pulled(hub.lock, mirrors=[str(hub.mirror)]).path, full=True).ok


def test_the_lock_of_a_folder_comes_from_a_mirror(hub, tmp_path):
    locked = lock(hub.mirror)
    with pytest.raises(BadInput, match="lock is of a folder"): pulled(locked)
    done = pulled(locked, mirrors=[str(hub.mirror)], local_dir=tmp_path / "out")
    assert verify(locked, tmp_path / "out", full=True).ok and done.repo is None


def test_mistakes_are_sentences(hub, tmp_path, cli):
    file = hub.lock.save(tmp_path / "l.json")
    env = {"HF_HOME": str(tmp_path / "home")}
    for url in ("nowhere", "gopher9://x/y", "file:///absent"):
        ran = cli("hub", "pull", file, "--mirror", url, env=env)
        assert ran.status == 2 and ran.sentence(), (url, ran.out, ran.err)


def test_random_mirrors_end_in_right_bytes_or_one_sentence(hub, tmp_path):
    """Several mirrors, each with some files right, spoilt, short or missing, in any order, with or without a Hub that lies too."""
    rng = random.Random(5)
    for case in range(15):
        folders = []
        for i in range(rng.randint(1, 3)):
            folder = Path(shutil.copytree(hub.mirror, tmp_path / f"m{case}-{i}"))
            for name in FILES:
                what = rng.choice(("right", "right", "spoilt", "short", "missing"))
                if what == "spoilt": spoil(folder / name)
                elif what == "short": (folder / name).write_bytes((folder / name).read_bytes()[:-1])
                elif what == "missing": (folder / name).unlink()
            folders.append(str(folder))
        hub.faults[:] = [Fault("flip", rng.choice(FILES))] if rng.random() < 0.5 else []
        out = tmp_path / f"out{case}"
        try: pulled(hub.lock, local_dir=out, mirrors=folders)
        except CheckError: pass
        else: assert verify(hub.lock, out, full=True).ok
        for f in hub.lock.files:  # whatever became visible is right
            if (out / f.path).exists(): assert (out / f.path).read_bytes() == (hub.mirror / f.path).read_bytes()


def test_the_password_of_a_mirror_is_in_no_message(hub, capsys):
    done = pulled(hub.lock, mirrors=["http://me:geheim@127.0.0.1:9/shelf?token=geheim"])
    assert verify(hub.lock, done.path, full=True).ok
    said = str(done.to_dict()) + "".join(capsys.readouterr())
    assert "127.0.0.1:9" in said and "geheim" not in said


@pytest.mark.parametrize("address", ["", "http://[half", "C:\\no\\such\\folder", "no/such/folder"])
def test_what_is_no_mirror_is_refused(address):
    from fsdl_devinfra.hub.mirrors import Mirror
    with pytest.raises(BadInput, match="neither an address nor a folder"): Mirror(address)


def test_no_message_says_none(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    of_folder = lock(hub.mirror)
    with pytest.raises(Unreachable) as failed: pulled(of_folder, tmp_path / "out", mirrors=["https://127.0.0.1:9"])
    assert "None" not in str(failed.value)
