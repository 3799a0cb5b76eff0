"""The largest training batch that fits, against the batches of timm's benchmark tables: python tests/studies/trace_timm_batch.py --seed 1 [--models 40] [--half held-out]

Needs timm and torchvision. timm's `benchmark.py` (July 2022, PyTorch 1.12, RTX 3090) starts from 512 images and takes the next step of its ladder
(timm/utils/decay_batch.py) as long as memory runs out: a row says that its batch fits and that the step above does not. Models are split by a hash of their name,
as in `trace_timm_memory.py`. No constant was fitted to these rows."""
from __future__ import annotations

import argparse
import csv
import json
import random
import time
from collections import Counter

from timm.layers import set_fused_attn
from trace_timm_memory import HALVES, half_of
from trace_timm_throughput import ROWS

from fsdl_devinfra.core.device_table import find_device
from fsdl_devinfra.trace.allocator import replay
from fsdl_devinfra.trace.cuda import context_bytes
from fsdl_devinfra.trace.naming import named_inputs, named_module
from fsdl_devinfra.trace.reading import at_batch, has_convolutions, ranged
from fsdl_devinfra.trace.steps import StepOptions, record_step

LADDER = (512, 384, 256, 192, 128, 96, 64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1)
PAIR = (8, 32)


def rows_of(half: str) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for row in csv.DictReader(ROWS.open(encoding="utf-8")):
        if row["mode"] == "train" and half_of(row["model"]) == half: found.setdefault(row["model"], []).append(row)
    return found


def step_of(row: dict):
    "What traces a step of so many images, as timm's `benchmark.py` ran it."
    size, options = int(row["img_size"]), StepOptions(precision="fp16-mixed", optimizer="sgd", channels_last=row["layout"] == "nhwc",
                                                  same_batch=True, pytorch_1=True, gpu=row["gpu"])
    module = named_module(f"timm:{row['model']}", size)
    return lambda batch: record_step(module, named_inputs(module, batch, size), options, name=row["model"], steps=3)


def largest(fits) -> int:
    "The first step of the ladder that fits: 0 if none does."
    low, high = 0, len(LADDER)  # steps before `low` do not fit
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(LADDER[middle]) else (middle + 1, high)
    return LADDER[low] if low < len(LADDER) else 0


def judged(row: dict) -> dict:
    "One row: the batch that the replay says, the one that surely fits, and how many steps the first lies off."
    started, step, device = time.process_time(), step_of(row), find_device(row["gpu"])
    small, large = map(step, PAIR)
    alike = small.events == large.events
    context = context_bytes(row["gpu"], has_convolutions(large))
    def at(batch: int): return at_batch(small, large, PAIR, batch) if alike else step(batch)
    def runs(batch: int) -> bool: return replay(at(batch), limit=device.memory_bytes - context).out_of_memory is None
    def surely(batch: int) -> bool: return ranged(at(batch), replay(at(batch)), context).high <= device.memory_bytes
    said, sure, measured = largest(runs), largest(surely), int(row["batch"])
    off = (LADDER + (0,)).index(measured) - (LADDER + (0,)).index(said)  # above zero: too large
    return {**{k: row[k] for k in ("model", "img_size", "layout")}, "measured": measured, "said": said, "sure": sure, "off": off, "alike": alike,
            "seconds": round(time.process_time() - started, 1)}


def summary(found: list[dict], unanswered: int) -> dict:
    steps = Counter(row["off"] for row in found)
    return {"rows": len(found), "no_answer": unanswered, "models": len({row["model"] for row in found}), "right": steps[0] / len(found),
            "one_step_off": (steps[1] + steps[-1]) / len(found), "steps_off": dict(sorted(steps.items())),
            "sure_ran": sum(row["sure"] <= row["measured"] for row in found) / len(found),
            "sure_right": sum(row["sure"] == row["measured"] for row in found) / len(found)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--models", type=int, default=40)
    parser.add_argument("--half", choices=HALVES, default="held-out")
    parser.add_argument("--minutes", type=float, default=40)
    args = parser.parse_args()
    set_fused_attn(False)  # PyTorch 1.12 has none
    rows, found, unanswered, end = rows_of(args.half), [], 0, time.monotonic() + 60 * args.minutes
    names = sorted(rows)
    random.Random(args.seed).shuffle(names)
    for model in names[:args.models]:
        if time.monotonic() > end: break
        for row in rows[model]:
            try: found.append(judged(row))
            except Exception as error:  # noqa: BLE001 - said, and counted as no answer
                print(json.dumps({"model": model, "no_answer": str(error)[:200]}), flush=True)
                unanswered += 1
                continue
            print(json.dumps(found[-1]), flush=True)
    print(json.dumps(summary(found, unanswered), indent=1))


if __name__ == "__main__": main()
