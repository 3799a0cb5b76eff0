"""What must hold for any model, strategy and cluster: found by search, not by example."""
from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fsdl_devinfra.compute.cluster import cluster
from fsdl_devinfra.compute.money import cost
from fsdl_devinfra.compute.planning import LADDER, plan
from fsdl_devinfra.compute.throughput import throughput
from fsdl_devinfra.core.device_table import devices, find_device
from fsdl_devinfra.core.errors import BadInput
from fsdl_devinfra.memory import Architecture, Strategy, Workload
from fsdl_devinfra.memory.strategy import refusal

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
GPUS = [d.name for d in devices()]


@st.composite
def models(draw):
    heads = draw(st.sampled_from([4, 8, 16, 32, 64]))
    hidden = heads * draw(st.sampled_from([64, 128]))
    a = Architecture.from_numbers(layers=draw(st.integers(2, 96)), hidden=hidden, heads=heads, kv_heads=draw(st.sampled_from([heads, max(1, heads // 4), 1])), vocab=draw(st.sampled_from([1000, 32000, 128256])),
                                  gated=draw(st.booleans()), tied=draw(st.booleans()), positions=131072, name="org/any")
    window = draw(st.sampled_from([None, 512, 4096]))
    return replace(a, window=window, windowed_layers=draw(st.integers(1, a.layers)) if window else 0)


@st.composite
def ways(draw):
    tp, pp = draw(st.sampled_from([(1, 1), (2, 1), (8, 1), (1, 2), (4, 4)]))
    return Strategy(dp=draw(st.sampled_from([1, 2, 8, 16, 64])), tp=tp, pp=pp, zero=draw(st.sampled_from([0, 1, 3])) if tp * pp == 1 else 0, framework="fsdp" if tp * pp == 1 else "megatron",
                    recompute=draw(st.sampled_from(["none", "selective", "full"])), lora_rank=draw(st.sampled_from([None, None, 16])) if tp * pp == 1 else None, compile=draw(st.booleans()),
                    attention=draw(st.sampled_from(["flash", "flash", "eager"])))


loads = st.builds(Workload, st.sampled_from([128, 1024, 4096, 32768]), st.sampled_from([1, 2, 8]), st.sampled_from([1, 4, 16]))


def speed(a, s, w, gpu, **where):
    assume(refusal(a, s, w) is None)
    try: return throughput(a, s, w, cluster(gpu, s.gpus, **where))
    except BadInput: assume(False)


@QUICK
@given(models(), ways(), loads, st.sampled_from(GPUS))
def test_nothing_is_faster_than_the_chip(a, s, w, gpu):
    """MFU between 0 and 1, also at the optimistic end; bounds in order; parts make the whole; tokens and seconds agree."""
    t = speed(a, s, w, gpu)
    assert 0 < t.mfu < 1
    assert 0 < t.step_seconds.low <= t.step_seconds.value <= t.step_seconds.high
    assert t.mfu * t.step_seconds.value / t.step_seconds.low <= 1.05
    assert all(v >= 0 for v in t.spent_seconds.values()) and sum(t.spent_seconds.values()) == pytest.approx(t.step_seconds.value)
    assert t.tokens_per_second_per_gpu.value == pytest.approx(t.tokens_per_step / s.gpus / t.step_seconds.value)


@QUICK
@given(models(), ways(), loads, st.sampled_from(GPUS), st.sampled_from(["bandwidth", "bf16", "fp16", "fp32", "link"]), st.floats(1.01, 4))
def test_a_better_chip_is_never_slower(a, s, w, gpu, field, times):
    d = find_device(gpu)
    assume(getattr(d, field))
    better = replace(d, **{field: getattr(d, field) * times})
    assert speed(a, s, w, better).step_seconds.value <= speed(a, s, w, d).step_seconds.value * (1 + 1e-9)


@QUICK
@given(models(), ways(), loads, st.sampled_from(GPUS), st.floats(0.5, 50), st.floats(1.01, 8))
def test_a_better_network_is_never_slower(a, s, w, gpu, network, times):
    assert speed(a, s, w, gpu, network=network * times).step_seconds.value <= speed(a, s, w, gpu, network=network).step_seconds.value * (1 + 1e-9)


@QUICK
@given(models(), ways(), loads, st.sampled_from(GPUS))
def test_recomputation_and_longer_sequences_cost_time(a, s, w, gpu):
    order = [speed(a, replace(s, recompute=r), w, gpu).step_seconds.value for r in ("none", "selective", "full")]
    assert order[0] <= order[1] * (1 + 1e-9) and order[0] <= order[2] * (1 + 1e-9)
    assert speed(a, s, replace(w, seq_len=2 * w.seq_len), gpu).step_seconds.value >= speed(a, s, w, gpu).step_seconds.value * (1 - 1e-9)  # small layers wait for the host either way


@QUICK
@given(models(), st.sampled_from([0, 1, 3]), st.sampled_from([4096, 32768]), st.sampled_from(["h100", "a100-80", "tpu-v5p"]), st.sampled_from([1, 2, 4]))
def test_twice_the_gpus_of_a_node_do_up_to_twice_the_work(a, zero, seq_len, gpu, dp):
    """Weak scaling over NVLink; more than twice only by as much as sharding shortens the optimizer's step. (Over a slow network two nodes may be slower than one, and the model says so.)"""
    one, two = (speed(a, Strategy(dp=n, zero=zero), Workload(seq_len, 2), gpu) for n in (dp, 2 * dp))
    spared = one.spent_seconds.get("optimizer", 0) / one.step_seconds.value
    assert one.tokens_per_second_per_gpu.value < two.tokens_per_second_per_gpu.value * 2
    assert two.tokens_per_second_per_gpu.value * (1 - spared) <= one.tokens_per_second_per_gpu.value * (1 + 1e-9)


@QUICK
@given(models(), loads, st.sampled_from(["h100", "a100-40", "t4"]), st.integers(10**6, 10**13), st.floats(0.1, 100))
def test_money_is_time_times_price(a, w, gpu, tokens, hourly):
    s = Strategy(dp=4, zero=3)
    assume(refusal(a, s, w) is None)
    c = cost(a, s, w, cluster(gpu, 4), tokens, hourly)
    assert c.usd == pytest.approx(c.hours * 4 * hourly) and c.usd_low <= c.usd <= c.usd_high
    assert c.hours * 3600 == pytest.approx(c.steps * c.step_seconds.value) and c.steps * c.tokens_per_second_per_gpu.value * 4 * c.step_seconds.value >= tokens * (1 - 1e-9)


@settings(QUICK, max_examples=25)
@given(models(), st.sampled_from(["h100", "a100-40", "rtx-4090", "t4", "tpu-v4", "mi300x"]), st.sampled_from([1, 2, 3, 6, 8, 16, 24]), st.sampled_from(["time", "cost", "gpus"]))
def test_every_plan_is_one(a, gpu, gpus, minimize):
    """Plans use the GPUs that there are, fit, and are in order; what is ruled out has a reason; nothing is in both lists."""
    r = plan(a, find_device(gpu), gpus, workload=Workload(1024), minimize=minimize, tokens=10**9, price=1.0)
    assert (r.best is None) == (not r.plans) and (r.plans or r.rejected)
    if r.plans and minimize == "time":  # the headline is within a tenth of the first, and nothing as near is simpler
        rate = [p.tokens_per_second_per_gpu.value * p.gpus for p in r.plans]
        near = [p for p, x in zip(r.plans, rate) if x >= 0.9 * rate[0] and p.fits in (r.plans[0].fits, "yes") and (p.strategy.offload == "none" or r.plans[0].strategy.offload != "none")]
        assert rate[r.best] >= 0.9 * rate[0] and LADDER.index(r.headline.rung) == min(LADDER.index(p.rung) for p in near)
    assert len({p.strategy.kernels for p in r.plans}) <= 1 and None not in {p.strategy.kernels for p in r.plans}
    for p in r.plans[:4]:  # cost of the same run says the same to the digit
        again = cost(a, p.strategy, p.workload, cluster(gpu, p.gpus))
        assert again.step_seconds == p.step_seconds and again.tokens_per_second_per_gpu == p.tokens_per_second_per_gpu
    for p in r.plans:
        assert (p.strategy.gpus == gpus if minimize == "time" else p.strategy.gpus <= gpus) and p.fits in ("yes", "tight") and 0 < p.mfu < 1
        assert refusal(a, p.strategy, p.workload) is None and p.usd == pytest.approx(p.hours * p.strategy.gpus)
    assert all(x.why for x in r.rejected) and r.advice
    firm = [p for p in r.plans if p.fits == "yes" and p.strategy.offload == "none"]
    key = {"time": lambda p: -p.tokens_per_second_per_gpu.value * p.gpus, "cost": lambda p: -p.tokens_per_second_per_gpu.value, "gpus": lambda p: p.gpus}[minimize]
    assert all(key(x) <= key(y) * (1 - 1e-3 if key(y) < 0 else 1) + 1e-9 for x, y in zip(firm, firm[1:]))


def test_a_stage_that_sends_more_is_not_hidden_by_one_that_computes_more():
    """Faster memory moves the slowest computation from the stage with the head to one with a layer more, which sends more: the step may not grow."""
    a = Architecture.from_numbers(layers=35, hidden=2048, heads=32, vocab=32000, gated=False, positions=131072, name="org/any")
    s, w, d = Strategy(dp=8, tp=4, pp=4, framework="megatron", attention="eager"), Workload(128, 1, 1), find_device("rtx-2080ti")
    found = [speed(a, s, w, replace(d, bandwidth=d.bandwidth * t)).step_seconds.value for t in (0.5, 1, 1.5, 2, 3, 4, 8)]
    assert found == sorted(found, reverse=True)
