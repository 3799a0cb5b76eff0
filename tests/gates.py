"""Is the checkout what its notebooks say? Each gate runs its tool and fails if a tracked file changed.

    python tests/gates.py [--nbdev3]
"""
from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
SCHEMAS = [sys.executable, "-c", "from fsdl_devinfra.core.results import write_schemas; write_schemas()"]
GATES = {
    "notebooks are clean": ([str(BIN / "nbdev_clean")], "make export"),
    "the package is what the notebooks export": ([str(BIN / "nbdev_export")], "make export"),
    "the schemas are what the annotations say": (SCHEMAS, "make export"),
    "no name is undefined or unused": ([str(BIN / "ruff"), "check", "--quiet", "fsdl_devinfra", "tests", "setup.py"], "edit the notebook or the test"),
    "types hold (pyright, basic)": ([str(BIN / "pyright"), "--pythonpath", sys.executable, "fsdl_devinfra"], "edit the notebook"),
    "README.md is what nbs/index.ipynb says": ([sys.executable, "tests/make_readme.py"], "make export"),
}
GATES3 = {"nbdev 3 exports the same": ([str(BIN / "nbdev-export")], "look at the four conditions in CONTRIBUTING.md")}


def fingerprint() -> dict[str, str]:
    """Hashes of everything that git tracks or would track: also works on a tree with uncommitted work."""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True).stdout
    files = sorted(f for f in listed.decode().split("\0") if f and (ROOT / f).is_file())
    return {f: hashlib.sha256((ROOT / f).read_bytes()).hexdigest() for f in files}


def main() -> int:
    failed = 0
    for name, (command, hint) in (GATES3 if "--nbdev3" in sys.argv else GATES).items():
        before = fingerprint()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        after = fingerprint()
        changed = sorted(f for f in before.keys() | after.keys() if before.get(f) != after.get(f))
        ok = done.returncode == 0 and not changed
        print(f"{'ok  ' if ok else 'FAIL'} {name}")
        if not ok: failed += 1; print(f"     changed: {changed[:10]}; hint: {hint}\n{done.stdout}{done.stderr}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
