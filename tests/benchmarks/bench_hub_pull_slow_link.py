"""Pulling two files of 256 MiB over a link with 40 ms and 50 MB/s a stream: ours, every byte hashed, against `snapshot_download`, in turns."""
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

RUNS, FILES, FILE_BYTES = 5, 2, 256 * 2**20
TESTS = str(Path(__file__).resolve().parents[1])
_SERVER = """
import sys, time
from fsdl_devinfra.hub.server import listen, uvicorn_server
sys.path.insert(0, sys.argv[2])
from hub_server import Fault, FaultyHub
class SlowLink(FaultyHub):
    # each piece of a mebibyte leaves no earlier than 50 MB/s allow: the bandwidth of a stream, not of the link
    def read(self, blob, start, stop):
        began, sent = time.monotonic(), 0
        for piece in super().read(blob, start, stop):
            sent += len(piece); wait = began + sent / 50e6 - time.monotonic()
            if wait > 0: time.sleep(wait)
            yield piece
hub = SlowLink(sys.argv[1], faults=[Fault("slow", "*", 0.04)])
for repo in hub.shelf.repos(): hub.shelf.at(repo, "main")
sock = listen("127.0.0.1", 0); print(sock.getsockname()[1], flush=True)
uvicorn_server(hub, "127.0.0.1", 0).run(sockets=[sock])
"""


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    process = subprocess.Popen([sys.executable, "-c", _SERVER, str(folder), TESTS], stdout=subprocess.PIPE, text=True)
    try: yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()


def rows() -> Iterator[dict]:
    before = os.environ.copy()
    with tempfile.TemporaryDirectory() as folder:
        try: yield from _rows(Path(folder))
        finally:
            os.environ.clear()
            os.environ.update(before)


def _rows(folder: Path) -> Iterator[dict]:
    cache = folder / "home" / "hub"
    os.environ |= {"HF_HOME": str(folder / "home"), "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    from fsdl_devinfra.hub.pulling import pull
    disable_progress_bars()
    repo = folder / "shelf" / "org" / "big"
    repo.mkdir(parents=True)
    (repo / "config.json").write_text("{}")
    for i in range(FILES): (repo / f"model-{i + 1:05}-of-{FILES:05}.safetensors").write_bytes(os.urandom(2**20) * (FILE_BYTES // 2**20))
    with served(folder / "shelf") as url:
        os.environ["HF_ENDPOINT"] = url

        def timed(function) -> float:
            shutil.rmtree(cache, ignore_errors=True)
            os.sync()
            start = time.perf_counter()
            found = Path(function())
            took = time.perf_counter() - start
            assert sum(f.stat().st_size for f in found.glob("*.safetensors")) == FILES * FILE_BYTES
            return took
        times = [(timed(lambda: pull("org/big")), timed(lambda: snapshot_download("org/big", endpoint=url, cache_dir=cache))) for _ in range(RUNS)]
    mine, theirs = (statistics.median(t) for t in zip(*times))
    ratios = [p / o for o, p in times]
    yield {"name": "pull 2 x 256 MiB at 40 ms and 50 MB/s a stream", "ours_s": mine, "peer_s": theirs, "ratio": theirs / mine,
           "spread": (max(ratios) - min(ratios)) / statistics.median(ratios),
           "note": f"ratio from {min(ratios):.2f} to {max(ratios):.2f}; the listing is counted on both sides; ours hashes every byte from the disk"}


if __name__ == "__main__":
    for row in rows(): print(json.dumps(row))
