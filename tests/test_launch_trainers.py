"""Trainers' own files: every value of the plan is in them or said aloud, and a fault in any line is noticed."""
from __future__ import annotations

import ast
import json
import subprocess
import sys
from dataclasses import replace

import pytest

from fsdl_devinfra.core.errors import BadInput, CheckError
from fsdl_devinfra.launch import TARGETS, Job, launch
from fsdl_devinfra.launch.carried import plan_values
from fsdl_devinfra.launch.job import Emitted
from fsdl_devinfra.launch.validation import LOADERS, OWN, validate
from fsdl_devinfra.memory import Strategy, Workload

yaml = pytest.importorskip("yaml")
TRAINERS = ("torchtitan", "megatron-bridge", "trl", "axolotl", "llama-factory")
MAIN = {"torchtitan": "plan_config.py", "megatron-bridge": "pretrain_plan.py", "trl": "sft.yaml", "axolotl": "axolotl.yaml", "llama-factory": "train.yaml"}


@pytest.fixture(autouse=True)
def no_loaders(monkeypatch):
    """Our own checks only: accelerate's loader takes seconds each time."""
    monkeypatch.setattr("fsdl_devinfra.launch.validation.read_by_loader", lambda *_: None)


def job(micro=2, accum=3, seq=1536, **said):
    s = Strategy(**said)
    return Job("train-a", s, Workload(seq, micro, accum), "H100-SXM-80GB", s.gpus, 8, model="meta-llama/Llama-3.1-8B")


def values(target, found):
    """The main file as path → value, by a reader that is not ours."""
    text = next(f.content for f in found.files if f.path == MAIN[target])
    if MAIN[target].endswith(".yaml"): return yaml.safe_load(text)
    function = next(n for n in ast.parse(text).body if getattr(n, "name", "") == "planned")
    return {ast.unparse(n.targets[0])[7:]: ast.unparse(n.value) for n in ast.walk(function) if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Attribute)}


