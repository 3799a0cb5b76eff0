"""Loading a 2.2 GB sharded bf16 Llama-like model: ours against `AutoModelForCausalLM.from_pretrained`, warm cache.

Each run is a process forked from one that has done all imports, so only the load step counts. CPU seconds are those of the
load step (user + system, all threads). A run ends with a forward pass; the logits of both must be equal. Peak memory is VmHWM
after that pass, when every page has been read; the time to its end, load included, is a row of its own, because a mapped file
is read only then. `copy` is ours with `trust="copy"`: weights in memory of their own.

For the cast a third row says what is possible: `bare` makes no model, it only does `torch.empty(n, dtype=float32).copy_(mapped bf16)`
for the same bytes. Most of that is the system zeroing 4.4 GB of fresh pages, which every loader must pay. On a virtual machine
whose free memory goes back to its host, memory that was not used lately costs ten times more to touch, whoever touches it; the
runs are in turns, and the spread shows it.
"""
from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

RUNS = 5
_MAKE = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0); torch.set_default_dtype(torch.bfloat16)
config = LlamaConfig(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4, vocab_size=32000)
with torch.device("meta"): model = LlamaForCausalLM(config)
model.to_empty(device="cpu")
with torch.no_grad():
    for p in model.parameters(): p.normal_(0, 0.02)
model.save_pretrained(sys.argv[1], max_shard_size="500MB")
"""


def bare(folder: str) -> list:
    """The least that a cast must do: fresh memory, and the numbers in it."""
    import torch
    from fsdl_devinfra.hub.loading import Reader, weights_of
    weights = weights_of(folder); reader = Reader(weights)
    return [torch.empty(t.shape, dtype=torch.float32).copy_(reader.mapped(t)) for t in weights.tensors.values()]


def measure(which: str, folder: str, dtype: str | None) -> dict:
    """One load in a forked process."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        import torch
        import transformers
        from fsdl_devinfra.hub.loading import load
        with open("/proc/self/clear_refs", "w") as f: f.write("5")  # the peak of this process from here on
        wall, cpu = time.perf_counter(), time.process_time()
        if which == "bare": made = bare(folder)
        elif which != "peer": model = load(folder, transformers.AutoModelForCausalLM, dtype=dtype, trust="copy" if which == "copy" else "map")
        else: model = transformers.AutoModelForCausalLM.from_pretrained(folder, **({"dtype": getattr(torch, dtype)} if dtype else {}))
        began = wall
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        if which == "bare": os.write(write, json.dumps({"wall": wall, "cpu": cpu, "tensors": len(made)}).encode()); os._exit(0)
        assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])
        with torch.no_grad(): logits = model.eval()(torch.arange(8)[None]).logits
        first = time.perf_counter() - began
        touched = sum(float(p.detach().view(-1)[::512].float().sum()) for p in model.parameters())
        peak = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
        os.write(write, json.dumps({"wall": wall, "cpu": cpu, "first": first, "peak": peak, "logits": logits[0, -1, :5].float().tolist(), "sum": touched}).encode())
        os._exit(0)
    os.close(write); os.waitpid(child, 0)
    with os.fdopen(read) as f: return json.loads(f.read())


def rows() -> Iterator[dict]:
    with tempfile.TemporaryDirectory() as folder: yield from _rows(folder)


def _rows(folder: str) -> Iterator[dict]:
    subprocess.run([sys.executable, "-c", _MAKE, folder], check=True, capture_output=True)
    for file in Path(folder).glob("*.safetensors"): file.read_bytes()  # warm
    import transformers  # noqa: F401  imports are not part of the load step
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401
    transformers.utils.logging.disable_progress_bar()
    import fsdl_devinfra.hub.loading  # noqa: F401
    for dtype in (None, "float32"):
        who = ("ours", "peer", "copy") if dtype is None else ("ours", "peer", "bare")
        runs = [[measure(w, folder, dtype) for w in who] for _ in range(RUNS)]
        for ours, peer, *_ in runs: assert ours["logits"] == peer["logits"] and ours["sum"] == peer["sum"]
        def middle(i: int, key: str) -> float: return statistics.median(r[i][key] for r in runs)
        if dtype is None:
            for i, name in ((0, "to the first forward"), (2, "with trust=copy, to the first forward")):
                ratios = [r[1]["first"] / r[i]["first"] for r in runs]
                yield {"name": f"load 2.2 GB bf16 {name}, wall seconds", "ours_s": middle(i, "first"), "peer_s": middle(1, "first"), "ratio": middle(1, "first") / middle(i, "first"),
                       "spread": (max(ratios) - min(ratios)) / statistics.median(ratios), "note": f"ratio from {min(ratios):.2f} to {max(ratios):.2f}"}
        for key in ("cpu", "wall"):
            ratios = [r[1][key] / r[0][key] for r in runs]
            note = f"peak MB after a forward: ours {middle(0, 'peak') / 1e6:.0f}, transformers {middle(1, 'peak') / 1e6:.0f}; ratio from {min(ratios):.2f} to {max(ratios):.2f}"
            yield {"name": f"load 2.2 GB bf16 as {dtype or 'bfloat16'}, {key} seconds", "ours_s": middle(0, key), "peer_s": middle(1, key), "ratio": middle(1, key) / middle(0, key),
                   "spread": (max(ratios) - min(ratios)) / statistics.median(ratios), "note": note + (f"; bare copy_ {middle(2, key):.2f} s" if dtype else "")}


if __name__ == "__main__":
    for row in rows(): print(json.dumps(row))
