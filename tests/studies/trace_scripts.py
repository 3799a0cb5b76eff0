"""Whole scripts under `dryrun` against peaks that their authors published: python tests/studies/trace_scripts.py --seed 1 [--json rows.json] [--only timm]

Each row of `script_peaks.csv` names a script of `scripts/`, written after the one that was measured, its arguments and the GPU. Needs what the
scripts import (timm, torchvision, transformers, accelerate, lightning, torchmetrics, peft); a row whose library is missing is named as such.
With --json the same command goes on where it was stopped. No constant was fitted to these rows."""
from __future__ import annotations

import argparse
import csv
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ROWS = HERE.parent / "data" / "ground_truth" / "script_peaks.csv"
MIB = 1 << 20


def rows(seed: int, only: str = "") -> list[dict[str, str]]:
    "The published rows in an order of their own for each seed."
    found = [row for row in csv.DictReader(ROWS.open(encoding="utf-8")) if only in row["id"]]
    random.Random(seed).shuffle(found)
    return found


def answer(row: dict[str, str], seconds: float) -> dict:
    "The document of a dry run in an empty folder."
    told = [sys.executable, "-m", "fsdl_devinfra", "dryrun", "--json", "--gpu", row["gpu"], "--as", row["as"], "--",
            str(HERE / "scripts" / row["script"]), *row["arguments"].split()]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(told, capture_output=True, text=True, cwd=folder, timeout=seconds, env=os.environ | {"PYTHONPATH": path})
        except subprocess.TimeoutExpired: return {"error": f"no answer in {seconds:.0f} s"}
    try: return json.loads(done.stdout)
    except ValueError: return {"error": done.stderr.strip()[-300:]}


def judged(row: dict[str, str], document: dict, seconds: float) -> dict:
    "What was said beside what was measured."
    kept = {"id": row["id"], "measured_mib": float(row["measured_mib"]), "seconds": round(seconds)}
    if "error" in document: return kept | {"no_answer": document["error"]}
    said = document[f"{row['as']}_bytes"]
    value = said["value"] / MIB
    rounding = float(row["rounding_mib"] or 0)
    beyond = max(abs(value - kept["measured_mib"]) - rounding, 0.0)
    held = said["low"] / MIB - rounding <= kept["measured_mib"] <= said["high"] / MIB + rounding
    return kept | {"said_mib": round(value), "error": beyond / kept["measured_mib"], "ratio": round(value / kept["measured_mib"], 3),
                   "in_range": held, "fits": document["fits"]}


def summary(found: list[dict]) -> dict:
    answered = [row for row in found if "error" in row]
    errors = sorted(row["error"] for row in answered)
    if not errors: return {"rows": len(found), "answered": 0}
    return {"rows": len(found), "answered": len(errors), "median": round(statistics.median(errors), 4), "p90": round(errors[int(0.9 * len(errors))], 4),
            "in_range": round(sum(row["in_range"] for row in answered) / len(errors), 3), "ran_and_fits": sum(row["fits"] != "no" for row in answered)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1, help="order of the rows")
    parser.add_argument("--only", default="", help="rows with this in their id")
    parser.add_argument("--json", type=Path, help="rows are kept here, and not run again")
    parser.add_argument("--minutes", type=float, default=60)
    args = parser.parse_args()
    found = json.loads(args.json.read_text()) if args.json and args.json.exists() else []
    known, end = {row["id"] for row in found}, time.monotonic() + 60 * args.minutes
    for row in rows(args.seed, args.only):
        if row["id"] in known: continue
        if time.monotonic() > end: break
        started = time.monotonic()
        document = answer(row, max(end - started, 60))
        found.append(judged(row, document, time.monotonic() - started))
        print(json.dumps(found[-1]), flush=True)
        if args.json: args.json.write_text(json.dumps(found, indent=1))
    shown = [row for row in found if args.only in row["id"]]
    print(json.dumps(summary(shown)))
    for kind in sorted({row["id"].split("-")[0] for row in shown}):
        print(kind, json.dumps(summary([row for row in shown if row["id"].startswith(kind)])))


if __name__ == "__main__": main()
