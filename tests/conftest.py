"""What all tests share: the command as a process, and a scratch copy of the embedded model."""
from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from pathlib import Path

import pytest

from chromium import browser  # noqa: F401  (a fixture)
from hub_files import one, write

ROOT = Path(__file__).resolve().parents[1]
DIGITS = ROOT / "fsdl_devinfra" / "models" / "digits"


# A background job starts with Ctrl-C ignored, and so would every process that a test interrupts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)


class Ran:
    """What a command printed, and its status."""

    def __init__(self, done: subprocess.CompletedProcess):
        self.status, self.out, self.err = done.returncode, done.stdout, done.stderr

    @property
    def json(self) -> dict:
        return json.loads(self.out)

    def sentence(self) -> str:
        """The error that a person sees: never a traceback."""
        assert "Traceback" not in self.out + self.err, self.err
        return self.err.strip().splitlines()[-1] if self.err.strip() else ""


@pytest.fixture
def cli():
    """Run `fsdl-devinfra ARGS…` as a process, offline."""

    def run(*args: object, cwd: Path | None = None, timeout: int = 240, env: dict[str, str] | None = None) -> Ran:
        command = [sys.executable, "-m", "fsdl_devinfra", *map(str, args)]
        clean = {k: v for k, v in os.environ.items() if k != "FSDL_DEVINFRA_TRACEBACK"} | {"HF_HUB_OFFLINE": "1"} | (env or {})
        return Ran(subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, timeout=timeout))

    return run


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """A copy of the embedded model that a test may damage."""
    return Path(shutil.copytree(DIGITS, tmp_path / "digits"))


HF_VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HF_HUB_DOWNLOAD_TIMEOUT", "HF_ENDPOINT")


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, and no setting of this machine's user."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for name in HF_VARIABLES: monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hub(request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_hub: None):
    """A Hub on the loopback address with `org/tiny`: the files that the test's module calls HUB_FILES, else a configuration and one tensor."""
    from hub_server import FaultyHub
    usual = {"config.json": {"model_type": "tiny"}, "model.safetensors": one(size=3000)}
    repo = write(tmp_path / "shelf" / "org" / "tiny", getattr(request.module, "HUB_FILES", usual))
    with FaultyHub(tmp_path / "shelf", redirect=True) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.repo = repo
        yield hub


def package_alone() -> Path:
    """A folder with the package and nothing else: the checkout itself also holds the metadata of an editable install."""
    folder = Path(tempfile.mkdtemp(prefix="package-alone-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "fsdl_devinfra").symlink_to(ROOT / "fsdl_devinfra")
    return folder


def settings() -> dict[str, str]:
    """What settings.ini says."""
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def copy_checkout(to: Path) -> Path:
    """The files that git knows or would add, as they are now, links as links."""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        source, target = ROOT / name, to / name
        if not source.is_file() and not source.is_symlink(): continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target, follow_symlinks=False)
    return to
