"""Time estimates against published runs: the gate of `make accuracy`, and what must not move unnoticed."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fsdl_devinfra.compute import throughput as module
from fsdl_devinfra.validation import time_accuracy as accuracy
from fsdl_devinfra.validation.memory_accuracy import read_rows

FOLDER = Path(__file__).parent / "data" / "ground_truth"


@pytest.fixture(scope="module")
def cases(): return [accuracy.case_of(r) for r in read_rows(FOLDER / "throughput_measured.csv")]


def test_gate(cases):
    all_rows = accuracy.scores(cases)[-1]
    assert accuracy.missed(all_rows) == []
    assert all_rows.runs > 100 and all_rows.covered > 0.9


@pytest.mark.parametrize("gpu", ["h100_80gb", "a100_80gb", "a100_40gb"])
def test_every_gpu_holds_alone(cases, gpu):
    assert accuracy.missed(accuracy.score(gpu, [c for c in cases if c.row["gpu"] == gpu])) == []


def test_the_gate_can_fail(cases, monkeypatch):
    """A peak that is a third too high is noticed."""
    monkeypatch.setattr(module, "USUAL", replace(module.USUAL, sustained=1.2, sustained_new=1.0))
    worse = [accuracy.case_of(dict(c.row)) for c in cases]
    assert accuracy.missed(accuracy.score("all", worse))


def test_runs_outside_the_table():
    """None of the runs that the rates were not taken from is off by more than 40 %."""
    from fsdl_devinfra.compute.cluster import cluster
    for name, a, s, w, gpu, measured in accuracy.other_runs():
        t = module.throughput(a, s, w, cluster(gpu, s.gpus)).tokens_per_second_per_gpu
        assert abs(t.value / measured - 1) < 0.4, name


def test_runs_on_tpus():
    """Of those nothing was used: within 30 % of what Google printed, and every one in the range."""
    from fsdl_devinfra.compute.cluster import cluster
    for name, a, s, w, gpu, measured in accuracy.tpu_runs():
        t = module.throughput(a, s, w, cluster(gpu, s.gpus)).tokens_per_second_per_gpu
        assert abs(t.value / measured - 1) < 0.3 and t.low <= measured <= t.high, name


@pytest.fixture(scope="module")
def elsewhere(): return accuracy.elsewhere_cases(FOLDER)


def test_the_blind_answer_is_kept():
    """What was said of the rows of other sources before anything was changed for them: a record, not a result."""
    import statistics
    rows = read_rows(FOLDER / "throughput_elsewhere.csv")
    blind = [abs(float(r["said_blind"]) / float(r["tokens_per_s_per_gpu"]) - 1) for r in rows]
    assert len(rows) == 148 and round(statistics.median(blind), 3) == 0.192


def test_other_sources(elsewhere):
    """Not gated in `make accuracy`; a bound that says when something there breaks."""
    total = accuracy.score("all", elsewhere)
    assert total.runs == 146 and total.median < 0.12 and total.p90 < 0.45 and total.covered > 0.84
    dense = accuracy.score("dense", accuracy.elsewhere_groups(elsewhere)["dense, all parameters"])
    assert dense.median < 0.10 and dense.p90 < 0.25 and dense.covered > 0.88


def test_no_estimate_of_another_source_is_beyond_the_chip(elsewhere):
    assert [c.row["id"] for c in elsewhere if not 0 < c.said.mfu < 0.8] == []


def test_a_row_is_read_as_it_is_written():
    row = next(r for r in read_rows(FOLDER / "throughput_elsewhere.csv") if r["id"] == "tt-405-3d-int")
    s = accuracy.strategy_of(row)
    assert (s.dp, s.tp, s.pp, s.vpp, s.async_tp, s.compile, s.recompute, s.precision) == (8, 8, 8, 2, True, True, "full", "fp8-mixed")
