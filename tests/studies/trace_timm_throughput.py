"""Traced time of image models against timm's own benchmark tables: python tests/studies/trace_timm_throughput.py --seed 1 [--models 20] [--half held-out]

Needs timm and torchvision. Models are split by a hash of their name, as in `trace_timm_memory.py`. No constant was fitted to these rows."""
from __future__ import annotations

import argparse
import csv
import json
import os
import random
import statistics
import time
from collections import defaultdict
from itertools import combinations
from pathlib import Path

from timm.layers import set_fused_attn
from trace_timm_memory import HALVES, half_of

from fsdl_devinfra.core.device_table import find_device
from fsdl_devinfra.trace.naming import named_inputs, named_module
from fsdl_devinfra.trace.roofline import Card, step_time
from fsdl_devinfra.trace.steps import StepOptions, record_step

ROWS = Path(__file__).resolve().parents[1] / "data" / "ground_truth" / "timm_throughput.csv"


def rows_of(half: str) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for row in csv.DictReader(ROWS.open(encoding="utf-8")):
        if half_of(row["model"]) == half: found.setdefault(row["model"], []).append(row)
    return found


def traces(model: str, rows: list[dict]):
    """Each row with its trace; rows of one model, mode, size and layout with the same batch share it.

    timm's `benchmark.py` makes the optimizer `sgd`, which has momentum; the training rows are of PyTorch 1.12, which has no fused attention."""
    kept: dict[tuple, object] = {}
    for row in rows:
        size, batch, train = int(row["img_size"]), int(row["batch"]), row["mode"] == "train"
        key = size, batch, train, row["layout"]
        if key not in kept:
            set_fused_attn(not train)
            module = named_module(f"timm:{model}", size)
            options = StepOptions(precision="fp16-mixed", optimizer="sgd", inference=not train, channels_last=row["layout"] == "nhwc")
            kept[key] = record_step(module, named_inputs(module, batch, size), options, name=model, steps=2 if train else 1)
        yield row, kept[key]


def judged(row: dict, trace) -> dict:
    card = Card(find_device(row["gpu"]), channels_last=row["layout"] == "nhwc", inference=row["mode"] == "infer")
    found = step_time(trace, card)
    said, measured = int(row["batch"]) / found.step.value, float(row["images_per_s"])
    by = {k: round(v / sum(found.by_kernel.values()), 2) for k, v in found.by_kernel.items()}
    return {**{k: row[k] for k in ("model", "gpu", "mode", "layout")}, "measured": measured, "said": round(said, 1), "error": abs(said / measured - 1),
            "ratio": round(said / measured, 3), "in_range": found.step.low <= int(row["batch"]) / measured <= found.step.high, "by": by}


def right_pairs(found: list[dict], same: tuple, other: str) -> float | None:
    "Share of pairs that differ in one thing alone and are ranked as measured."
    groups, right = defaultdict(list), []
    for row in found: groups[tuple(row[k] for k in same)].append(row)
    for group in groups.values():
        for a, b in combinations(group, 2):
            if a[other] != b[other]: right.append((a["said"] > b["said"]) == (a["measured"] > b["measured"]))
    return sum(right) / len(right) if right else None


def summary(found: list[dict]) -> dict:
    errors = sorted(r["error"] for r in found)
    return {"rows": len(found), "models": len({r["model"] for r in found}), "median": statistics.median(errors), "p90": errors[int(0.9 * len(errors))],
            "in_range": sum(r["in_range"] for r in found) / len(found), "median_ratio": statistics.median(r["ratio"] for r in found),
            "pairs_of_models": right_pairs(found, ("gpu", "mode", "layout"), "model"),
            "pairs_of_cards": right_pairs([r for r in found if r["mode"] == "infer"], ("model",), "gpu")}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--models", type=int, default=20)
    parser.add_argument("--half", choices=HALVES, default="held-out")
    parser.add_argument("--minutes", type=float, default=30)
    args = parser.parse_args()
    os.environ.setdefault("TIMM_FUSED_ATTN", "1")
    rows, found, end = rows_of(args.half), [], time.monotonic() + 60 * args.minutes
    names = sorted(rows)
    random.Random(args.seed).shuffle(names)
    for model in names[:args.models]:
        if time.monotonic() > end: break
        try:
            for row, trace in traces(model, rows[model]):
                found.append(judged(row, trace))
                print(json.dumps(found[-1]), flush=True)
        except Exception as error:  # noqa: BLE001 - said, and counted as no answer
            print(json.dumps({"model": model, "no_answer": str(error)[:200]}), flush=True)
    print(json.dumps(summary(found), indent=1))
    for mode in ("infer", "train"):
        part = [r for r in found if r["mode"] == mode]
        if part: print(mode, json.dumps(summary(part)))


if __name__ == "__main__": main()
