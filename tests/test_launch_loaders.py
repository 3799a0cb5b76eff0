"""Kubernetes, SkyPilot, Ray and DeepSpeed themselves, each in an environment of its own: they read, and where a CPU allows run, what is emitted."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from environments import digits_alone, own_environment, read_by_one
from test_launch_files import JOBS

from fsdl_devinfra.core.errors import CheckError
from fsdl_devinfra.launch import Job, launch, write_files
from fsdl_devinfra.launch.job import DIGITS_SCRIPT
from fsdl_devinfra.launch.validation import read_by_loader
from fsdl_devinfra.memory import Strategy, Workload

pytestmark = pytest.mark.slow
TOLERANCE = 1e-5  # fp32 sums in another order


@pytest.fixture(scope="module")
def kubernetes(): return own_environment("kubernetes", "kubernetes-validate>=1.30") / "python"


@pytest.fixture(scope="module")
def skypilot(): return own_environment("skypilot", "skypilot>=0.10", inherit=True) / "python"  # its own click comes first


@pytest.fixture(scope="module")
def ray():
    pytest.importorskip("torch")
    return own_environment("ray", "ray[train]>=2.40", inherit=True)


@pytest.fixture(scope="module")
def deepspeed():
    pytest.importorskip("torch")
    return own_environment("deepspeed", "deepspeed>=0.17", inherit=True, env={"DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"})


def texts(name: str, target: str) -> dict[str, str]:
    return {f.path: f.content for f in launch(JOBS[name], target).files}


def test_kubernetes_schemas_read_every_job(kubernetes):
    for name in JOBS: assert read_by_loader("kubernetes", texts(name, "kubernetes"), python=str(kubernetes)), name


@pytest.mark.parametrize("good,bad", [("backoffLimit", "backofLimit"), ("completions: 2", "completions: two"), ("clusterIP: \"None\"", "clusterIP: [1]"), ("mountPath", "mountpath")])
def test_kubernetes_schemas_refuse_what_is_wrong(kubernetes, good, bad):
    files = texts("fsdp", "kubernetes")
    assert good in files["job.yaml"]
    with pytest.raises(CheckError, match="refuses"): read_by_loader("kubernetes", {"job.yaml": files["job.yaml"].replace(good, bad)}, python=str(kubernetes))


def test_skypilot_reads_every_task(skypilot):
    good = [texts(name, "skypilot") for name in ("ddp", "fsdp", "digits")]
    task, bad = good[1]["task.yaml"], []
    for right, wrong in (("num_nodes: 2", "num_nodes: two"), ("accelerators:", "accelerator:"), ("setup:", "set_up:")):
        assert right in task
        bad.append({**good[1], "task.yaml": task.replace(right, wrong)})
    said = read_by_one(skypilot, "skypilot", [*good, *bad])
    assert said[:3] == ["", "", ""] and all(said[3:]), said
    with pytest.raises(CheckError, match="refuses"): read_by_loader("skypilot", bad[0], python=str(skypilot))


def test_deepspeed_reads_every_configuration(deepspeed):
    ways = [dict(zero=1, precision="fp16-mixed"), dict(zero=2, offload="optimizer"), dict(zero=3, offload="parameters")]
    good = []
    for way in ways:
        job = Job("train-a", Strategy(dp=8, framework="deepspeed", **way), Workload(1024, 2, 2), "H100-SXM-80GB", 8, 8, ("train.py",))
        good.append({f.path: f.content for f in launch(job, "deepspeed").files})
    bad = json.loads(good[-1]["ds_config.json"])
    bad["zero_optimization"]["nonsense"] = 1
    wrong = {"ds_config.json": json.dumps(bad)}
    said = read_by_one(deepspeed / "python", "deepspeed", [*good, wrong])
    assert said[:3] == ["", "", ""] and "nonsense" in said[3], said


def reference(steps: int, batch: int, clip: float) -> list[float]:
    """One process, plain PyTorch, gradients clipped as DeepSpeed's file says."""
    import torch
    from torch.nn import functional as F
    from fsdl_devinfra.hub.digits import DigitsViT, held_out
    torch.manual_seed(0)
    model, (images, labels) = DigitsViT(), held_out()
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2, foreach=False), []
    for step in range(steps):
        rows = (torch.arange(batch) + step * batch) % len(labels)
        loss = F.cross_entropy(model(images[rows]), labels[rows])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step(); optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def started(bin: Path, target: str, strategy: Strategy, folder: Path) -> dict:
    """Write the launcher's files, start its own command with two ranks on the CPU, and read the losses."""
    out = folder / "losses.json"
    job = Job("train-digits", strategy, Workload(17, 16, 2), "H100-SXM-80GB", 2, 8, cpu=True)
    found = launch(job, target)
    write_files(found, folder)
    (folder / "train_digits.py").write_text(DIGITS_SCRIPT.replace("leave(main(DigitsViT, held_out))", f"import sys; leave(main(DigitsViT, held_out, [*sys.argv[1:], '--out', {str(out)!r}]))"))
    env = {**os.environ, "PATH": f"{bin}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "RAY_USAGE_STATS_ENABLED": "0"}
    command = found.command.replace("accelerate launch", f"{bin / 'python'} -m accelerate.commands.launch")  # of this environment
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    return json.loads(out.read_text())


def test_deepspeed_trains_with_the_losses_of_one_process(deepspeed, tmp_path):
    """deepspeed, its engine and ds_config.json: two ranks, two accumulated micro-batches of 16 each.

    ZeRO 3 here; accelerate starts ZeRO 2 below, whose optimizer is ZeRO 1's as well."""
    got = started(deepspeed, "deepspeed", Strategy(dp=2, zero=3, framework="deepspeed", precision="fp32"), tmp_path)
    expected = reference(10, 64, json.loads((tmp_path / "ds_config.json").read_text())["gradient_clipping"])
    assert got["world"] == 2 and max(abs(a - b) for a, b in zip(got["losses"], expected, strict=True)) < TOLERANCE


def test_accelerate_starts_deepspeed_too(deepspeed, tmp_path):
    got = started(deepspeed, "accelerate", Strategy(dp=2, zero=2, framework="deepspeed", precision="fp32"), tmp_path)
    assert max(abs(a - b) for a, b in zip(got["losses"], reference(10, 64, 1.0), strict=True)) < TOLERANCE


def test_ray_train_starts_two_workers(ray, tmp_path):
    assert read_by_loader("ray", texts("fsdp", "ray"), python=str(ray / "python"))
    got = started(ray, "ray", Strategy(dp=2), tmp_path)
    assert got["world"] == 2 and max(abs(a - b) for a, b in zip(got["losses"], digits_alone(), strict=True)) < TOLERANCE
