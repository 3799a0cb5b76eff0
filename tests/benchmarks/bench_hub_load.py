"""Loading a 2.2 GB sharded bf16 Llama-like model: ours against `AutoModelForCausalLM.from_pretrained`, warm cache.

Each run is a process forked from one that has done all imports, so only the load step counts. CPU seconds are those of the
load step (user + system, all threads). A run ends with a forward pass; the logits of both must be equal. Peak memory is VmHWM
after that pass, when every page has been read.
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


def measure(which: str, folder: str, dtype: str | None) -> dict:
    """One load in a forked process."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        import torch
        import transformers
        from fsdl_devinfra.hub.loading import load
        with open("/proc/self/clear_refs", "w") as f: f.write("5")  # the peak of this process from here on
        wall, cpu = time.perf_counter(), time.process_time()
        if which == "ours": model = load(folder, transformers.AutoModelForCausalLM, dtype=dtype)
        else: model = transformers.AutoModelForCausalLM.from_pretrained(folder, **({"dtype": getattr(torch, dtype)} if dtype else {}))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])
        with torch.no_grad(): logits = model.eval()(torch.arange(8)[None]).logits
        touched = sum(float(p.detach().view(-1)[::512].float().sum()) for p in model.parameters())
        peak = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
        os.write(write, json.dumps({"wall": wall, "cpu": cpu, "peak": peak, "logits": logits[0, -1, :5].float().tolist(), "sum": touched}).encode())
        os._exit(0)
    os.close(write); os.waitpid(child, 0)
    with os.fdopen(read) as f: return json.loads(f.read())


def rows() -> Iterator[dict]:
    folder = tempfile.mkdtemp(); subprocess.run([sys.executable, "-c", _MAKE, folder], check=True, capture_output=True)
    for file in Path(folder).glob("*.safetensors"): file.read_bytes()  # warm
    import transformers  # noqa: F401  imports are not part of the load step
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401
    transformers.utils.logging.disable_progress_bar()
    import fsdl_devinfra.hub.loading  # noqa: F401
    for dtype in (None, "float32"):
        runs = [(measure("ours", folder, dtype), measure("peer", folder, dtype)) for _ in range(RUNS)]
        for ours, peer in runs: assert ours["logits"] == peer["logits"] and ours["sum"] == peer["sum"]
        def middle(key: str) -> tuple[float, float]: return tuple(statistics.median(r[i][key] for r in runs) for i in (0, 1))
        for key in ("cpu", "wall"):
            mine, theirs = middle(key)
            yield {"name": f"load 2.2 GB bf16 as {dtype or 'bfloat16'}, {key} seconds", "ours_s": mine, "peer_s": theirs, "ratio": theirs / mine,
                   "spread": [min(p[key] / o[key] for o, p in runs), max(p[key] / o[key] for o, p in runs)],
                   "note": "peak MB after a forward: ours {:.0f}, transformers {:.0f}".format(*(v / 1e6 for v in middle("peak")))}


if __name__ == "__main__":
    for row in rows(): print(json.dumps(row))
