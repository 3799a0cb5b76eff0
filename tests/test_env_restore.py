"""The round trip: an environment is captured, restored from its wheels into an empty one with pip and with uv, and verified there."""
import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import pytest
from conftest import package_alone
from packaging.pylock import Pylock

from fsdl_devinfra.env import Environment, capture, restore
from fsdl_devinfra.env.proof import _record_at, make_wheel, wheel_record
from fsdl_devinfra.env.restoration import TARGETS, dockerfile

REPO = package_alone()
UV = Path(sys.executable).parent / "uv"
QUIET = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PIP_CONFIG_FILE": os.devnull, "UV_NO_CONFIG": "1", "UV_OFFLINE": "1", "UV_NO_CACHE": "1"}
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "UV_", "VIRTUAL_ENV"))} | QUIET


def run(*argv, cwd=None, ok=True, **variables):
    done = subprocess.run(list(map(str, argv)), capture_output=True, text=True, cwd=cwd, env=CLEAN | variables, timeout=300)
    assert not ok or done.returncode == 0, done.stdout + done.stderr
    return done


def pip(python, *args, **more):
    """This environment's pip (which reads pylock.toml), working on another interpreter."""
    return run(sys.executable, "-m", "pip", "--python", python, *args, **more)


def venv(path):
    run(sys.executable, "-m", "venv", "--without-pip", path)
    return path / "bin/python"


