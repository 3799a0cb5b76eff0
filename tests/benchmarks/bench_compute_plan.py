"""How long a plan takes. Peer: none does the same work (no package plans memory, time and money together), so each row is compared with its budget."""
from __future__ import annotations

import statistics
import time

from fsdl_devinfra.compute.planning import plan
from fsdl_devinfra.core.device_table import find_device
from fsdl_devinfra.memory import Architecture, Workload

CASES = {
    "plan 405B on 1,024 H100 (budget 2 s)": (dict(layers=126, hidden=16384, heads=128, kv_heads=8, ffn=53248, vocab=128256), "h100", 1024, 2.0),
    "plan 8B on 8 H100 (budget 2 s)": (dict(layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocab=128256), "h100", 8, 2.0),
}


def rows():
    """One row a case: the median of five."""
    for name, (dimensions, gpu, gpus, budget) in CASES.items():
        a, device, times = Architecture.from_numbers(**dimensions), find_device(gpu), []
        for _ in range(5):
            start = time.perf_counter()
            found = plan(a, device, gpus, workload=Workload(4096))
            times.append(time.perf_counter() - start)
        assert found.best is not None
        ours = statistics.median(times)
        yield dict(name=name, ours_s=ours, peer_s=budget, ratio=ours / budget, spread=max(times) - min(times), note=f"{found.considered} strategies considered; the peer is the budget")


if __name__ == "__main__":
    for row in rows(): print(row)
