"""Run every notebook, and make sure that every notebook ran.

`nbdev_test` exits 0 when its filter matches nothing. So the notebooks are counted here: as many must report success
as there are files. It also fails a notebook that takes longer than it may, because nbdev 2 knows no time limit.

    python tests/run_notebooks.py [--slow] [--nbdev3] [PATH]
"""
from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ALL_FLAGS = "slow gpu network"


def notebooks(path: Path) -> list[Path]:
    files = [path] if path.is_file() else sorted(path.rglob("*.ipynb"))
    return [f for f in files if not any(part.startswith((".", "_")) for part in f.relative_to(ROOT).parts)]


def has_slow_cell(notebook: Path) -> bool:
    return "#| slow" in notebook.read_text(encoding="utf-8")


def run(notebook: Path, slow: bool, nbdev3: bool, limit: int) -> tuple[bool, float, str]:
    """One notebook in one process: nothing leaks from one to the next."""
    flags = "slow" if slow else ""
    tool = Path(sys.executable).parent / ("nbdev-test" if nbdev3 else "nbdev_test")
    where = [str(notebook)] if nbdev3 else ["--path", str(notebook)]
    command = [str(tool), *where, "--n_workers" if not nbdev3 else "--n-workers", "0", *(["--flags", flags] if flags else [])]
    start = time.monotonic()
    env = os.environ | {"MPLBACKEND": "agg", "FSDL_DEVINFRA_NOTEBOOK_TEST": "1"}
    try: done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired as e: return False, limit, f"took more than {limit} s\n{e.stderr or ''}"
    output = done.stdout + done.stderr
    ran = done.returncode == 0 and "Success" in output and "No files were eligible" not in output
    return ran, time.monotonic() - start, output


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", nargs="?", default=ROOT / "nbs", type=Path)
    parser.add_argument("--slow", action="store_true", help="only notebooks with slow cells, with these cells")
    parser.add_argument("--nbdev3", action="store_true")
    parser.add_argument("--limit", type=int, help="seconds a notebook may take")
    args = parser.parse_args()
    todo = [n for n in notebooks(args.path.resolve()) if not args.slow or has_slow_cell(n)]
    if not todo and not args.slow: print(f"no notebook at {args.path}"); return 1
    from concurrent.futures import ThreadPoolExecutor
    limit = args.limit or (1200 if args.slow else 600)
    failed = 0
    with ThreadPoolExecutor(max(1, min(os.cpu_count() or 1, 4))) as pool:
        for notebook, (ok, seconds, output) in zip(todo, pool.map(lambda n: run(n, args.slow, args.nbdev3, limit), todo)):
            print(f"{'ok  ' if ok else 'FAIL'} {seconds:6.1f} s  {notebook.relative_to(ROOT)}", flush=True)
            if not ok: failed += 1; print(output)
    print(f"{len(todo) - failed} passed, {failed} failed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
