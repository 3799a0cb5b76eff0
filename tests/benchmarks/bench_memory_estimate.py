"""The memory of a 405B configuration as a process, ten thousand strategies in one, and the trace of an 8B model."""
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FSDL = str(Path(sys.executable).parent / "fsdl-devinfra")
CONFIG = dict(model_type="llama", architectures=["LlamaForCausalLM"], hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128, num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False)
PARAMETERS = 405_853_388_800
_PEER = """
import sys, json, transformers
from accelerate import init_empty_weights
from accelerate.utils import calculate_maximum_sizes
config = transformers.AutoConfig.from_pretrained(sys.argv[1])
with init_empty_weights(): model = transformers.AutoModelForCausalLM.from_config(config)
print(json.dumps(calculate_maximum_sizes(model)[0]))
"""


def seconds(*command):
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    return time.perf_counter() - start, done.stdout


def rows():
    """Medians of five taken in turns; both must arrive at the same number of parameters."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG))
        ours, peer = [], []
        for _ in range(5):
            taken, text = seconds(FSDL, "memory", folder, "--dp", "8", "--tp", "8", "--pp", "8", "--zero", "3", "--recompute", "full", "--gpu", "h100", "--json"); ours.append(taken)
            taken, theirs = seconds(sys.executable, "-c", _PEER, folder); peer.append(taken)
    assert json.loads(text)["model"]["parameters"] == PARAMETERS and abs(json.loads(theirs) - 4 * PARAMETERS) <= 1024  # theirs counts the rotary frequencies too
    a, b = statistics.median(ours), statistics.median(peer)
    yield {"name": "memory of 405B, as a process", "ours_s": a, "peer_s": b, "ratio": b / a, "spread": f"{min(ours):.2f}-{max(ours):.2f} against {min(peer):.2f}-{max(peer):.2f}", "note": "what accelerate estimate-memory does after the download; target: under 0.5 s"}
    yield from many()
    yield from traced()


def many():
    from fsdl_devinfra.memory import Architecture, Strategy, Workload, device_peak, estimate
    a, w = Architecture.from_config(CONFIG), Workload(8192, 1)
    runs = [Strategy(dp=d, tp=t, pp=p, zero=z, recompute=r) for d in (1, 2, 4, 8, 16, 32) for t in (1, 2, 4, 8) for p in (1, 2, 4, 8) for z in (0, 3) for r in ("none", "selective", "full")]
    runs = (runs * (10_000 // len(runs) + 1))[:10_000]
    for name, function in (("10,000 strategies, the peak alone", device_peak), ("10,000 strategies, whole footprints", estimate)):
        took = []
        for _ in range(5):
            start = time.perf_counter()
            for s in runs: function(a, s, w)
            took.append(time.perf_counter() - start)
        yield {"name": name, "ours_s": statistics.median(took), "peer_s": None, "ratio": None, "spread": f"{min(took):.2f}-{max(took):.2f}", "note": "405B; target: under 2 s"}


def traced():
    code = ("import json, resource, time; from fsdl_devinfra.memory import Strategy, Workload; from fsdl_devinfra.memory.trace import trace\n"
            f"c = {dict(CONFIG, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32)!r}\n"
            "s = time.perf_counter(); t = trace(c, Strategy(dp=8, zero=3, recompute='selective'), Workload(8192, 2)); assert t.layers == 32\n"
            "print(json.dumps([time.perf_counter() - s, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024]))")
    took = [json.loads(seconds(sys.executable, "-c", code)[1]) for _ in range(3)]
    yield {"name": "trace of 8B on 8 ranks", "ours_s": statistics.median(t for t, _ in took), "peer_s": None, "ratio": None, "spread": f"{min(t for t, _ in took):.0f}-{max(t for t, _ in took):.0f}",
           "note": f"{max(m for _, m in took):.0f} MiB resident; targets: under 60 s and 1 GiB"}


if __name__ == "__main__":
    for row in rows(): print(row)
