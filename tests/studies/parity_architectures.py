"""Architectures of Transformers through the command: a tiny random model in a folder, `onnx export` and `onnx check`.

python tests/studies/parity_architectures.py --seed 1 --count 60 --minutes 60 --json rows.json

The same command goes on where it was stopped.

The families are drawn from those whose tiny configuration can be built, saved and loaded; where one generates, the cache
is exported and compared as well (`--generation`). The verdicts are the command's own exit status.
"""
from __future__ import annotations

import argparse
import contextlib
import io
import json
import signal
import sys
import tempfile
import time
from collections import Counter
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import hub_zoo

from fsdl_devinfra.cli import main as command

GENERATES = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq")
STATUS = {0: "pass", 1: "fail", 2: "not checked"}


class TooLong(BaseException): "The family took more time than it may; not an exception that an exporter may catch."


def _stop(*_: Any) -> None: raise TooLong


def said(*arguments: str) -> tuple[int, str, str]:
    "(exit status, standard output, standard error) of the command."
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try: status = command(list(arguments))
        except SystemExit as e: status = int(e.code or 0)
    return status, out.getvalue(), err.getvalue()


def last_line(text: str) -> str:
    return next((line.strip()[:200] for line in text.splitlines() if line.strip()), "")


def checked(folder: Path, generation: bool) -> dict[str, Any]:
    "Export a model that lies in a folder, and check the file."
    target = folder / ("with-cache" if generation else "onnx")
    status, _, err = said("onnx", "export", str(folder), "-o", str(target), *(["--generation"] if generation else []))
    if status: return {"verdict": "not exported", "why": last_line(err)}
    status, out, err = said("onnx", "check", str(folder), str(target if generation else target / "model.onnx"), "--json")
    if not out.strip(): return {"verdict": STATUS.get(status, f"status {status}"), "why": last_line(err)}
    document = json.loads(out)
    outputs = [(o, c["notes"]) for c in document.get("cases", []) for o in c["outputs"]]
    worst, notes = max(outputs, key=lambda o: o[0]["ratio"], default=({}, []))
    why = next((f"{o['name']}: {o['why']}" for o, _ in outputs if o["verdict"] == "fail"), document.get("error", ""))
    said_why = why or "; ".join(c["kind"] for c in document.get("causes", [])) or "; ".join(map(str, document.get("notes", [])))[:200]
    return {"verdict": STATUS.get(status, f"status {status}"), "cases": len(document.get("cases", [])), "ratio": worst.get("ratio"),
            "why": said_why or ("; ".join(notes)[:200] if worst.get("ratio", 0) > 8 else "")}


def one(family: str, seed: int) -> dict[str, Any] | None:
    "One family, or None where no tiny model of it can be made."
    with tempfile.TemporaryDirectory() as room:
        folder = Path(room)
        try: auto = hub_zoo.made(family, seed, "float32", folder)
        except TooLong: raise
        except Exception: return None
        row = {"family": family, "class": auto.__name__, **checked(folder, generation=False)}
        if auto.__name__ not in GENERATES: return row
        cached = checked(folder, generation=True)
        return row | {"generation": cached["verdict"], "generation_why": cached["why"]}


def timed(family: str, seed: int, limit: int) -> dict[str, Any] | None:
    "The same within a time of the processor."
    started = time.process_time()
    signal.signal(signal.SIGPROF, _stop)
    signal.setitimer(signal.ITIMER_PROF, limit)
    try: row = one(family, seed)
    except TooLong: row = {"family": family, "verdict": f"not finished in {limit} s"}
    except Exception as e: row = {"family": family, "verdict": "crash", "why": f"{type(e).__name__}: {str(e)[:200]}"}
    finally: signal.setitimer(signal.ITIMER_PROF, 0)
    return None if row is None else row | {"processor_seconds": round(time.process_time() - started)}


def versions() -> dict[str, str]:
    "Of everything that decides a row."
    return {name: version(name) for name in ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")}


def begun(file: Path | None, seed: int) -> dict[str, Any]:
    "What a run that was stopped has found, if it was this one."
    empty = {"date": f"{date.today()}", "seed": seed, "versions": versions(), "rows": [], "not made": []}
    if file is None or not file.exists(): return empty
    there = json.loads(file.read_text())
    return there if (there["seed"], there["versions"]) == (seed, versions()) else empty


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--limit", type=int, default=300, help="seconds of the processor for one family")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no new family is begun after this time")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    hub_zoo.quiet()
    torch.set_num_threads(1)
    found = begun(args.json, args.seed)
    rows, gone = found["rows"], found["not made"]
    end = time.monotonic() + 60 * args.minutes
    for family in args.only or hub_zoo.families(args.seed):
        if len(rows) >= args.count or time.monotonic() > end: break
        if family in gone or any(r["family"] == family for r in rows): continue
        row = timed(family, args.seed, args.limit)
        if row is None: gone.append(family)
        else: rows.append(row)
        if row is not None: print(json.dumps(row), flush=True)
        if args.json: args.json.write_text(json.dumps(found, indent=1))
    counts = Counter(r["verdict"] for r in rows)
    print(f"seed {args.seed}: {len(rows)} architectures: {dict(counts)}")
    if counts["fail"] or counts["crash"]: sys.exit(1)


if __name__ == "__main__": main()
