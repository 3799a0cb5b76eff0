"""Measure on one GPU what the memory room estimates: 43 configurations, the three peaks of each, as rows of the ground truth.

    python tests/gpu/measure_memory.py -o tests/data/measured_h100.csv [--seconds 540]

Each configuration runs in a process of its own. Rows are written as they come, and a second call goes on where the first one
stopped, so that a machine that is lent for minutes is enough. Without a GPU it runs the same steps of tiny models on the CPU,
which shows that it works and nothing about a GPU; such rows are not scored.
"""
from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from fsdl_devinfra.core.errors import CheckError  # noqa: E402
from fsdl_devinfra.memory import Architecture, Strategy, Workload, estimate  # noqa: E402
from fsdl_devinfra.memory.measure import COLUMNS, measure, rows_of  # noqa: E402

GIB = 2**30
MEASURES = {"peak allocated bytes": "allocated", "peak reserved bytes": "reserved", "nvidia-smi style used bytes": "device"}


def llama(hidden: int, ffn: int, layers: int, heads: int, kv: int, vocab: int = 32000) -> dict:
    return dict(model_type="llama", hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv, vocab_size=vocab, max_position_embeddings=32768)


MODELS = {
    "llama-0.3b": llama(1024, 2816, 16, 16, 16), "llama-1b": llama(2048, 5632, 22, 32, 4), "llama-1b-128k": llama(2048, 8192, 16, 32, 8, 128256),
    "llama-3b": llama(3072, 8192, 28, 24, 8, 128256), "llama-8b": llama(4096, 14336, 32, 32, 8, 128256),
    "bert-large": dict(model_type="bert", hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, vocab_size=30522, max_position_embeddings=512, type_vocab_size=2,
                       hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    "vit-large": dict(model_type="vit", hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=224, patch_size=16, num_channels=3, hidden_dropout_prob=0.0,
                      attention_probs_dropout_prob=0.0, architectures=["ViTForImageClassification"]),
}
#: model, sequence, micro-batch, strategy
RUNS: list[tuple[str, int, int, dict]] = [
    *(("llama-0.3b", 2048, b, {}) for b in (1, 4, 8)), *(("llama-0.3b", n, 1, {}) for n in (512, 4096, 8192)),
    *(("llama-0.3b", 2048, 4, dict(precision=p)) for p in ("fp32", "fp16-mixed", "bf16")), *(("llama-0.3b", 2048, 8, dict(recompute=r)) for r in ("selective", "full")),
    *(("llama-0.3b", 2048, 4, dict(optimizer=o)) for o in ("sgd", "none")), ("llama-0.3b", 2048, 8, dict(compile=True)), ("llama-0.3b", 2048, 8, dict(loss="chunked")),
    *(("llama-1b", 2048, b, {}) for b in (1, 4)), ("llama-1b", 2048, 4, dict(recompute="full")), ("llama-1b", 2048, 4, dict(precision="bf16")), ("llama-1b", 2048, 1, dict(precision="bf16", optimizer_in_backward=True)),
    ("llama-1b", 4096, 2, dict(lora_rank=8)), ("llama-1b", 4096, 2, dict(lora_rank=64, lora_targets="attention")), ("llama-1b", 4096, 2, dict(lora_rank=16, recompute="full", precision="bf16")), ("llama-1b", 2048, 4, dict(compile=True)),
    *(("llama-1b-128k", 2048, 2, dict(loss=how)) for how in ("full", "chunked")), ("llama-1b-128k", 8192, 1, dict(recompute="full")), ("llama-1b-128k", 4096, 2, dict(precision="bf16", loss="chunked", compile=True)),
    ("llama-3b", 2048, 1, {}), ("llama-3b", 2048, 2, dict(recompute="full")), ("llama-3b", 4096, 2, dict(precision="bf16")), ("llama-3b", 4096, 2, dict(precision="bf16", recompute="full", loss="chunked")),
    ("llama-3b", 4096, 2, dict(precision="bf16", recompute="full", optimizer_in_backward=True)), ("llama-3b", 4096, 2, dict(lora_rank=16, precision="bf16")),
    ("llama-8b", 2048, 1, dict(lora_rank=16, precision="bf16")), ("llama-8b", 8192, 1, dict(lora_rank=16, precision="bf16", recompute="full")), ("llama-8b", 2048, 1, dict(precision="bf16", recompute="full", optimizer_in_backward=True, optimizer="sgd")),
    *(("bert-large", 512, b, {}) for b in (8, 32)), ("bert-large", 512, 16, dict(precision="fp32")), *(("vit-large", 197, b, {}) for b in (16, 64)), ("vit-large", 197, 64, dict(recompute="full")),
]


def tiny(config: dict) -> dict:
    """The same model in the size of a test."""
    small = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=256)
    return config | small | (dict(num_key_value_heads=2) if "num_key_value_heads" in config else {}) | (dict(image_size=32) if "image_size" in config else {})


def driver() -> str:
    try: return subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, timeout=20).stdout.strip().splitlines()[0]
    except (OSError, IndexError, subprocess.TimeoutExpired): return ""


def name_of(model: str, seq: int, batch: int, changes: dict) -> str:
    return "-".join([model, f"s{seq}", f"b{batch}", *(f"{k}={v}" for k, v in changes.items())])


def main(argv: list[str] | None = None) -> int:
    import torch
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=3600, help="start no configuration after this many")
    parser.add_argument("--limit", type=int, default=len(RUNS), help="only the first so many")
    args = parser.parse_args(argv)
    gpu, start = torch.cuda.is_available(), time.monotonic()
    done = {r["id"].rsplit("#", 1)[0] for r in csv.DictReader(args.output.open())} if args.output.exists() else set()
    if not args.output.exists(): args.output.write_text(",".join(COLUMNS) + "\n")
    for model, seq, batch, changes in RUNS[:args.limit]:
        name = name_of(model, seq, batch, changes)
        if name in done: continue
        if time.monotonic() - start > args.seconds: print("out of time: call again to go on"); return 0
        config, w = (MODELS[model], Workload(seq, batch)) if gpu else (tiny(MODELS[model]), Workload(min(seq, 64), min(batch, 2)))
        s, a = Strategy(**changes), replace(Architecture.from_config(config), name=model)
        try: rows = rows_of(a, s, w, measure(config, s, w, timeout=300))
        except CheckError as e:
            said = estimate(a, s, w, measure="device").peak_bytes
            why = "out of memory" if "memory" in str(e).lower() else str(e)[:160]
            print(f"{name}: {why} (estimated {said.value / GIB:.2f} GiB)", flush=True)
            rows = [dict.fromkeys(COLUMNS, "") | dict(id=name, model=model, seq=seq, micro_batch=batch, meaning=why, scored=0)]
        for i, row in enumerate(rows):
            row |= dict(id=f"{name}#{i}", note=row["note"] + (f", driver {driver()}" if gpu else ""))
            if row["meaning"] in MEASURES:
                said = estimate(a, s, w, measure=MEASURES[row["meaning"]]).peak_bytes
                print(f"{name}: {MEASURES[row['meaning']]} {row['measured_gib']:.2f} GiB, estimated {said.value / GIB:.2f} ({said.value / GIB / row['measured_gib'] - 1:+.1%})", flush=True)
        with args.output.open("a", newline="") as file: csv.DictWriter(file, COLUMNS, lineterminator="\n").writerows(rows)
    print(f"{len(RUNS[:args.limit])} configurations are in {args.output.name}")
    return 0


if __name__ == "__main__": sys.exit(main())
