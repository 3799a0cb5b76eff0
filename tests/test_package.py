"""What people install: sdist and wheel, built from a clean copy, and the wheel in an environment that has nothing else."""
from __future__ import annotations

import email
import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, copy_checkout, settings

pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path, ok: bool = True, timeout: int = 900) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
    assert not ok or done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """sdist, and a wheel made from that sdist: what a packager does."""
    copy, dist = copy_checkout(tmp_path_factory.mktemp("checkout")), tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", dist, copy, cwd=copy)
    return next(dist.glob("*.tar.gz")), next(dist.glob("*.whl"))


def test_contents(built):
    sdist, wheel = built
    names = zipfile.ZipFile(wheel).namelist()
    for needed in ("fsdl_devinfra/py.typed", "fsdl_devinfra/models/digits/model.safetensors", "fsdl_devinfra/models/digits.lock.json",
                   "fsdl_devinfra/schemas/env.1.json", "fsdl_devinfra/hub/__init__.py"): assert needed in names, needed
    assert not [n for n in names if n.startswith(("tests/", "nbs/"))]
    packed = {n.split("/", 1)[-1] for n in tarfile.open(sdist).getnames()}
    assert {"settings.ini", "README.md", "LICENSE", "setup.py", "pyproject.toml"} <= packed


def test_metadata_is_what_settings_say(built):
    archive, said = zipfile.ZipFile(built[1]), settings()
    metadata = email.message_from_bytes(archive.read(next(n for n in archive.namelist() if n.endswith("METADATA"))))
    assert (metadata["Name"], metadata["Version"], metadata["Requires-Python"]) == (said["lib_name"], said["version"], ">=3.11")
    assert metadata["License-Expression"] == "Apache-2.0" or "Apache" in (metadata["License"] or "")
    plain = [r.split(";")[0].strip() for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert sorted(plain) == sorted(l.strip() for l in said["requirements"].splitlines() if l.strip())
    assert set(metadata.get_all("Provides-Extra")) == {k.removesuffix("_extra").replace("_", "-") for k in said if k.endswith("_extra")}
    scripts = archive.read(next(n for n in archive.namelist() if n.endswith("entry_points.txt"))).decode()
    assert "fsdl-devinfra = fsdl_devinfra.cli:main" in scripts.replace("=", " = ").replace("  ", " ")
    assert metadata.get_payload().lstrip().startswith(("<!--", "# fsdl-devinfra"))


def environment(folder: Path, wheel: Path, extras: str = "") -> Path:
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", ROOT / "constraints-dev.txt", f"{wheel}{extras}", cwd=folder)
    return python


def test_bare_wheel_runs_what_needs_no_tensors(built, tmp_path):
    python = environment(tmp_path / "bare", built[1])
    command = tmp_path / "bare" / "bin" / "fsdl-devinfra"
    assert run(command, "--version", cwd=tmp_path).stdout.strip() == f"fsdl-devinfra {settings()['version']}"
    done = run(command, "preflight", "--json", "-o", tmp_path / "out", cwd=tmp_path, ok=False)
    steps = {s["name"]: s for s in json.loads(done.stdout)["steps"]}
    assert done.returncode == 2, done.stderr
    assert {n for n, s in steps.items() if s["verdict"] == "pass"} == {"inspect", "lock", "memory", "environment"}, steps
    for name, line in {"load": "fsdl-devinfra[torch]", "export": "fsdl-devinfra[torch,onnx]", "parity": "fsdl-devinfra[torch,onnx]"}.items():
        assert steps[name]["verdict"] == "not-run" and f"pip install '{line}'" in steps[name]["summary"]
    for argv in (["hub", "inspect"], ["memory", "--gpu", "h100"], ["env", "capture"]): run(command, *argv, cwd=tmp_path)
    fastcore = run(python, "-c", "import fastcore; print(fastcore.__version__)", cwd=tmp_path).stdout
    assert int(fastcore.split(".")[0]) >= 2, "a user's install takes the newest fastcore"


def test_wheel_with_torch_and_onnx_runs_the_whole_way(built, tmp_path):
    environment(tmp_path / "full", built[1], "[torch,onnx]")
    done = run(tmp_path / "full" / "bin" / "fsdl-devinfra", "preflight", "--json", "-o", tmp_path / "out", cwd=tmp_path)
    assert json.loads(done.stdout)["verdict"] == "pass"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["env.json", "model.lock.json", "model.onnx", "report.html", "report.json"]
