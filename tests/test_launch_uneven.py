"""GPUs that are no multiple of a node, and what a plan counts on: in the files, or said aloud."""
from __future__ import annotations

import re

import pytest

from fsdl_devinfra.core.errors import BadInput
from fsdl_devinfra.launch import TARGETS, job_of, launch
from fsdl_devinfra.memory import Strategy, Workload


def job(strategy, workload=Workload(1024), script=("train.py",), gpu="H100-SXM-80GB", **where):
    return job_of(dict(strategy=strategy.to_dict(), workload=workload.to_dict()), gpu, "org/model", script, **where)


@pytest.fixture
def no_loaders(monkeypatch):
    """Our own checks only: the launchers' loaders take seconds each."""
    monkeypatch.setattr("fsdl_devinfra.launch.validation.read_by_loader", lambda *_: None)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_the_loaders_read_twelve(target): assert launch(job(Strategy(dp=12, zero=3)), target).files


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("gpus", [9, 10, 12, 20, 24])
@pytest.mark.usefixtures("no_loaders")
def test_every_launcher_starts_as_many_processes_as_there_are_gpus(target, gpus):
    """12 GPUs are 6 on each of two nodes; 24 (the control) are 8 on each of three."""
    asked = job(Strategy(dp=gpus, zero=3))
    assert asked.nodes * asked.on_node == gpus
    assert launch(asked, target).files


def test_tensor_parallel_groups_stay_inside_a_node():
    assert (job(Strategy(dp=3, tp=4)).nodes, job(Strategy(dp=3, tp=4)).on_node) == (3, 4)
    assert (job(Strategy(dp=6, tp=2)).nodes, job(Strategy(dp=6, tp=2)).on_node) == (2, 6)


def test_what_cannot_be_divided_is_a_sentence():
    with pytest.raises(BadInput, match="13 GPUs cannot be divided evenly"): job(Strategy(dp=13))
    assert job(Strategy(dp=13), per_node=13).nodes == 1


COUNTED_ON = {
    "offload optimizer": (Strategy(dp=8, zero=2, offload="optimizer", framework="deepspeed"), "optimizer on the host"),
    "offload parameters": (Strategy(dp=8, zero=3, offload="parameters"), "parameters on the host"),
    "precision": (Strategy(dp=8, precision="fp8-mixed"), "fp8-mixed"),
    "recomputation": (Strategy(dp=8, recompute="selective"), "selective activation checkpointing"),
    "sequence parallelism": (Strategy(dp=4, tp=2), "sequence parallelism"),
    "kernels": (Strategy(dp=8, kernels="te"), "kernels of te"),
    "gradients": (Strategy(dp=8, grad_dtype="bf16"), "gradients in bf16"),
    "megatron's optimizer": (Strategy(dp=4, tp=2, zero=1, framework="megatron"), "--use-distributed-optimizer"),
    "megatron's sequences": (Strategy(dp=4, tp=2, zero=1, framework="megatron"), "--sequence-parallel"),
    "megatron's recomputation": (Strategy(dp=8, recompute="full", framework="megatron"), "--recompute-granularity full"),
    "megatron's precision": (Strategy(dp=8, precision="fp8-mixed", framework="megatron"), "--fp8-format hybrid"),
}


@pytest.mark.usefixtures("no_loaders")
@pytest.mark.parametrize("strategy,said", COUNTED_ON.values(), ids=COUNTED_ON)
def test_what_torchrun_cannot_carry_is_said(strategy, said):
    """torchrun starts a script and configures nothing in it, so everything that the plan counted on is named."""
    assert said in " ".join(launch(job(strategy), "torchrun").notes)
    assert said not in " ".join(launch(job(Strategy(dp=8)), "torchrun").notes)


@pytest.mark.usefixtures("no_loaders")
def test_megatron_hears_the_batch():
    text = " ".join(launch(job(Strategy(dp=4, pp=2, vpp=4, framework="megatron"), Workload(2048, 2, 16)), "slurm").notes)
    found = dict(re.findall(r"--([a-z-]+) (\d+)", text))
    assert (found["seq-length"], found["micro-batch-size"], found["global-batch-size"]) == ("2048", "2", "128")
    assert found["num-virtual-stages-per-pipeline-rank"] == "4"


@pytest.mark.parametrize("target", ["deepspeed", "accelerate"])
@pytest.mark.parametrize("precision", ["mxfp8-mixed", "nvfp4-mixed"])
def test_a_precision_that_a_file_cannot_say_is_refused(target, precision):
    """It is never left out in silence: the run would be in fp32."""
    from fsdl_devinfra.launch.frameworks import accelerate_config, deepspeed_config
    write = {"deepspeed": deepspeed_config, "accelerate": accelerate_config}[target]
    gpu = "B200-SXM-180GB"
    assert write(job(Strategy(dp=8, zero=3), gpu=gpu))
    with pytest.raises(BadInput, match=precision.split("-")[0]): write(job(Strategy(dp=8, zero=3, precision=precision), gpu=gpu))
