"""Capture as a process against torch's own collector, in turns, in the same environment; and inside a process that has torch."""
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

TIMES = 5
FSDL = str(Path(sys.executable).parent / "fsdl-devinfra")


def seconds(*command):
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return time.perf_counter() - start, done.stdout


def rows():
    """`ours_s` and `peer_s` are medians of five, taken in turns; both must name the version of torch, and ours every distribution."""
    import compileall
    import fsdl_devinfra
    from fsdl_devinfra.env.stamping import installed
    compileall.compile_dir(fsdl_devinfra.__path__[0], quiet=2)  # as pip does with every package it installs, torch for one
    ours, peer = [], []
    for _ in range(TIMES):
        taken, text = seconds(FSDL, "env", "capture", "--json"); ours.append(taken)
        taken, theirs = seconds(sys.executable, "-m", "torch.utils.collect_env"); peer.append(taken)
    document, there = json.loads(text), installed()
    assert set(document["packages"]) == set(there) and document["packages"]["torch"]["version"].split("+")[0] in theirs
    listed = sum("==" in line for line in theirs.splitlines())
    a, b = statistics.median(ours), statistics.median(peer)
    yield {"name": "env capture, as a process", "ours_s": a, "peer_s": b, "ratio": b / a, "spread": f"{min(ours):.2f}-{max(ours):.2f} against {min(peer):.2f}-{max(peer):.2f}",
           "note": f"python -m torch.utils.collect_env; {len(there)} distributions, of which it lists {listed}"}
    code = ("import torch, time, json\nfrom fsdl_devinfra.env import capture\nt=[]\n"
            "for _ in range(5): s=time.perf_counter(); e=capture(); t.append(time.perf_counter()-s)\nassert e.numerics['origin']=='observed'\nprint(json.dumps(t))")
    inside = json.loads(seconds(sys.executable, "-c", code)[1])
    yield {"name": "env capture, in a process with torch", "ours_s": statistics.median(inside), "peer_s": None, "ratio": None, "spread": f"{min(inside):.2f}-{max(inside):.2f}", "note": "target: under 0.3 s"}
    code = ("import time, json\nfrom fsdl_devinfra.env import check_files\nt=[]\n"
            "for _ in range(3): s=time.perf_counter(); c=check_files(); t.append(time.perf_counter()-s)\nprint(json.dumps([t, c.files, c.size_bytes]))")
    hashed, files, size = json.loads(seconds(sys.executable, "-c", code)[1])
    start = time.perf_counter(); subprocess.run(f"find {sys.prefix}/lib -type f -not -name '*.pyc' -print0 | xargs -0 sha256sum > /dev/null", shell=True); single = time.perf_counter() - start
    yield {"name": "env verify --files", "ours_s": statistics.median(hashed), "peer_s": single, "ratio": single / statistics.median(hashed), "spread": f"{min(hashed):.2f}-{max(hashed):.2f}",
           "note": f"{files:,} files, {size / 2**30:.2f} GiB from the page cache; peer: find and sha256sum over the same tree"}


if __name__ == "__main__":
    for row in rows(): print(json.dumps(row))
