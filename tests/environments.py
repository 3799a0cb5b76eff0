"""Environments of their own for launchers that cannot, or need not, live in the one that runs the tests."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / ".venv-launchers"
LIMIT = 420  # seconds for one installation


def own_environment(name: str, *requirements: str, inherit: bool = False, env: dict[str, str] | None = None) -> Path:
    """The bin folder of an environment with these packages, made once; skips with pip's last words where that is impossible.

    `inherit`: it also sees the packages of the environment that runs the tests, so that torch is not installed twice.
    """
    home = FOLDER / name
    done, python = home / ".done", home / "bin" / "python"
    wanted = "\n".join(requirements)
    if done.is_file() and done.read_text() == wanted: return python.parent
    try: _make(home, requirements, inherit, env or {})
    except (subprocess.SubprocessError, OSError) as e:
        pytest.skip(f"no environment with {name} can be made here: {' '.join(str(getattr(e, 'stderr', None) or e).strip().splitlines()[-1:])[:200]}")
    done.write_text(wanted)
    return python.parent


def _make(home: Path, requirements: tuple[str, ...], inherit: bool, env: dict[str, str]) -> None:
    def run(*words: object) -> None: subprocess.run([str(w) for w in words], check=True, capture_output=True, text=True, timeout=LIMIT, env=os.environ | env)
    run(sys.executable, "-m", "venv", "--clear", home)
    packages = home / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    if inherit:
        import site
        (packages / "inherited.pth").write_text("".join(f"import site; site.addsitedir({p!r})\n" for p in [*site.getsitepackages(), str(Path(__file__).resolve().parents[1])]))
    run(home / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *(["--no-build-isolation"] if inherit else []), *requirements)
