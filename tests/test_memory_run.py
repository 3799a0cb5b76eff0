"""Runs that take a while: the trace of an 8B model, and real steps on the CPU under torchrun."""
import subprocess
import sys
import pytest
pytest.importorskip("torch"); pytest.importorskip("transformers")
from fsdl_devinfra.core.errors import BadInput
from fsdl_devinfra.memory import Architecture, Strategy, Workload, estimate
from fsdl_devinfra.memory.measure import COLUMNS, measure, rows_of
from fsdl_devinfra.memory.trace import compare, trace

LLAMA = dict(model_type="llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False)
TINY = dict(model_type="llama", hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=512, tie_word_embeddings=False)

@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_trace_of_8b_on_8_ranks_agrees_with_the_estimate(recompute):
    s, w = Strategy(dp=8, zero=3, recompute=recompute), Workload(8192, 2)
    t = trace(LLAMA, s, w)
    P = Architecture.from_config(LLAMA).parameters
    assert abs(t.parts["optimizer"] - P) < 0.001 * P and abs(t.parts["parameters"] - P / 2) < 0.001 * P  # 8 bytes and 4 bytes over 8 ranks: the tracker is mended
    rows = {name: (mine, traced) for name, mine, traced, _ in compare(estimate(Architecture.from_config(LLAMA), s, w), t)}
    mine, traced = rows["activations and loss"]
    assert abs(mine / traced - 1) < 0.10
    mine, traced = rows["allocated at the peak"]
    assert abs(mine / traced - 1) < 0.12
    assert t.seconds < 60 * 2  # 10 to 20 s on two idle cores

@pytest.mark.slow
def test_trace_stays_small():
    code = f"import resource; from fsdl_devinfra.memory import Strategy, Workload; from fsdl_devinfra.memory.trace import trace; trace({LLAMA!r}, Strategy(dp=8, zero=3), Workload(8192, 2)); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280, check=True)
    assert int(done.stdout.split()[-1]) * 1024 < 2**30

@pytest.mark.slow
def test_straight_line_through_two_short_models_is_exact():
    full = trace(TINY | dict(num_hidden_layers=3), Strategy(dp=2, zero=3), Workload(128, 2))
    assert full.traced_layers == [3]
    line = trace(TINY | dict(num_hidden_layers=6), Strategy(dp=2, zero=3), Workload(128, 2))
    each = (line.parts["activations and loss"] - full.parts["activations and loss"]) / 3
    five = trace(TINY | dict(num_hidden_layers=5), Strategy(dp=2, zero=3), Workload(128, 2))
    assert line.traced_layers == [2, 3] and abs(five.parts["activations and loss"] + each - line.parts["activations and loss"]) <= 2

@pytest.mark.slow
def test_measure_on_the_cpu():
    m = measure(TINY, Strategy(dp=2, zero=3, recompute="full"), Workload(128, 2))
    assert m.ranks == 2 and m.device in ("cpu",) or m.allocated_bytes
    rows = rows_of(Architecture.from_config(TINY), Strategy(dp=2, zero=3, recompute="full"), Workload(128, 2), m)
    assert rows and list(rows[0]) == COLUMNS and all(r["measured_gib"] >= 0 for r in rows) and "torch" in rows[0]["note"]

@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1])
def test_replicas_are_traced_and_measured(zero):
    one, many = (trace(TINY, Strategy(dp=dp, zero=zero), Workload(128, 2)) for dp in (1, 4))
    assert many.parts["communication"] - one.parts["communication"] == one.parts["parameters"]  # the buckets
    assert abs(many.parts["optimizer"] * (4 if zero else 1) - one.parts["optimizer"]) < 4
    rows = {name: (mine, traced) for name, mine, traced, _ in compare(estimate(Architecture.from_config(TINY), Strategy(dp=4, zero=zero), Workload(128, 2)), many)}
    assert abs(rows["optimizer"][0] / rows["optimizer"][1] - 1) < 0.02
    m = measure(TINY, Strategy(dp=2, zero=zero), Workload(128, 2))
    assert m.ranks == 2 and (m.resident_bytes or m.allocated_bytes)

def test_columns_are_those_of_the_ground_truth():
    from pathlib import Path
    assert (Path(__file__).parent / "data" / "ground_truth" / "memory_measured.csv").read_text().splitlines()[0].split(",") == COLUMNS

@pytest.mark.parametrize("s", [Strategy(tp=2), Strategy(framework="deepspeed"), Strategy(lora_rank=4), Strategy(inference=True), Strategy(dp=2, zero=2), Strategy(optimizer="lion")])
def test_what_cannot_be_traced_is_said(s):
    with pytest.raises(BadInput) as e: trace(TINY, s, Workload(128, 2))
    assert e.value.hint

@pytest.mark.slow
def test_the_script_for_a_gpu_goes_on_where_it_stopped(tmp_path):
    import csv
    from pathlib import Path
    script, out = Path(__file__).parent / "gpu" / "measure_memory.py", tmp_path / "m.csv"
    for limit in (1, 2, 2): subprocess.run([sys.executable, script, "-o", out, "--limit", str(limit)], check=True, capture_output=True, timeout=280)
    rows = list(csv.DictReader(out.open()))
    assert len({r["id"].rsplit("#")[0] for r in rows}) == 2 == len({r["id"] for r in rows if r["id"].endswith("#0")})
    assert all("torch" in r["note"] for r in rows)
