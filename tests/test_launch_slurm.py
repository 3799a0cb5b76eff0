"""The emitted batch file on a real SLURM: a controller and two nodes on loopback, as Debian packages them."""
from __future__ import annotations

import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from environments import digits_alone

from fsdl_devinfra.launch import Job, launch, write_files
from fsdl_devinfra.launch.job import DIGITS_SCRIPT
from fsdl_devinfra.memory import Strategy, Workload

PATHS = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"])  # daemons live in sbin
MISSING = [name for name in ("slurmctld", "slurmd", "sbatch", "scontrol", "timeout") if not shutil.which(name, path=PATHS)]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)}: on Debian, apt install slurmctld slurmd slurm-client")]
LIFE = 900  # seconds after which the daemons end by themselves, whatever becomes of the tests
TOLERANCE = 1e-5  # fp32 sums in another order

# Two nodes on one machine, with pretended cores and GPUs; nothing that a container forbids (no control groups, no tracking by them).
# Nodes are named by loopback addresses, so that the name that SLURM hands out is one that ranks can meet at.
CONF = """
ClusterName=loop
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
AuthType=auth/none
CredType=cred/none
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/control.pid
SlurmdPidFile={folder}/node-%n.pid
SlurmctldLogFile={folder}/control.log
SlurmdLogFile={folder}/node-%n.log
MailProg=/bin/true
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
KillWait=2
GresTypes=gpu
NodeName=127.0.0.1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=64 Gres=gpu:8 State=UNKNOWN
NodeName=127.0.0.2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=64 Gres=gpu:8 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    for s in held: s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in held]
    for s in held: s.close()
    return ports


class Slurm:
    """The client commands of one cluster."""

    def __init__(self, folder: Path):
        self.env = {**os.environ, "PATH": PATHS, "SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def __call__(self, *words: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
        return subprocess.run([str(w) for w in words], cwd=cwd, env=self.env, capture_output=True, text=True, timeout=20)

    def finished(self, folder: Path, limit: float = 120.0) -> dict[str, str]:
        """Submit the folder's batch file and wait: what scontrol says of the job then."""
        said = self("sbatch", "--parsable", "job.sbatch", cwd=folder)
        assert said.returncode == 0, said.stderr
        number, deadline = said.stdout.strip(), time.monotonic() + limit
        while time.monotonic() < deadline:
            state = dict(w.split("=", 1) for w in self("scontrol", "show", "job", number).stdout.split() if "=" in w)
            if state.get("JobState") not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"): return state
            time.sleep(0.5)
        self("scancel", number)
        raise AssertionError(f"job {number} did not end: {state}")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder, host = tmp_path_factory.mktemp("slurm"), socket.gethostname().split(".")[0]
    control, first, second = free_ports(3)
    (folder / "state").mkdir()
    for i in range(8): (folder / f"gpu{i}").touch()
    (folder / "slurm.conf").write_text(CONF.format(host=host, user=getpass.getuser(), folder=folder, control=control, first=first, second=second))
    (folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={folder}/gpu[0-7]\n")
    slurm, running = Slurm(folder), []

    def start(*words: str) -> None:
        running.append(subprocess.Popen(["timeout", str(LIFE), *words], env=slurm.env, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))

    try:
        start("slurmctld", "-D", "-i")
        for node in ("127.0.0.1", "127.0.0.2"): start("slurmd", "-D", "-N", node)
        deadline = time.monotonic() + 30
        while slurm("sinfo", "-h", "-N", "-o", "%T").stdout.split() != ["idle", "idle"]:
            if time.monotonic() > deadline: pytest.skip("SLURM's daemons do not start on this machine: " + " ".join((folder / "control.log").read_text().splitlines()[-2:]) if (folder / "control.log").exists() else "no log")
            time.sleep(0.3)
        yield slurm
    finally:
        for p in running: p.terminate()
        for p in running:
            try: p.wait(15)
            except subprocess.TimeoutExpired: p.kill()


def job(out: Path | None, per_node: int, cpu: bool = True) -> Job:
    """The digits trainer on two ranks, sharded."""
    plain = Job("train-digits", Strategy(dp=2, zero=3), Workload(17), "H100-SXM-80GB", 2, per_node, cpu=cpu)
    return replace(plain, script=(*plain.command, "--out", str(out))) if out else plain


def prepared(j: Job, folder: Path) -> Path:
    write_files(launch(j, "slurm"), folder)
    (folder / "train_digits.py").write_text(DIGITS_SCRIPT)
    return folder


@pytest.fixture(scope="module")
def alone():
    pytest.importorskip("torch")
    return digits_alone()


@pytest.mark.parametrize("per_node,cpu", [(8, True), (1, False)], ids=["one node", "two nodes with GPUs"])
def test_the_batch_file_trains(cluster, alone, tmp_path, per_node, cpu):
    """sbatch, srun, torchrun, gloo: two ranks on one node, or one on each of two, with the losses of one process."""
    out = tmp_path / "losses.json"
    state = cluster.finished(prepared(job(out, per_node, cpu), tmp_path))
    log = "".join(p.read_text() for p in tmp_path.glob("*.out"))
    assert (state["JobState"], state["ExitCode"]) == ("COMPLETED", "0:0"), log[-3000:]
    assert state["NumNodes"] == str(2 // min(per_node, 2))
    assert ("gres:gpu:1" in state.get("TresPerNode", "")) is not cpu
    got = json.loads(out.read_text())
    assert got["world"] == 2 and max(abs(a - b) for a, b in zip(got["losses"], alone, strict=True)) < TOLERANCE


def test_a_step_has_the_cores_that_the_job_asked_for(cluster, tmp_path):
    """SLURM gives a step one core unless srun is told; the processes of a node would share it."""
    (tmp_path / "torchrun").write_text('#!/bin/bash\necho "cores $SLURM_CPUS_PER_TASK of $SLURM_STEP_ID" > seen\nscontrol show step "$SLURM_JOB_ID.$SLURM_STEP_ID" > step\n')
    (tmp_path / "torchrun").chmod(0o755)
    here = Slurm.__new__(Slurm)
    here.env = cluster.env | {"PATH": f"{tmp_path}{os.pathsep}{PATHS}"}
    wide = replace(job(None, 8, cpu=False), gpus=4, strategy=Strategy(dp=4))
    state = here.finished(prepared(wide, tmp_path))
    assert state["JobState"] == "COMPLETED"
    assert (tmp_path / "seen").read_text().split()[1] == "32"  # 8 a GPU
    assert "CPUs=32" in (tmp_path / "step").read_text()


def test_a_script_that_fails_fails_the_job(cluster, tmp_path):
    state = cluster.finished(prepared(replace(job(None, 8), script=("train_digits.py", "--dp", "3")), tmp_path))
    assert state["JobState"] == "FAILED" and state["ExitCode"] != "0:0"
    assert "there are 2 processes" in "".join(p.read_text() for p in tmp_path.glob("*.out"))


@pytest.mark.parametrize("gpus,fits", [(8, True), (16, True), (24, False)])
def test_sbatch_itself_reads_the_file(cluster, tmp_path, gpus, fits):
    """--test-only: the controller accepts what its nodes can hold, and refuses a node too many."""
    j = Job("train-a", Strategy(dp=gpus, zero=3), Workload(1024), "H100-SXM-80GB", gpus, 8, ("train.py",), hours=30.0)
    said = cluster("sbatch", "--test-only", "job.sbatch", cwd=prepared(j, tmp_path))
    assert (said.returncode == 0) is fits, said.stderr
    assert ("to start at" if fits else "not available") in said.stderr
