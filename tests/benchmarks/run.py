"""Every benchmark, ours and its peer in turn: one row each (ours, peer, ratio, spread).

A benchmark is a file `bench_*.py` here with a function `rows()` that yields dictionaries with `name`, `ours_s`, `peer_s`,
`ratio` (peer / ours: above 1 we are faster), `spread` (relative, largest minus smallest over median) and `note`. It must
check that both did the same work before it says how long they took.

    python tests/benchmarks/run.py [NAME …] [--json FILE]
"""
from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="only files whose name contains one of these")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    files = [f for f in sorted(HERE.glob("bench_*.py")) if not args.names or any(n in f.stem for n in args.names)]
    found, failed = [], 0
    print(f"{'benchmark':<52}{'ours':>10}{'peer':>10}{'ratio':>8}{'spread':>8}  note")
    for file in files:
        try:
            for row in load(file).rows():
                found.append(row)
                cells = [f"{row[k]:.3g}" if isinstance(row.get(k), (int, float)) else "-" for k in ("ours_s", "peer_s", "ratio", "spread")]
                print(f"{row['name']:<52}" + "".join(f"{c:>{w}}" for c, w in zip(cells, (10, 10, 8, 8))) + f"  {row.get('note', '')}", flush=True)
        except Exception:
            failed += 1
            print(f"{file.name}: could not be measured\n{traceback.format_exc()}", file=sys.stderr)
    if args.json: args.json.write_text(json.dumps(found, indent=2) + "\n")
    return bool(failed) or not files


if __name__ == "__main__":
    sys.exit(main())
