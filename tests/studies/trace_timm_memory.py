"""Traced device memory of image models against published measurements: python tests/studies/trace_timm_memory.py --seed 1 [--models 40] [--half held-out]

Needs timm and torchvision. Models are split by a hash of their name: mechanisms were looked for in the development half only."""
from __future__ import annotations

import argparse
import csv
import hashlib
import json
import random
import statistics
import time
from pathlib import Path

from fsdl_devinfra.core.device_table import find_device
from fsdl_devinfra.trace.allocator import replay
from fsdl_devinfra.trace.cuda import context_bytes
from fsdl_devinfra.trace.naming import named_inputs, named_module
from fsdl_devinfra.trace.reading import has_convolutions, ranged
from fsdl_devinfra.trace.steps import StepOptions, record_step

ROWS = Path(__file__).resolve().parents[1] / "data" / "ground_truth" / "timm_memory.csv"
GPU = "A100-SXM-40GB"
HALVES = ("development", "held-out")
MIB = 1 << 20


def half_of(model: str) -> str:
    return HALVES[hashlib.sha256(model.encode()).digest()[0] % 2]


def scored_rows(half: str) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for row in csv.DictReader(ROWS.open(encoding="utf-8")):
        if row["scored"] == "1" and half_of(row["model"]) == half: found.setdefault(row["model"], []).append(row)
    return found


def judged(module, model: str, row: dict) -> dict:
    "One row: what was said, its range, and the errors beside those of FakeTensor."
    started = time.process_time()
    trace = record_step(module, named_inputs(module, int(row["batch"])), StepOptions(optimizer="sgd-timm", prefetch=True, gpu=GPU), name=model, steps=3)
    context = context_bytes(GPU, has_convolutions(trace))
    done = replay(trace, limit=find_device(GPU).memory_bytes - context)
    said, measured = ranged(trace, done, context), float(row["measured_mib"]) * MIB
    return {"model": model, "batch": int(row["batch"]), "measured_mib": round(measured / MIB), "said_mib": round(said.value / MIB),
            "error": abs(said.value / measured - 1), "fake_error": abs(float(row["fake_tensor_mib"]) * MIB / measured - 1),
            "in_range": said.low <= measured <= said.high, "width": (said.high - said.low) / said.value,
            "ran_out": done.out_of_memory is not None, "seconds": round(time.process_time() - started, 2)}


def summary(found: list[dict]) -> dict:
    def centile(key, share): return sorted(r[key] for r in found)[min(len(found) - 1, int(share * len(found)))]
    return {"rows": len(found), "median": statistics.median(r["error"] for r in found), "p90": centile("error", 0.9),
            "in_range": sum(r["in_range"] for r in found) / len(found), "median_width": statistics.median(r["width"] for r in found),
            "narrow_and_in_range": sum(r["in_range"] and r["width"] <= 0.15 for r in found) / len(found),
            "fake_median": statistics.median(r["fake_error"] for r in found), "fake_p90": centile("fake_error", 0.9),
            "median_ratio": statistics.median(r["said_mib"] / r["measured_mib"] for r in found), "too_low": sum(r["said_mib"] < r["measured_mib"] for r in found),
            "ran_out": sum(r["ran_out"] for r in found), "seconds_median": statistics.median(r["seconds"] for r in found)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--models", type=int, default=40)
    parser.add_argument("--half", choices=HALVES, default="held-out")
    parser.add_argument("--batches", type=int, nargs="*", help="only these [all]")
    parser.add_argument("--minutes", type=float, default=60)
    args = parser.parse_args()
    rows, found, end = scored_rows(args.half), [], time.monotonic() + 60 * args.minutes
    names = sorted(rows)
    random.Random(args.seed).shuffle(names)
    for model in names[:args.models]:
        if time.monotonic() > end: break
        try: module = named_module(f"timm:{model}")
        except Exception as error:  # noqa: BLE001 - a model of another version of timm
            print(json.dumps({"model": model, "not_built": str(error)[:200]}), flush=True)
            continue
        for row in rows[model]:
            if args.batches and int(row["batch"]) not in args.batches: continue
            try: found.append(judged(module, model, row))
            except Exception as error:  # noqa: BLE001 - said, and counted as no answer
                print(json.dumps({"model": model, "no_answer": str(error)[:200]}), flush=True)
                continue
            print(json.dumps(found[-1]), flush=True)
    print(json.dumps(summary(found), indent=1))


if __name__ == "__main__": main()
