"""Inspecting a repository of 200 shards: ours against the official client's `get_safetensors_metadata`, at two latencies.

The server runs in a process of its own. Both clients run in this process, in turns; imports are done before, and each
begins without connections. Their CPU seconds are noted as well: on a machine that does other work, they change less
than the wall time does.
"""
from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

SHARDS, LAYERS, RUNS = 200, 8, 5
TESTS = str(Path(__file__).resolve().parents[1])
_SERVER = """
import sys
from fsdl_devinfra.hub.server import listen, uvicorn_server
sys.path.insert(0, sys.argv[3])
from hub_server import Fault, FaultyHub
hub = FaultyHub(sys.argv[1], faults=[Fault("slow", "*", float(sys.argv[2]))] if float(sys.argv[2]) else [])
for repo in hub.shelf.repos(): hub.shelf.at(repo, "main")   # hash before the clock runs
sock = listen("127.0.0.1", 0); print(sock.getsockname()[1], flush=True)
uvicorn_server(hub, "127.0.0.1", 0).run(sockets=[sock])
"""


def make_repo(folder: Path) -> None:
    """200 shards with the headers of a real model (72 tensors each) and no weights to speak of."""
    folder.mkdir(parents=True)
    weight_map = {}
    for i in range(SHARDS):
        name, at, header = f"model-{i + 1:05}-of-{SHARDS:05}.safetensors", 0, {"__metadata__": {"format": "pt"}}
        for layer in range(LAYERS):
            for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
                         "input_layernorm", "post_attention_layernorm"):
                tensor = f"model.layers.{i * LAYERS + layer}.{part}.weight"; weight_map[tensor] = name
                header[tensor] = {"dtype": "BF16", "shape": [16, 64], "data_offsets": [at, at + 2048]}; at += 2048
        text = json.dumps(header, separators=(",", ":")).encode()
        (folder / name).write_bytes(struct.pack("<Q", len(text)) + text + bytes(at))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')


@contextlib.contextmanager
def served(folder: Path, latency: float) -> Iterator[str]:
    process = subprocess.Popen([sys.executable, "-c", _SERVER, str(folder), str(latency), TESTS], stdout=subprocess.PIPE, text=True)
    try: yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally: process.kill(); process.wait()


def rows() -> Iterator[dict]:
    before = os.environ.copy()
    with tempfile.TemporaryDirectory() as folder:
        import huggingface_hub.constants as constants
        cache, constants.HF_HUB_CACHE = constants.HF_HUB_CACHE, f"{folder}/home/hub"  # somebody may have imported it before
        try: yield from _rows(Path(folder))
        finally: constants.HF_HUB_CACHE = cache; os.environ.clear(); os.environ.update(before)


def _rows(folder: Path) -> Iterator[dict]:
    os.environ |= {"HF_HOME": str(folder / "home"), "HF_HUB_CACHE": str(folder / "home" / "hub"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    from huggingface_hub import HfApi
    from huggingface_hub.utils import close_session, disable_progress_bars

    from fsdl_devinfra.hub.checkpoint import inspect
    from fsdl_devinfra.hub.server import LoopbackHub
    disable_progress_bars()
    shelf = folder / "shelf"; make_repo(shelf / "org" / "wide")

    def ours(url: str) -> int:
        os.environ["HF_ENDPOINT"] = url
        return inspect("org/wide").tensors.count

    def peer(url: str) -> int:
        found = HfApi(endpoint=url).get_safetensors_metadata("org/wide")
        return sum(len(f.tensors) for f in found.files_metadata.values())

    def timed(function, url: str) -> tuple[float, float]:
        """Seconds of the wall's clock and of this process's CPU."""
        shutil.rmtree(folder / "home", ignore_errors=True); close_session()
        start, cpu = time.perf_counter(), time.process_time(); count = function(url)
        took = time.perf_counter() - start, time.process_time() - cpu
        assert count == SHARDS * LAYERS * 9, count
        return took

    with LoopbackHub(shelf) as hub:
        ours(hub.url); our_bytes = hub.sent(); hub.seen.clear()
        peer(hub.url); peer_bytes = hub.sent()
    for latency in (0.1, 0.02):
        with served(shelf, latency) as url:
            times = [(timed(ours, url), timed(peer, url)) for _ in range(RUNS)]
        mine, theirs = (statistics.median(wall for wall, _ in t) for t in zip(*times))
        cpu = [statistics.median(seconds for _, seconds in t) for t in zip(*times)]
        ratios = [p[0] / o[0] for o, p in times]
        yield {"name": f"inspect 200 shards at {latency * 1000:.0f} ms", "ours_s": mine, "peer_s": theirs, "ratio": theirs / mine,
               "spread": (max(ratios) - min(ratios)) / statistics.median(ratios),
               "note": f"ratio from {min(ratios):.2f} to {max(ratios):.2f}; CPU seconds of the client: ours {cpu[0]:.2f}, "
                       f"get_safetensors_metadata {cpu[1]:.2f}; bytes of files: ours {our_bytes}, get_safetensors_metadata {peer_bytes}; "
                       f"load average {os.getloadavg()[0]:.1f}"}


if __name__ == "__main__":
    for row in rows(): print(json.dumps(row))