WAYS = [dict(dp=8), dict(dp=8, zero=3, recompute="full"), dict(dp=8, zero=2, framework="deepspeed", offload="optimizer"), dict(dp=4, zero=3, lora_rank=24, base_weights="nf4", lora_targets="attention"),
        dict(dp=2, zero=3, precision="bf16", compile=True, loss="fused", optimizer="adamw-8bit")]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("target,names", [("trl", ("per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "lora_r")), ("axolotl", ("micro_batch_size", "gradient_accumulation_steps", "sequence_len", "lora_r")),
                                          ("llama-factory", ("per_device_train_batch_size", "gradient_accumulation_steps", "cutoff_len", "lora_rank"))])
def test_fine_tuning_files_say_what_the_plan_says(target, names, way):
    j = job(**way)
    found = launch(j, target)
    v, s = values(target, found), j.strategy
    assert [v.get(n) for n in names] == [2, 3, 1536, s.lora_rank]
    assert bool(v.get("bf16") or v.get("pure_bf16") or v.get("dtype") == "bfloat16") == (s.precision != "fp32") and not v.get("fp16")
    assert v["torch_compile"] == s.compile and bool(v.get("load_in_4bit") or v.get("quantization_bit") == 4) == (s.base_weights == "nf4")
    by_file = [f.content for f in found.files if f.path != MAIN[target]]
    again = bool(v.get("gradient_checkpointing", not v.get("disable_gradient_checkpointing", True)))
    under_fsdp = any("activation_checkpointing: true" in t for t in by_file) or bool((v.get("fsdp_config") or {}).get("activation_checkpointing"))
    assert (again or under_fsdp) == (s.recompute == "full") and not (again and under_fsdp)
    if s.framework == "deepspeed":
        deep = json.loads(next(f.content for f in found.files if f.path == "ds_config.json"))
        assert deep["zero_optimization"]["stage"] == 2 and deep["zero_optimization"]["offload_optimizer"]["device"] == "cpu" and deep["train_batch_size"] == 48
    optimizer = str(v.get("optim") or v.get("optimizer"))
    eight = "adamw_torch_8bit" if target == "axolotl" and s.zero == 3 else "adamw_bnb_8bit"  # Axolotl's schema: FSDP2 takes torchao's alone
    assert optimizer == {"adamw": "adamw_torch_fused", "adamw-8bit": eight}[s.optimizer]


@pytest.mark.parametrize("way", [dict(dp=4, tp=2, zero=3), dict(dp=2, tp=2, pp=2, framework="megatron"), dict(dp=8, zero=3, shard_group=4, recompute="selective"), dict(dp=2, cp=4, zero=3, compile=True)])
def test_pretraining_files_say_what_the_plan_says(way):
    j = job(**way)
    s, dp = j.strategy, j.strategy.dp
    titan, bridge = values("torchtitan", launch(j, "torchtitan")), values("megatron-bridge", launch(j, "megatron-bridge"))
    get = lambda v, *names: [ast.literal_eval(v[n]) for n in names]  # noqa: E731
    shard, copies = get(titan, "parallelism.data_parallel_shard_degree", "parallelism.data_parallel_replicate_degree")
    assert shard * copies == dp and (shard > 1) == (s.zero > 0) and (not s.shard_group or shard == 4)
    assert get(titan, *(f"parallelism.{k}_parallel_degree" for k in ("tensor", "pipeline", "context"))) == [s.tp, s.pp, s.cp]
    assert get(titan, "training.num_tokens_per_train_step", "training.max_context_length", "compile.enable") == [2 * 3 * 1536 * dp, 1536, s.compile]
    assert titan["activation_checkpoint"] == {"none": "None", "selective": "SelectiveAC.Config()", "full": "FullAC.Config()"}[s.recompute]
    assert get(bridge, *(f"model.{k}_size" for k in ("tensor_model_parallel", "pipeline_model_parallel", "context_parallel"))) == [s.tp, s.pp, s.cp]
    assert get(bridge, "train.micro_batch_size", "train.global_batch_size", "model.seq_length", "dataset.seq_length") == [2, 6 * dp, 1536, 1536]
    assert get(bridge, "model.sequence_parallel", "ddp.use_megatron_fsdp") == [s.tp > 1, s.zero == 3]


def test_what_is_not_carried_is_said():
    """Every choice that is not a trainer's usual: in the notes of each trainer whose files do not say it."""
    rare = job(dp=8, zero=3, optimizer="muon", optimizer_in_backward=True, loss="chunked", recompute="selective", grad_dtype="bf16")
    for target in TRAINERS:
        notes = " ".join(launch(rare, target).notes)
        assert "optimizer step in the backward pass" in notes and "chunked loss" in notes, target
        assert ("the optimizer muon" in notes) == (target != "axolotl") and ("activation checkpointing: selective" in notes) == (target not in ("torchtitan", "megatron-bridge"))
    assert {"optimizer", "loss", "grad_dtype", "recompute"} <= plan_values(rare).keys()


#: where a trainer's file names the attention kernel, and what it says there of a model that has none
KERNEL = {"trl": ("attn_implementation", None), "axolotl": ("attn_implementation", None), "llama-factory": ("flash_attn", "disabled"),
          "megatron-bridge": ("model.attention_backend", None)}


@pytest.mark.parametrize("target", KERNEL)
def test_a_model_without_attention_is_not_told_a_kernel_of_it(target):
    """Transformers refuses FlashAttention for a Mamba when it loads it; the plan says whether the model attends."""
    name, without = KERNEL[target]
    j = job(dp=8, zero=3)
    assert "flash" in str(values(target, launch(j, target))[name]).lower() or values(target, launch(j, target))[name] == "fa2"
    other = launch(replace(j, attends=False), target)
    assert values(target, other).get(name) == without
    assert "flash attention" not in " ".join(other.notes) and "attention" in plan_values(j) and "attention" not in plan_values(replace(j, attends=False))


def test_a_plan_says_whether_its_model_attends(tmp_path):
    from fsdl_devinfra.compute.planning import plan
    from fsdl_devinfra.core import find_device
    from fsdl_devinfra.launch.job import read_job
    from fsdl_devinfra.memory.architecture import Architecture
    mamba = dict(model_type="mamba", vocab_size=50280, hidden_size=768, num_hidden_layers=24, state_size=16, conv_kernel=4, intermediate_size=1536, time_step_rank=48)
    llama = dict(model_type="llama", vocab_size=32000, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=2048)
    for config, attends in ((mamba, False), (llama, True)):
        plan(Architecture.from_config(config), find_device("h100"), 1).save(tmp_path / "plan.json")
        assert read_job(tmp_path / "plan.json").attends is attends


@pytest.mark.parametrize("target", TRAINERS)
def test_a_fault_in_any_line_is_noticed(target):
    j = job(dp=8, zero=3, recompute="full")
    files = {f.path: f.content for f in launch(j, target).files}
    OWN[target](j, files)
    lines = files[MAIN[target]].splitlines()
    wanted = [i for i, line in enumerate(lines) if (line.startswith("    config.") if MAIN[target].endswith(".py") else ": " in line)]
    assert len(wanted) > 12
    for i in wanted:
        for wrong in (lines[i] + "1", ""):  # another value, and none
            broken = "\n".join([*lines[:i], wrong, *lines[i + 1:]]) + "\n"
            with pytest.raises(CheckError): OWN[target](j, {**files, MAIN[target]: broken})
    with pytest.raises(CheckError): validate(target, replace(j, workload=Workload(1536, 2, 5)), Emitted(files, ""))


@pytest.mark.parametrize("target,way,why", [("torchtitan", dict(dp=8, zero=1, framework="deepspeed"), "no ZeRO-1"), ("trl", dict(dp=4, tp=2, zero=3), "tp 2"), ("axolotl", dict(dp=4, pp=2), "pp"),
                                            ("llama-factory", dict(dp=4, cp=2, zero=3), "cp 2"), ("megatron-bridge", dict(precision="fp32"), "fp32")])
def test_what_cannot_run_is_refused(target, way, why):
    with pytest.raises(BadInput, match=why): launch(job(**way), target)


def test_a_configuration_of_ones_own():
    found = launch(replace(job(dp=8), script=("mine.runs:small", "--training.steps", "5")), "torchtitan")
    assert "from mine.runs import small\n" in found.files[0].content and found.files[1].content.rstrip().endswith("--training.steps 5")


def test_validated_by_names_who_read_it():
    assert "has not read" in launch(job(dp=8), "torchtitan").validated_by
    assert set(TRAINERS) <= TARGETS.keys() == OWN.keys()


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_trl_reads_its_file(way, tmp_path):
    """TRL's own parser, where it is installed, and a key that it does not know."""
    pytest.importorskip("trl")
    text = launch(job(**way), "trl").files[0].content
    for content, good in ((text, True), (text + "nonsense: 1\n", False)):
        (tmp_path / "sft.yaml").write_text(content)
        done = subprocess.run([sys.executable, "-c", LOADERS["trl"][2]], cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode == 0) == good, done.stderr[-500:]
