"""Timing of two things in turns: A B A B …, so that a machine whose speed drifts treats both alike."""
from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable


def in_turns(ours: Callable[[], float | None], peer: Callable[[], float | None], runs: int = 5, warm_up: int = 1) -> dict[str, float]:
    """Median seconds of each, their ratio (peer / ours) and the wider of the two spreads.

    A function may return the seconds that it measured itself (CPU time, one step); otherwise wall time is taken.
    """
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    for i in range(runs + warm_up):
        for name, function in (("ours", ours), ("peer", peer)):
            start = time.perf_counter()
            said = function()
            if i >= warm_up: seconds[name].append(said if isinstance(said, float) else time.perf_counter() - start)
    a, b = (statistics.median(seconds[n]) for n in ("ours", "peer"))
    spread = max((max(s) - min(s)) / statistics.median(s) for s in seconds.values())
    return {"ours_s": a, "peer_s": b, "ratio": b / a, "spread": spread}


def process(*argv: object) -> Callable[[], None]:
    """A whole process, from start to exit 0."""
    def run() -> None:
        subprocess.run([sys.executable, *map(str, argv)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return run