def in_env(python, cwd, code):
    return run(python, "-c", f"import sys; sys.path.insert(0, {str(REPO)!r}); " + code, cwd=cwd).stdout


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Four packages from a wheelhouse in an environment of their own, captured there."""
    folder = tmp_path_factory.mktemp("small"); house = folder / "house"; house.mkdir()
    make_wheel(house, "alpha", "1.0", {"alpha/__init__.py": "x = 1\n", "alpha-1.0.data/scripts/alpha-run": "#!python\nprint(1)\n", "alpha/data, odd.txt": "1"}, ["beta-two>=2"])
    make_wheel(house, "Beta_Two", "2.0.post1", {"beta_two.py": "y = 1\n"})
    make_wheel(house, "gamma", "3.0+local.1", {"gamma.py": "z = 1\n", "gamma-3.0+local.1.data/purelib/gamma_extra.py": "w = 1\n"})
    make_wheel(house, "delta", "0.1", {"delta.py": "d = 1\n"})
    python = venv(folder / "env")
    pip(python, "install", "-q", "--no-index", "--find-links", house, "alpha", "Beta_Two", "gamma", "delta")
    (folder / "env.json").write_text(in_env(python, folder, "from fsdl_devinfra.env import capture; print(capture().to_json())"))
    return folder, house, Environment.load(folder / "env.json")


def verified(python, folder):
    """What `verify` finds in another environment."""
    code = "import json; from fsdl_devinfra.env import Environment, verify; v = verify(Environment.load('env.json'), files=True); print(json.dumps(v.to_dict()))"
    return json.loads(in_env(python, folder, code))


def packages_differ(found):
    """Packages and files that are not the same; who installed them (pip or uv, from a path or by name) may differ."""
    return [d["field"] for d in found["differences"] if d["field"].startswith(("packages.", "files.")) and not d["field"].endswith((".installer", ".url", ".archive_sha256"))]


def test_capture_of_the_small_one(small):
    _, house, env = small
    assert set(env.packages) == {"alpha", "beta-two", "gamma", "delta"} and env.packages["gamma"].version == "3.0+local.1"
    for w in house.glob("*.whl"): assert wheel_record(w) in {p.record for p in env.packages.values()}


@pytest.mark.parametrize("installer", ["pip", "uv"])
@pytest.mark.parametrize("target", ["requirements", "pylock"])
def test_round_trip(small, tmp_path, installer, target):
    folder, house, env = small
    made = restore(env, target, wheelhouse=house, beside=tmp_path)
    assert made.proven == 4 and made.unproven == []
    name = "requirements.txt" if target == "requirements" else "pylock.toml"
    made.save(tmp_path / name)
    if target == "pylock": Pylock.from_dict(tomllib.loads(made.content)).validate()
    python = venv(tmp_path / "new")
    before = verified(python, folder)
    assert len(packages_differ(before)) == 4
    if installer == "uv":
        if not UV.exists(): pytest.skip("uv is not installed")
        how = ["pip", "sync"] if target == "pylock" else ["pip", "install", "--no-deps", "--require-hashes", "--no-index", "--find-links", house, "-r"]
        run(UV, *how[:2], "--python", python, *how[2:], tmp_path / name)
    else:
        pip(python, "install", "-q", *(["--no-deps", "--require-hashes", "--no-index", "--find-links", house] if target == "requirements" else []), "-r", tmp_path / name)
    after = verified(python, folder)
    assert packages_differ(after) == [] and after["verdict"] == "same", after["answer"]
    assert after["files"]["changed"] == [] and after["files"]["packages"] == 4


def test_verify_fails_after_an_edit(small, tmp_path):
    folder, house, env = small
    python = venv(tmp_path / "new")
    pip(python, "install", "-q", "--no-index", "--find-links", house, "alpha", "beta-two", "gamma", "delta")
    site = next((tmp_path / "new/lib").glob("python*/site-packages"))
    (site / "beta_two.py").write_text("y = 2\n")
    found = verified(python, folder)
    assert found["verdict"] == "differs" and [c["path"] for c in found["files"]["changed"]] == ["beta_two.py"] and "beta_two.py" in found["answer"]


def test_impostor_in_the_wheelhouse(small, tmp_path):
    """Same name, same version, other contents: not pinned, and said."""
    _, house, env = small
    other = tmp_path / "house"; shutil.copytree(house, other)
    make_wheel(other, "delta", "0.1", {"delta.py": "d = 2\n"})
    made = restore(env, "requirements", wheelhouse=other)
    assert [u.name for u in made.unproven] == ["delta"] and "delta==0.1 --hash" not in made.content


class Index(http.server.SimpleHTTPRequestHandler):
    """A package index on loopback that gives parts of files."""
    ranges = True
    def log_message(self, *_): pass
    def do_GET(self):
        path, part = self.translate_path(self.path), self.headers.get("Range")
        if not part or not self.ranges or not os.path.isfile(path): return super().do_GET()
        data = Path(path).read_bytes(); low, high = re.match(r"bytes=(\d*)-(\d*)", part).groups()
        start, end = (max(0, len(data) - int(high)), len(data)) if not low else (int(low), min(len(data), int(high) + 1))
        self.send_response(206); self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}"); self.send_header("Content-Length", str(end - start)); self.end_headers()
        self.wfile.write(data[start:end])


@pytest.fixture(params=[True, False], ids=["parts", "no-parts"])
def index(request, small, tmp_path):
    _, house, env = small
    for p in env.packages:
        place = tmp_path / "simple" / p; place.mkdir(parents=True)
        for w in house.glob("*.whl"):
            if w.name.split("-")[0].replace("_", "-").lower() == p: shutil.copy(w, place)
    for place in (tmp_path / "simple").iterdir():
        import hashlib
        (place / "index.html").write_text("".join(f'<a href="{w.name.replace("+", "%2B")}#sha256={hashlib.sha256(w.read_bytes()).hexdigest()}">{w.name}</a>' for w in place.glob("*.whl")))
    handler = type("Handler", (Index,), {"ranges": request.param})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", request.param
    server.shutdown()


def test_index_without_a_wheelhouse(small, index, monkeypatch):
    """Hashes are proved over the network, without fetching whole wheels; where the server gives no parts, nothing is claimed."""
    _, _, env = small
    url, parts = index
    for k, v in {"PIP_INDEX_URL": url + "/simple", "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "0", "PIP_FIND_LINKS": ""}.items(): monkeypatch.setenv(k, v)
    made = restore(env, "requirements")
    assert made.proven == (4 if parts else 0), made.unproven
    lock = restore(env, "pylock")
    assert "127.0.0.1" not in lock.content and "packages = []" in lock.content  # a private index is written nowhere
    if parts: assert len(lock.unproven) == 4 and all("wheelhouse" in u.why for u in lock.unproven)


def test_wheelhouse_is_filled_from_the_index(small, index, monkeypatch, tmp_path):
    _, _, env = small
    for k, v in {"PIP_INDEX_URL": index[0] + "/simple", "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "0", "PIP_FIND_LINKS": ""}.items(): monkeypatch.setenv(k, v)
    made = restore(env, "pylock", wheelhouse=tmp_path / "filled", beside=tmp_path)
    assert made.proven == 4 and len(list((tmp_path / "filled").glob("*.whl"))) == 4 and 'path = "filled/' in made.content


def test_partial_reads(small, index):
    url, parts = index
    there = f"{url}/simple/alpha/alpha-1.0-py3-none-any.whl"
    assert (_record_at(there) == small[2].packages["alpha"].record) is parts
    assert _record_at("http://127.0.0.1:9/x.whl") is None and _record_at("ftp://x/y.whl") is None


def test_missing_package_spares_the_others(small, tmp_path, monkeypatch):
    _, house, env = small
    monkeypatch.setenv("PIP_NO_INDEX", "1"); monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    some = tmp_path / "some"; some.mkdir()
    for n in ("alpha", "gamma"): shutil.copy(next(house.glob(n + "*")), some)
    made = restore(env, "requirements", wheelhouse=some)
    assert made.proven == 2 and {u.name for u in made.unproven} == {"beta-two", "delta"}


def test_dockerfile_steps_work(tmp_path):
    """The commands that the Dockerfile gives for the code, run here: clone, checkout, patch; and they fail where the patch does not apply."""
    def git(*args, cwd): subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *args], cwd=cwd, check=True, capture_output=True)
    origin, work = tmp_path / "origin", tmp_path / "work"
    origin.mkdir(); git("init", "-q", "-b", "main", cwd=origin); (origin / "a.py").write_text("x = 1\n"); (origin / "b.bin").write_bytes(bytes(range(256))); git("add", ".", cwd=origin); git("commit", "-qm", "1", cwd=origin)
    git("clone", "-q", str(origin), str(work), cwd=tmp_path)
    (work / "a.py").write_text("x = 2\n"); (work / "b.bin").write_bytes(bytes(range(255, -1, -1)))
    env = capture(folder=work)
    made = dockerfile(env, [])
    made.save(tmp_path / "Dockerfile")
    steps = [line.removeprefix("RUN ") for line in made.content.splitlines() if line.startswith("RUN git")]
    assert len(steps) == 2 and "uncommitted.patch" in made.files and "USER runner" in made.content
    new = tmp_path / "new"; new.mkdir()
    for step in steps: subprocess.run(["bash", "-ec", step.replace("/tmp/uncommitted.patch", str(tmp_path / "uncommitted.patch"))], cwd=new, check=True, capture_output=True)
    assert (new / "a.py").read_text() == "x = 2\n" and (new / "b.bin").read_bytes() == bytes(range(255, -1, -1))
    again = subprocess.run(["bash", "-ec", steps[1].replace("/tmp/uncommitted.patch", str(tmp_path / "uncommitted.patch"))], cwd=new, capture_output=True)
    assert again.returncode != 0


@pytest.mark.parametrize("target", TARGETS)
def test_commands(small, tmp_path, target):
    folder, house, env = small
    fsdl = Path(sys.executable).parent / "fsdl-devinfra"
    done = run(fsdl, "env", "restore", folder / "env.json", "--to", target, "-o", tmp_path / "out", "--wheelhouse", house)
    assert (tmp_path / "out").exists() and ("4 packages pinned with proof" in done.stdout or target == "slurm")
    document = json.loads(run(fsdl, "env", "restore", folder / "env.json", "--to", target, "--wheelhouse", house, "--json").stdout)
    assert document["schema"] == "fsdl-devinfra/env-restore/1" and document["target"] == target
    if target == "slurm": subprocess.run(["bash", "-n", tmp_path / "out"], check=True)
