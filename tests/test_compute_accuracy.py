"""Time estimates against published runs: the gate of `make accuracy`, and what must not move unnoticed."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fsdl_devinfra.compute import accuracy, throughput as module
from fsdl_devinfra.memory.accuracy import read_rows

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
