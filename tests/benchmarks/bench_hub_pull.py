"""Pulling 1 GB in four shards from a loopback Hub: ours, hash check included, against `snapshot_download`, in turns."""
from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

RUNS, SHARDS, SHARD_BYTES = 5, 4, 256 * 2**20
_SERVER = """
import sys
from fsdl_devinfra.hub.server import Hub, RepositoryFolder, listen, uvicorn_server
hub = Hub(RepositoryFolder(sys.argv[1]))
for repo in hub.shelf.repos(): hub.shelf.at(repo, "main")   # hash before the clock runs
sock = listen("127.0.0.1", 0); print(sock.getsockname()[1], flush=True)
uvicorn_server(hub, "127.0.0.1", 0).run(sockets=[sock])
"""


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    process = subprocess.Popen([sys.executable, "-c", _SERVER, str(folder)], stdout=subprocess.PIPE, text=True)
    try: yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally: process.kill(); process.wait()


def rows() -> Iterator[dict]:
    before = os.environ.copy()
    with tempfile.TemporaryDirectory() as folder:
        try: yield from _rows(Path(folder))
        finally: os.environ.clear(); os.environ.update(before)


def _rows(folder: Path) -> Iterator[dict]:
    cache = folder / "home" / "hub"
    os.environ |= {"HF_HOME": str(folder / "home"), "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    from fsdl_devinfra.hub.locks import lock
    from fsdl_devinfra.hub.pulling import pull
    disable_progress_bars()
    shelf = folder / "shelf"; repo = shelf / "org" / "big"; repo.mkdir(parents=True); (repo / "config.json").write_text("{}")
    for i in range(SHARDS): (repo / f"model-{i + 1:05}-of-{SHARDS:05}.safetensors").write_bytes(os.urandom(2**20) * (SHARD_BYTES // 2**20))
    with served(shelf) as url:
        os.environ["HF_ENDPOINT"] = url; locked = lock("org/big")

        def timed(function) -> float:
            shutil.rmtree(cache, ignore_errors=True); os.sync()
            start = time.perf_counter(); folder = Path(function()); took = time.perf_counter() - start
            assert sum(f.stat().st_size for f in folder.glob("*.safetensors")) == SHARDS * SHARD_BYTES
            return took
        times = [(timed(lambda: pull(locked)), timed(lambda: snapshot_download("org/big", endpoint=url, cache_dir=cache))) for _ in range(RUNS)]
    mine, theirs = (statistics.median(t) for t in zip(*times))
    ratios = [p / o for o, p in times]
    yield {"name": "pull 1 GB from loopback", "ours_s": mine, "peer_s": theirs, "ratio": theirs / mine, "spread": (max(ratios) - min(ratios)) / statistics.median(ratios),
           "note": f"ratio from {min(ratios):.2f} to {max(ratios):.2f}; ours checks SHA-256 of every byte and flushes files to the disk; the official client checks sizes"}


if __name__ == "__main__":
    for row in rows(): print(json.dumps(row))
