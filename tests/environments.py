"""Environments of their own for launchers that cannot, or need not, live in the one that runs the tests."""
from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / ".venv-launchers"
LIMIT = 420  # seconds for one installation


def own_environment(name: str, *requirements: str, inherit: bool = False, env: dict[str, str] | None = None, bare: tuple[str, ...] = ()) -> Path:
    """The bin folder of an environment with these packages, made once; skips with pip's last words where that is impossible.

    `inherit`: it also sees the packages of the environment that runs the tests, so that torch is not installed twice.
    `bare`: packages that are installed without what they ask for, because only a part of them is run.
    """
    home = FOLDER / name
    done, python = home / ".done", home / "bin" / "python"
    wanted = "\n".join((*requirements, *bare))
    if done.is_file() and done.read_text() == wanted: return python.parent
    try: _make(home, requirements, inherit, env or {}, bare)
    except (subprocess.SubprocessError, OSError) as e:
        pytest.skip(f"no environment with {name} can be made here: {' '.join(str(getattr(e, 'stderr', None) or e).strip().splitlines()[-1:])[:200]}")
    done.write_text(wanted)
    return python.parent


def _make(home: Path, requirements: tuple[str, ...], inherit: bool, env: dict[str, str], bare: tuple[str, ...] = ()) -> None:
    def run(*words: object) -> None: subprocess.run([str(w) for w in words], check=True, capture_output=True, text=True, timeout=LIMIT, env=os.environ | env)
    run(sys.executable, "-m", "venv", "--clear", "--without-pip", home)  # the pip that runs the tests installs into it
    packages = home / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    if inherit:
        import site
        (packages / "inherited.pth").write_text("".join(f"import site; site.addsitedir({p!r})\n" for p in [*site.getsitepackages(), str(Path(__file__).resolve().parents[1])]))
    pip = (sys.executable, "-m", "pip", "--python", home / "bin" / "python", "--disable-pip-version-check")
    if requirements: run(*pip, "install", "--quiet", "--no-compile", *(["--no-build-isolation"] if inherit else []), *requirements)
    if bare: run(*pip, "install", "--quiet", "--no-compile", "--no-deps", *bare)


@functools.cache
def digits_alone() -> tuple[float, ...]:
    """The losses of the digits trainer in one process, which every launcher has to repeat: run once for all of them."""
    from fsdl_devinfra.launch.job import DIGITS_SCRIPT
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "one.json"
        env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run([sys.executable, "-c", DIGITS_SCRIPT, "--out", str(out)], env=env, check=True, capture_output=True, timeout=240)
        return tuple(json.loads(out.read_text())["losses"])


def read_by_one(python: Path, target: str, cases: list[dict[str, str]]) -> list[str]:
    """What a launcher's loader says of each set of files ("" for nothing), with the loader imported once for all."""
    from fsdl_devinfra.launch.validation import LOADERS
    program = LOADERS[target][2]
    loop = f"""
import json, os, sys
said = []
for folder in {list(range(len(cases)))!r}:
    os.chdir(os.path.join(sys.argv[1], str(folder)))
    try: exec(compile({program!r}, "loader", "exec"), {{}}); said.append("")
    except (Exception, SystemExit) as e: said.append(repr(e)[:300])
print("SAID" + json.dumps(said))
"""
    with tempfile.TemporaryDirectory() as home:
        for i, files in enumerate(cases):
            (Path(home) / str(i)).mkdir()
            for path, text in files.items(): (Path(home) / str(i) / path).write_text(text, encoding="utf-8")
        done = subprocess.run([str(python), "-c", loop, home], capture_output=True, text=True, timeout=240)
    assert "SAID" in done.stdout, done.stderr[-2000:]
    return json.loads(done.stdout.rsplit("SAID", 1)[1])
