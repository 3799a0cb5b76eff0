"""Emitted files really start: two gloo ranks, every parallel way, the losses of one process."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from environments import digits_alone

from fsdl_devinfra.launch import Job, launch, write_files
from fsdl_devinfra.launch.job import DIGITS_SCRIPT
from fsdl_devinfra.memory import Strategy, Workload

torch = pytest.importorskip("torch")
BIN = Path(sys.executable).parent
ENV = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
TOLERANCE = 1e-5  # fp32 sums in another order: 10 steps of a loss of 2.4
WAYS = {"ddp": dict(dp=2), "fsdp2": dict(dp=2, zero=3), "tensor": dict(tp=2), "pipeline": dict(pp=2)}


@pytest.fixture(scope="module")
def alone(): return digits_alone()


def job(way: dict, out: Path) -> Job:
    """The digits trainer, which is told where to write its losses."""
    s = Strategy(**way)
    plain = Job("train-digits", s, Workload(17), "H100-SXM-80GB", 2, 8, cpu=True)
    return Job("train-digits", s, Workload(17), "H100-SXM-80GB", 2, 8, (*plain.command, "--out", str(out)), cpu=True)


def started(target: str, way: dict, folder: Path) -> list[float]:
    out = folder / "losses.json"
    found = launch(job(way, out), target)
    write_files(found, folder)
    (folder / "train_digits.py").write_text(DIGITS_SCRIPT)
    done = run_command(found.command, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def run_command(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", command], cwd=folder, env=ENV, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_torchrun_starts_two_ranks_with_the_losses_of_one(way, alone, tmp_path):
    got = started("torchrun", WAYS[way], tmp_path)
    assert got["world"] == 2
    assert max(abs(a - b) for a, b in zip(got["losses"], alone, strict=True)) < TOLERANCE
    assert got["losses"] != got["losses"][:1] * len(alone)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("accelerate", path=ENV["PATH"]), reason="accelerate is not installed")
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_accelerate_launch_starts_them_too(way, alone, tmp_path):
    got = started("accelerate", WAYS[way], tmp_path)
    assert got["world"] == 2
    assert max(abs(a - b) for a, b in zip(got["losses"], alone, strict=True)) < TOLERANCE


#: What a thread of gloo does that is still alive while the interpreter ends, on demand.
ABORTS = "import atexit, os, torch; from fsdl_devinfra.launch.trainer import leave; atexit.register(os.abort); print('trained'); "


@pytest.mark.parametrize("world,end,status", [("2", "leave(0)", 0), ("2", "leave(2)", 2), ("2", "raise SystemExit(0)", -6), ("1", "leave(0)", -6)])
def test_a_rank_that_is_done_does_not_wait_for_the_interpreter_to_end(world, end, status):
    """CI failed once on a rank that aborted after its losses were written. The controls end in the ordinary way, and abort."""
    done = subprocess.run([sys.executable, "-c", ABORTS + end], env={**ENV, "WORLD_SIZE": world}, capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stderr
    if status >= 0: assert done.stdout == "trained\n"  # what was printed is not lost


@pytest.mark.slow
def test_a_wrong_world_is_one_sentence(tmp_path):
    done = subprocess.run([sys.executable, "-c", DIGITS_SCRIPT, "--dp", "2"], env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "there are 1 processes" in done.stderr
