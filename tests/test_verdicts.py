"""The verdicts that everything else hangs on, pinned at their edges: a fault that turns one round must be noticed."""
from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fsdl_devinfra.compute.planning import _headline
from fsdl_devinfra.compute.prices import Price, cheapest, credible
from fsdl_devinfra.core.device_table import find_device
from fsdl_devinfra.core.errors import BadInput, CheckError
from fsdl_devinfra.core.estimates import Estimate
from fsdl_devinfra.core.units import GIB
from fsdl_devinfra.env.difference import _judge, diff
from fsdl_devinfra.env.environment import _finished
from fsdl_devinfra.hub import lock, verify
from fsdl_devinfra.hub.layout import Skipped
from fsdl_devinfra.hub.locks import LockedFile, ModelLock
from fsdl_devinfra.hub.signing import WrongSignature, _compare
from fsdl_devinfra.hub.verification import _is_as_skipped, is_right, remember_folder
from fsdl_devinfra.launch import Job
from fsdl_devinfra.launch.finetuning import axolotl_settings, llama_factory_settings, trl_settings
from fsdl_devinfra.launch.frameworks import accelerate_config, deepspeed_config
from fsdl_devinfra.launch.pretraining import bridge_settings, titan_settings
from fsdl_devinfra.memory import Architecture, Strategy, Workload, estimate
from fsdl_devinfra.memory.activations import attention_bytes, autocast, core_bytes, logit_bytes, mlp_bytes
from fsdl_devinfra.memory.engines import Flow, Share, _accumulated, reduced_bytes, step_on, timeline
from fsdl_devinfra.memory.footprint import _fits
from fsdl_devinfra.memory.states import recipe, sharded_states
from fsdl_devinfra.parity import causes
from fsdl_devinfra.parity.causes import by_optimisation
from fsdl_devinfra.parity.padding import _attended, _softened, explained_by_padding, hidden_positions, with_hidden
from fsdl_devinfra.parity.rule import Block, Rule, blocks, compare, scale_of
from fsdl_devinfra.preflight import PreflightContext, PreflightReport, Step, run_step
from hub_files import one, write

LLAMA_1B = dict(layers=16, hidden=2048, heads=32, vocab=128256, ffn=8192, kv_heads=8, name="1B")


def estimated(memory_bytes: int | None):
    device = find_device("h100") if memory_bytes else None
    if device: device = replace(device, usable_gib=memory_bytes / GIB)
    return estimate(Architecture.from_numbers(**LLAMA_1B), Strategy(), Workload(2048, 1), device)


@pytest.mark.parametrize("limit, verdict", [(9, "no"), (10, "tight"), (11, "tight"), (15, "tight"), (19, "tight"), (20, "yes"), (21, "yes"), (None, None)])
def test_the_edges_of_a_verdict(limit, verdict):
    """It fits where the most it may need is there, does not below the least, and is tight between."""
    assert _fits(Estimate(15, 10, 20), limit) == verdict


@pytest.mark.parametrize("gib", [8, 24, 30, 32, 34, 36, 38, 40, 44, 80])
def test_a_footprint_judges_the_device_figure(gib):
    found = estimated(gib * GIB)
    bounds = found.device_bytes
    assert found.fits == ("yes" if bounds.high <= gib * GIB else "no" if bounds.low > gib * GIB else "tight")


def test_all_three_verdicts_are_reached():
    assert [estimated(gib * GIB).fits for gib in (8, 36, 80)] == ["no", "tight", "yes"]


def test_without_a_gpu_there_is_no_verdict():
    assert estimated(None).fits is None


@pytest.mark.parametrize("verdicts, whole, status", [
    (["pass", "pass"], "pass", 0), (["pass", "not-run"], "not-run", 2), (["pass", "fail"], "fail", 1),
    (["not-run", "fail"], "fail", 1), (["fail", "not-run", "pass"], "fail", 1), ([], "pass", 0)])
def test_a_failed_step_outweighs_one_that_was_not_run(verdicts, whole, status):
    report = PreflightReport("m", {"name": "g"}, 1, [Step(str(i), v, 0.0, "said") for i, v in enumerate(verdicts)])
    assert (report.verdict, report.status) == (whole, status)
    document = report.to_dict()
    assert document["verdict"] == whole
    assert ("error" in document) == (whole == "not-run")


def raises(error: Exception):
    def step(run): raise error
    return step


FINDING = CheckError("the bytes differ")
FINDING.status = 1


@pytest.mark.parametrize("step, verdict, made", [
    (lambda run: (True, "said", "result"), "pass", True), (lambda run: (False, "said", "result"), "fail", False),
    (raises(BadInput("no such model", "Name another")), "not-run", False), (raises(FINDING), "fail", False)])
def test_only_a_step_that_holds_is_built_upon(tmp_path, capsys, step, verdict, made):
    run = PreflightContext("m", tmp_path, tmp_path, [find_device("h100")], quiet=True)
    noted = run_step(run, "first", step)
    assert noted.verdict == verdict and ("first" in run.made) == made
    assert run.steps == [noted] and 0 <= noted.seconds < 5
    assert capsys.readouterr().err == ""  # quiet means quiet


def test_a_step_says_what_it_is_doing_where_it_is_not_quiet(tmp_path, capsys):
    run = PreflightContext("m", tmp_path, tmp_path, [find_device("h100")])
    run_step(run, "first", lambda run: (True, "two\nlines", None))
    said = capsys.readouterr().err
    assert "first" in said and "two" in said and "lines" not in said


# --- bytes of the states

@pytest.mark.parametrize("strategy, bytes_each", [
    (Strategy(precision="fp32"), (4, 4, 8)), (Strategy(precision="bf16"), (2, 2, 4)), (Strategy(), (4, 4, 8)),
    (Strategy(framework="megatron"), (2, 2, 12)), (Strategy(framework="deepspeed", optimizer="sgd"), (2, 2, 8)),
    (Strategy(framework="deepspeed", optimizer="none"), (2, 2, 0)), (Strategy(framework="deepspeed", grad_dtype="fp32"), (2, 4, 12)),
    (Strategy(framework="megatron", grad_dtype="fp32"), (2, 2, 12)), (Strategy(optimizer="lion"), (4, 4, 4)),
    (Strategy(precision="bf16", optimizer="adamw-8bit"), (2, 2, 2 + 8 / 256))])
def test_bytes_of_a_trainable_parameter(strategy, bytes_each):
    found = recipe(strategy)
    assert (found.weight, found.grad, found.optimizer) == bytes_each


@pytest.mark.parametrize("zero, whole", [(0, (16, 16, 32)), (1, (16, 16, 8)), (2, (16, 4, 8)), (3, (4, 4, 8))])
def test_zero_shards_one_state_after_another(zero, whole):
    assert sharded_states(4, Strategy(dp=4, zero=zero)) == whole


# --- the same outputs, or not

def compared(got, torch_value, truth, **options):
    arrays = [np.asarray(a, np.float32) for a in (got, torch_value)]
    return compare("y", *arrays, np.asarray(truth, np.float64), **options)


def test_as_wrong_as_torch_passes_and_far_wronger_does_not():
    truth = np.linspace(-1, 1, 64)
    own = truth + 1e-5
    assert compared(truth - 1e-5, own, truth).verdict == "pass"
    assert compared(truth - 1e-5 * Rule().factor * 0.99, own, truth).verdict == "pass"
    assert compared(truth - 1e-5 * Rule().factor * 1.05, own, truth).verdict == "fail"


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_one_nan_or_infinity_fails(wrong):
    truth = np.linspace(-1, 1, 64)
    got = truth.copy()
    got[7] = wrong
    found = compared(got, truth, truth)
    assert (found.verdict, found.nonfinite) == ("fail", 1)


def test_integers_are_exact():
    numbers = np.arange(6)
    same = compare("y", numbers, numbers, numbers.astype(float))
    other = compare("y", numbers + (numbers == 3), numbers, numbers.astype(float))
    assert (same.verdict, same.error, same.reference_error, same.ratio, same.why) == ("pass", 0.0, 0.0, 0.0, "")
    assert (other.verdict, other.error, other.reference_error, other.ratio, other.max_abs) == ("fail", 1 / 6, 0.0, float("inf"), 1.0)
    assert other.why == "1 integers or booleans differ"


def test_integers_that_rounding_decides_may_differ():
    numbers, ties = np.arange(6), np.arange(6) == 3
    tied = compare("y", numbers + ties, numbers, numbers.astype(float), ties=ties)
    assert (tied.verdict, tied.why) == ("pass", "1 integers or booleans differ where rounding decides")
    both = compare("y", numbers + ties + (numbers == 4), numbers, numbers.astype(float), ties=ties)
    assert (both.verdict, both.error, both.why) == ("fail", 1 / 6, "1 integers or booleans differ")
    assert compare("y", numbers + ties, numbers, numbers.astype(float), ties=np.ones(5, bool)).verdict == "fail"  # not of this output
    assert compare("y", np.array([2]), np.array([1]), np.array([1.0])).error == 1.0


def test_an_error_as_large_as_allowed_passes_and_says_nothing():
    "Powers of two: every number here is exact."
    truth = np.array([4.0, 0.5])
    own, got = truth + [2.0**-10, 0], truth + [Rule().factor * 2.0**-10, 0]
    found = compared(got, own, truth)
    assert (found.verdict, found.ratio, found.error, found.reference_error, found.why) == ("pass", Rule().factor, Rule().factor * 2.0**-12, 2.0**-12, "")
    worse = compared(truth + [16 * 2.0**-10, 0], own, truth)
    assert (worse.verdict, worse.ratio, worse.why) == ("fail", 16.0, "error is 16 times torch's own")


def test_measured_rounding_is_named_where_it_was_not_enough():
    truth = np.array([4.0, 0.5])
    own, got = truth + [2.0**-10, 0], truth + [64 * 2.0**-10, 0]
    found = compared(got, own, truth, noise=np.array([2 * 2.0**-10, 0]))
    assert (found.verdict, found.ratio) == ("fail", 32.0)
    assert found.why == "error is 64 times torch's own, and 32 times what rounding was measured to do there"
    assert compared(got, own, truth, noise=np.array([32 * 2.0**-10, 0])).verdict == "pass"


@pytest.mark.parametrize(("rule", "differences", "why"), [
    (Rule(atol=0.5), (0.5, 0.5), ""), (Rule(atol=0.5), (0.75, 0.5), "1 value beyond the fixed tolerance"),
    (Rule(atol=0.5), (0.75, 0.75), "2 values beyond the fixed tolerance"),
    (Rule(rtol=0.25), (1.0, 1.0), ""), (Rule(rtol=0.25), (1.5, 1.0), "1 value beyond the fixed tolerance")])
def test_a_fixed_tolerance_holds_at_its_edge(rule, differences, why):
    truth = np.array([4.0, 4.0])
    found = compared(truth + differences, truth, truth, rule=rule)
    assert (found.verdict, found.why) == ("fail" if why else "pass", why)


@pytest.mark.parametrize(("places", "why"), [(1, "1 value NaN or infinite on one side only"), (2, "2 values NaN or infinite on one side only")])
def test_what_is_no_number_is_counted(places, why):
    truth = np.linspace(-1, 1, 8)
    got = truth.copy()
    got[:places] = np.nan
    assert compared(got, truth, truth).why == why


def test_another_shape_fails():
    assert compared(np.zeros(3), np.zeros(4), np.zeros(4)).verdict == "fail"


def test_a_fixed_tolerance_is_absolute_plus_relative():
    rule = Rule(atol=0.5, rtol=0.25)
    truth = np.array([4.0, 4.0])
    assert compared(truth + 1.49, truth, truth, rule=rule).verdict == "pass"
    assert compared(truth + 1.51, truth, truth, rule=rule).verdict == "fail"


# --- the same bytes, or not

@pytest.fixture
def locked(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "weights.bin").write_bytes(bytes(range(200)))
    return lock(str(tmp_path / "model")), tmp_path / "model"


def test_what_was_locked_verifies(locked):
    found = verify(*locked, full=True)
    assert found.ok and not found.problems and found.files_checked == 2


@pytest.mark.parametrize("kind, damage", [
    ("hash", lambda f: f.write_bytes(b"\xff" + f.read_bytes()[1:])), ("size", lambda f: f.write_bytes(f.read_bytes()[:-1])),
    ("missing", lambda f: f.unlink())])
def test_each_damage_is_named(locked, kind, damage):
    model, folder = locked
    damage(folder / "weights.bin")
    found = verify(model, folder, full=True)
    assert not found.ok and [(p.path, p.kind) for p in found.problems] == [("weights.bin", kind)]


def test_a_file_is_read_again_only_where_it_changed(locked):
    model, folder = locked
    assert verify(model, folder, full=True).bytes_hashed == 202
    assert verify(model, folder).bytes_hashed == 0
    (folder / "weights.bin").write_bytes(bytes(reversed(range(200))))
    assert not verify(model, folder).ok


def test_a_file_by_itself(locked):
    model, folder = locked
    entry = next(f for f in model.files if f.path == "weights.bin")
    file = folder / "weights.bin"
    read: list[int] = []
    assert is_right(file, entry, advance=read.append) and sum(read) == 200
    read.clear()
    assert is_right(file, entry, advance=read.append) and read == []  # known, and not read again
    assert is_right(file, entry, full=True, advance=read.append) and sum(read) == 200
    file.write_bytes(file.read_bytes() + b"\0")
    assert not is_right(file, entry)
    assert not is_right(folder, entry) and not is_right(folder / "nothing", entry)


# --- what launch writes: the plan's degrees, batch, recomputation and offload in the words of each target

def job(cpu: bool = False, model: str = "org/m", script: tuple[str, ...] = ("train.py",), per_node: int = 8, **how) -> Job:
    strategy = Strategy(**how)
    return Job("j", strategy, Workload(1024, 2, 3), "H100-SXM-80GB", strategy.gpus, per_node, script, cpu=cpu, model=model)


def titan(a_job: Job): return {k.split(".", 1)[-1]: v for k, v in titan_settings(a_job)[0].items()}
def bridge(a_job: Job): return bridge_settings(a_job)[0]
def accelerate_fsdp(a_job: Job): return accelerate_config(a_job)["fsdp_config"]
def accelerate_degrees(a_job: Job):
    return {k.removeprefix("parallelism_config_"): v for k, v in accelerate_config(a_job)["parallelism_config"].items()}


ABSENT = object()
SHARDED = dict(dp=4, zero=3)
DEEP = dict(dp=4, zero=2, framework="deepspeed")
PARTS = dict(dp=4, tp=2, cp=2, zero=3)
MEGATRON = dict(framework="megatron", dp=4)
LORA = dict(lora_rank=8)
KINDS = "distributed_type"
WRITTEN = [
    # accelerate: who shards
    (accelerate_config, {}, {KINDS: "NO", "mixed_precision": "bf16", "machine_rank": 0, "num_machines": 1, "num_processes": 1, "use_cpu": False,
                             "debug": False, "same_network": True, "rdzv_backend": "static", "main_process_ip": ABSENT, "dynamo_config": ABSENT,
                             "parallelism_config": ABSENT, "fsdp_config": ABSENT, "deepspeed_config": ABSENT}),
    (accelerate_config, dict(dp=2), {KINDS: "MULTI_GPU", "num_processes": 2}),
    (accelerate_config, dict(dp=2, zero=1), {KINDS: "DEEPSPEED", "mixed_precision": ABSENT, "fsdp_config": ABSENT}),
    (accelerate_config, dict(dp=2, zero=1, tp=2), {KINDS: "FSDP"}),
    (accelerate_config, dict(dp=2, zero=1, cp=2), {KINDS: "FSDP"}),
    (accelerate_config, dict(dp=2, zero=2), {KINDS: "FSDP", "mixed_precision": "bf16"}),
    (accelerate_config, dict(dp=2, zero=3), {KINDS: "FSDP", "parallelism_config": ABSENT}),
    (accelerate_config, dict(tp=2), {KINDS: "FSDP"}),
    (accelerate_config, dict(cp=2), {KINDS: "FSDP"}),
    (accelerate_config, dict(dp=2, framework="deepspeed"), {KINDS: "DEEPSPEED"}),
    (accelerate_config, dict(dp=2, framework="deepspeed", zero=3), {KINDS: "DEEPSPEED", "deepspeed_config": {
        "deepspeed_config_file": "ds_config.json", "zero3_init_flag": True}}),
    (accelerate_config, DEEP, {"deepspeed_config": {"deepspeed_config_file": "ds_config.json", "zero3_init_flag": False}}),
    (accelerate_config, dict(dp=16), {"num_machines": 2, "main_process_ip": "node-1", "rdzv_backend": "c10d"}),
    (accelerate_config, dict(dp=2, precision="fp32"), {"mixed_precision": "no"}),
    (accelerate_config, dict(dp=2, cpu=True), {"mixed_precision": "no"}),
    (accelerate_config, dict(compile=True), {"dynamo_config": {"dynamo_backend": "INDUCTOR", "dynamo_mode": "default",
                                                               "dynamo_use_dynamic": False, "dynamo_use_fullgraph": False}}),
    (accelerate_config, dict(tp=2, framework="megatron", script=()), {KINDS: "FSDP"}),
    (accelerate_config, dict(dp=2, framework="megatron"), {KINDS: "MULTI_GPU"}),
    (accelerate_config, DEEP | dict(offload="optimizer"), {KINDS: "DEEPSPEED"}),
    (accelerate_fsdp, SHARDED | dict(offload="parameters", recompute="full"), {
        "fsdp_version": 2, "fsdp_reshard_after_forward": True, "fsdp_offload_params": True, "fsdp_activation_checkpointing": True,
        "fsdp_cpu_ram_efficient_loading": True}),
    (accelerate_fsdp, dict(dp=4, zero=2), {"fsdp_reshard_after_forward": False, "fsdp_offload_params": False, "fsdp_activation_checkpointing": False}),
    (accelerate_degrees, PARTS, {"dp_replicate_size": 1, "dp_shard_size": 4, "tp_size": 2, "cp_size": 2}),
    (accelerate_degrees, dict(dp=8, zero=3, shard_group=4), {"dp_replicate_size": 2, "dp_shard_size": 4, "tp_size": 1, "cp_size": 1}),
    (accelerate_degrees, dict(dp=2, zero=3, cp=2), {"dp_shard_size": 2, "cp_size": 2}),
    (accelerate_degrees, dict(dp=2, zero=3, tp=2), {"dp_shard_size": 2, "tp_size": 2}),
    # TRL
    (trl_settings, dict(dp=2), {
        "model_name_or_path": "org/m", "dtype": "float32", "max_length": 1024, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3,
        "attn_implementation": "flash_attention_2", "bf16": True, "fp16": False, "gradient_checkpointing": False, "activation_offloading": False,
        "torch_compile": False, "use_liger_kernel": False, "packing": False, "optim": "adamw_torch_fused", "use_peft": ABSENT,
        "load_in_4bit": ABSENT, "load_in_8bit": ABSENT}),
    (trl_settings, dict(precision="fp16-mixed", attention="eager", recompute="full", offload="activations", compile=True, loss="fused",
                        padding="packed", optimizer="sgd", model=""), {
        "model_name_or_path": "org/model", "attn_implementation": "eager", "bf16": False, "fp16": True, "gradient_checkpointing": True,
        "activation_offloading": True, "torch_compile": True, "use_liger_kernel": True, "packing": True, "optim": ABSENT}),
    (trl_settings, SHARDED | dict(recompute="full"), {"gradient_checkpointing": False}),  # FSDP's block recomputes
    (trl_settings, dict(cpu=True), {"bf16": False}),
    (trl_settings, dict(cpu=True, precision="fp16-mixed"), {"fp16": False}),
    (trl_settings, dict(precision="bf16"), {"dtype": "bfloat16", "bf16": False}),
    (trl_settings, dict(precision="fp32", **LORA), {"dtype": "float32"}),
    (trl_settings, LORA, {"dtype": "bfloat16", "use_peft": True, "lora_r": 8, "lora_alpha": 16, "lora_target_modules": ["all-linear"]}),
    (trl_settings, dict(precision="fp16-mixed", lora_targets="attention-qv", **LORA), {"dtype": "float16", "lora_target_modules": ["q_proj", "v_proj"]}),
    (trl_settings, dict(base_weights="nf4", **LORA), {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "load_in_8bit": ABSENT}),
    (trl_settings, dict(base_weights="int8", **LORA), {"load_in_8bit": True, "load_in_4bit": ABSENT}),
    # Axolotl
    (axolotl_settings, dict(dp=2), {
        "base_model": "org/m", "sequence_len": 1024, "micro_batch_size": 2, "gradient_accumulation_steps": 3, "learning_rate": 0.0002, "num_epochs": 1,
        "sample_packing": False, "pad_to_sequence_len": False, "bf16": True, "fp16": False, "attn_implementation": "flash_attention_2",
        "torch_compile": False, "gradient_checkpointing": False, "fp8": ABSENT, "activation_offloading": ABSENT, "optimizer": "adamw_torch_fused",
        "plugins": ABSENT, "adapter": ABSENT, "deepspeed": ABSENT, "fsdp_config": ABSENT}),
    (axolotl_settings, dict(precision="fp16-mixed", attention="eager", recompute="full", offload="activations", loss="fused", padding="packed",
                            optimizer="muon", model=""), {
        "base_model": "org/model", "bf16": False, "fp16": True, "attn_implementation": "eager", "gradient_checkpointing": True,
        "activation_offloading": True, "liger_fused_linear_cross_entropy": True, "sample_packing": True, "pad_to_sequence_len": True, "optimizer": "muon"}),
    (axolotl_settings, dict(padding="fixed", optimizer="sgd", precision="bf16"), {
        "sample_packing": False, "pad_to_sequence_len": True, "optimizer": ABSENT, "bf16": True}),
    (axolotl_settings, dict(precision="fp8-mixed"), {"bf16": True, "fp8": True}),
    (axolotl_settings, dict(cpu=True), {"bf16": False}),
    (axolotl_settings, dict(cpu=True, precision="fp16-mixed"), {"fp16": False}),
    (axolotl_settings, LORA, {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True, "load_in_4bit": ABSENT, "load_in_8bit": ABSENT}),
    (axolotl_settings, dict(base_weights="nf4", lora_targets="attention-qv", **LORA), {
        "adapter": "qlora", "load_in_4bit": True, "lora_target_linear": ABSENT, "lora_target_modules": ["q_proj", "v_proj"]}),
    (axolotl_settings, dict(base_weights="int8", **LORA), {"adapter": "lora", "load_in_8bit": True, "load_in_4bit": ABSENT}),
    (axolotl_settings, DEEP, {"deepspeed": "ds_config.json", "fsdp_config": ABSENT, "dp_shard_size": ABSENT}),
    (axolotl_settings, PARTS | dict(recompute="full", offload="parameters"), {
        "deepspeed": ABSENT, "fsdp_version": 2, "dp_shard_size": 4, "dp_replicate_size": 1, "tensor_parallel_size": 2, "context_parallel_size": 2,
        "fsdp_config": {"offload_params": True, "reshard_after_forward": True, "state_dict_type": "SHARDED_STATE_DICT",
                        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "cpu_ram_efficient_loading": True, "activation_checkpointing": True}}),
    (axolotl_settings, dict(dp=8, zero=2, shard_group=4), {
        "dp_shard_size": 4, "dp_replicate_size": 2, "fsdp_config": {
            "offload_params": False, "reshard_after_forward": False, "state_dict_type": "SHARDED_STATE_DICT",
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "cpu_ram_efficient_loading": True, "activation_checkpointing": False}}),
    # LLaMA-Factory
    (llama_factory_settings, dict(dp=2), {
        "model_name_or_path": "org/m", "do_train": True, "finetuning_type": "full", "cutoff_len": 1024, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3, "packing": False, "bf16": True, "fp16": False, "pure_bf16": False, "flash_attn": "fa2",
        "disable_gradient_checkpointing": True, "enable_liger_kernel": False, "torch_compile": False, "fp8": ABSENT, "optim": "adamw_torch_fused",
        "lora_rank": ABSENT, "quantization_bit": ABSENT, "deepspeed": ABSENT}),
    (llama_factory_settings, dict(precision="fp16-mixed", attention="eager", recompute="full", loss="fused", padding="packed", optimizer="sgd",
                                  model=""), {
        "model_name_or_path": "org/model", "bf16": False, "fp16": True, "flash_attn": "disabled", "disable_gradient_checkpointing": False,
        "enable_liger_kernel": True, "packing": True, "optim": ABSENT}),
    (llama_factory_settings, dict(precision="bf16"), {"bf16": True, "pure_bf16": True}),
    (llama_factory_settings, dict(precision="bf16", cpu=True), {"bf16": False, "pure_bf16": False}),
    (llama_factory_settings, dict(precision="fp16-mixed", cpu=True), {"fp16": False}),
    (llama_factory_settings, dict(precision="fp8-mixed"), {"bf16": True, "fp8": True}),
    (llama_factory_settings, LORA, {"finetuning_type": "lora", "lora_rank": 8, "lora_alpha": 16, "lora_target": "all", "quantization_bit": ABSENT}),
    (llama_factory_settings, dict(base_weights="nf4", lora_targets="attention-qv", **LORA), {
        "lora_target": "q_proj,v_proj", "quantization_bit": 4, "quantization_type": "nf4"}),
    (llama_factory_settings, dict(base_weights="int8", **LORA), {"quantization_bit": 8, "quantization_type": ABSENT}),
    (llama_factory_settings, DEEP, {"deepspeed": "ds_config.json"}),
    # torchtitan
    (titan, {}, {"data_parallel_replicate_degree": 1, "data_parallel_shard_degree": 1, "fsdp_reshard_after_forward": "never",
                 "tensor_parallel_degree": 1, "enable_sequence_parallel": False, "pipeline_parallel_degree": 1, "context_parallel_degree": 1,
                 "expert_parallel_degree": 1, "pipeline_parallel_schedule": "1F1B", "num_pp_microbatches": 1, "max_context_length": 1024,
                 "num_tokens_per_microbatch_per_dp_rank": 2048, "num_tokens_per_train_step": 6144, "dtype": "float32",
                 "mixed_precision_param": "bfloat16", "enable_cpu_offload": False, "disable_cuda_graphs": True, "enable": False,
                 "enable_async_tensor_parallel": False, "activation_checkpoint": "None"}),
    (titan, PARTS | dict(offload="parameters", recompute="full", compile=True, async_tp=True), {
        "data_parallel_replicate_degree": 1, "data_parallel_shard_degree": 4, "fsdp_reshard_after_forward": "always",
        "tensor_parallel_degree": 2, "enable_sequence_parallel": True, "context_parallel_degree": 2, "num_tokens_per_train_step": 6144 * 4,
        "enable_cpu_offload": True, "enable": True, "enable_async_tensor_parallel": True, "activation_checkpoint": "FullAC.Config()"}),
    (titan, dict(dp=8, zero=3, shard_group=4), {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 4}),
    (titan, dict(dp=8, cp=2, zero=3, shard_group=8), {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 4}),
    (titan, dict(dp=4), {"data_parallel_replicate_degree": 4, "data_parallel_shard_degree": 1}),
    (titan, dict(pp=2, precision="bf16", recompute="selective"), {
        "pipeline_parallel_degree": 2, "num_pp_microbatches": 3, "pipeline_parallel_schedule": "1F1B", "dtype": "bfloat16",
        "activation_checkpoint": "SelectiveAC.Config()"}),
    (titan, dict(pp=2, vpp=2, precision="fp32"), {
        "pipeline_parallel_schedule": "Interleaved1F1B", "dtype": "float32", "mixed_precision_param": "float32"}),
    (titan, dict(tp=2, async_tp=True), {"enable_async_tensor_parallel": False}),
    (titan, dict(tp=2, compile=True), {"enable_async_tensor_parallel": False}),
    # Megatron Bridge
    (bridge, MEGATRON, {
        "model.tensor_model_parallel_size": 1, "model.sequence_parallel": False, "model.pipeline_model_parallel_size": 1,
        "model.virtual_pipeline_model_parallel_size": None, "model.context_parallel_size": 1, "model.expert_model_parallel_size": 1,
        "model.expert_tensor_parallel_size": 1, "model.seq_length": 1024, "dataset.seq_length": 1024, "train.micro_batch_size": 2,
        "train.global_batch_size": 24, "model.recompute_granularity": None, "model.recompute_method": None, "model.recompute_num_layers": None,
        "model.recompute_modules": None, "mixed_precision": "bf16_mixed", "ddp.use_distributed_optimizer": False, "ddp.use_megatron_fsdp": False,
        "ddp.data_parallel_sharding_strategy": "no_shard", "optimizer.use_distributed_optimizer": False, "optimizer.optimizer_cpu_offload": False,
        "ddp.grad_reduce_in_fp32": ABSENT, "model.attention_backend": "AttnBackend.flash", "peft": ABSENT}),
    (bridge, MEGATRON | dict(tp=2, pp=2, vpp=2, cp=2, zero=1, recompute="full", offload="optimizer", grad_dtype="fp32", attention="eager"), {
        "model.tensor_model_parallel_size": 2, "model.sequence_parallel": True, "model.virtual_pipeline_model_parallel_size": 2,
        "model.expert_tensor_parallel_size": 2, "model.recompute_granularity": "full", "model.recompute_method": "uniform",
        "model.recompute_num_layers": 1, "model.recompute_modules": None, "ddp.use_distributed_optimizer": True, "ddp.use_megatron_fsdp": False,
        "ddp.data_parallel_sharding_strategy": "no_shard", "optimizer.use_distributed_optimizer": True, "optimizer.optimizer_cpu_offload": True,
        "ddp.grad_reduce_in_fp32": True, "model.attention_backend": ABSENT}),
    (bridge, MEGATRON | dict(zero=2, recompute="selective", grad_dtype="bf16"), {
        "ddp.use_megatron_fsdp": True, "dist.use_megatron_fsdp": True, "ddp.data_parallel_sharding_strategy": "optim_grads",
        "model.recompute_granularity": "selective", "model.recompute_method": None, "model.recompute_modules": ["core_attn"],
        "ddp.grad_reduce_in_fp32": False}),
    (bridge, MEGATRON | dict(zero=3), {"ddp.data_parallel_sharding_strategy": "optim_grads_params"}),
    (bridge, dict(framework="megatron", dp=1, tp=2, ep=2), {"model.expert_model_parallel_size": 2, "model.expert_tensor_parallel_size": 1}),
    (bridge, MEGATRON | dict(lora_targets="attention", **LORA), {"peft": "LoRA(target_modules=['linear_qkv', 'linear_proj'], dim=8, alpha=16)"}),
]


@pytest.mark.parametrize("written, how, expected", WRITTEN)
def test_what_launch_writes(written, how, expected):
    found = written(job(**how))
    assert {k: found.get(k, ABSENT) for k in expected} == expected


@pytest.mark.parametrize("written, how", [
    (accelerate_config, dict(pp=2)), (accelerate_config, dict(tp=2, framework="megatron")), (accelerate_config, dict(dp=2, offload="optimizer")),
    (accelerate_config, dict(precision="nvfp4-mixed")), (trl_settings, dict(tp=2)), (trl_settings, dict(dp=2, ep=2)), (axolotl_settings, dict(pp=2)),
    (llama_factory_settings, dict(cp=2)), (titan, dict(dp=2, zero=1)), (titan, dict(precision="fp16-mixed")), (titan, dict(cp=2)),
    (titan, dict(dp=8, cp=2, zero=3, shard_group=1)), (bridge, dict(framework="megatron", precision="fp32"))])
def test_what_launch_cannot_say_it_refuses(written, how):
    with pytest.raises(BadInput): written(job(**how))


@pytest.mark.parametrize("written, how", [
    (accelerate_config, {}), (accelerate_config, DEEP | dict(offload="optimizer")), (accelerate_config, dict(framework="megatron")), (trl_settings, dict(cp=2)),
    (axolotl_settings, dict(tp=2, cp=2)), (titan, dict(dp=2, zero=2)), (titan, dict(cp=2, zero=3)), (titan, dict(dp=2, zero=0))])
def test_and_what_launch_can_say_it_says(written, how):
    assert written(job(**how))


@pytest.mark.parametrize("how, names", [
    ({}, {"precision", "optimizer"}), (dict(precision="fp32", optimizer="lion"), {"precision"}), (dict(precision="fp8-mixed"), {"optimizer"}),
    (SHARDED | dict(offload="parameters", grad_dtype="fp32"), {"precision", "optimizer", "offload", "grad_dtype"}),
    (dict(grad_dtype="bf16"), {"precision", "optimizer"}), (dict(tp=2, async_tp=True, compile=True), {"precision", "optimizer", "async_tp"}),
    (dict(tp=2, async_tp=True), {"precision", "optimizer"}), (dict(tp=2, compile=True), {"precision", "optimizer"}),
    (dict(pp=2, vpp=2), {"precision", "optimizer", "vpp"}), (dict(pp=2, vpp=4), {"precision", "optimizer"})])
def test_what_launch_tells_torchtitan_and_what_is_only_noted(how, names):
    some = {"precision", "optimizer", "offload", "grad_dtype", "async_tp", "vpp"}
    assert titan_settings(job(**how))[1] & some == names


@pytest.mark.parametrize("how, names", [
    (dict(kernels="te"), {"attention", "optimizer", "kernels", "compile"}), (dict(attention="eager", kernels="megatron"), {"optimizer", "kernels", "compile"}),
    (dict(offload="optimizer", optimizer="lion"), {"attention", "offload", "compile"}), (LORA, {"attention", "lora", "optimizer", "compile"}),
    (dict(compile=True), {"attention", "optimizer"})])
def test_what_launch_tells_megatron_bridge_and_what_is_only_noted(how, names):
    some = {"attention", "lora", "offload", "optimizer", "kernels", "compile"}
    assert bridge_settings(job(framework="megatron", **how))[1] & some == names


# --- activations: the tensors that a layer keeps, in bytes

ARCH = Architecture.from_numbers(**LLAMA_1B)
EXPERTS = replace(ARCH, experts=8, experts_per_token=2, expert_ffn=1000, shared_ffn=500, dense_layers=4)
LATENT = replace(ARCH, kv_lora_rank=512, query_lora_rank=1536, query_dim=192, value_dim=128)
MEGA = Strategy(framework="megatron")


@pytest.mark.parametrize("arch, strategy, a_token", [
    (ARCH, Strategy(), 4 * 2 * 8192),  # gate, up, its activation and the product
    (ARCH, Strategy(compile=True), 3 * 2 * 8192), (ARCH, MEGA, 3 * 2 * 8192),  # without the activation
    (ARCH, Strategy(precision="fp32"), 4 * 4 * 8192), (ARCH, Strategy(tp=2), 4 * 2 * 4096), (replace(ARCH, gated=False), Strategy(), 2 * 2 * 8192),
    (EXPERTS, Strategy(), 65536 / 4 + (2 * (8000 + 8192) + 4000 + 64) * 3 / 4), (EXPERTS, Strategy(tp=2), 32768 / 4 + (2 * (4000 + 8192) + 2000 + 64) * 3 / 4),
    (replace(ARCH, mlp_layers=4), Strategy(), 65536 / 4),  # of sixteen layers
    (replace(EXPERTS, mlp_layers=8), Strategy(), (65536 / 2 + (2 * (8000 + 8192) + 4000 + 64) / 2) / 2),
    (replace(EXPERTS, layers=1, dense_layers=1), Strategy(), 65536), (replace(EXPERTS, dense_layers=0), Strategy(), 2 * (8000 + 8192) + 4000 + 64)])
def test_memory_of_an_mlp(arch, strategy, a_token):
    assert mlp_bytes(arch, strategy) == a_token


@pytest.mark.parametrize("arch, how, each", [
    (ARCH, dict(attention="flash"), 0), (ARCH, {}, 6), (ARCH, dict(precision="fp32"), 4), (ARCH, dict(framework="megatron"), 2),
    (replace(ARCH, gated=False), dict(framework="megatron"), 5),  # Megatron's dropout of GELU models: a mask, and what it leaves
    (replace(ARCH, dropout=True), dict(dp=2, zero=3), 5), (replace(ARCH, dropout=True), {}, 7), (replace(ARCH, dropout=True), dict(precision="fp32"), 9),
    (replace(ARCH, dropout=True), dict(framework="hf", trainer_version="4.17"), 11), (replace(ARCH, dropout=True), dict(framework="hf", trainer_version="4.18"), 7),  # PyTorch below 1.11
    (replace(ARCH, gated=False, dropout=False), dict(framework="megatron"), 2), (ARCH, dict(tp=2), 3)])
def test_memory_of_scores(arch, how, each):
    assert core_bytes(arch, Strategy(**dict(attention="eager") | how), Workload(1000)) == 32 * 1000 * each


@pytest.mark.parametrize("how, casts", [({}, True), (dict(zero=1), True), (dict(zero=2), False), (dict(precision="bf16"), False),
                                        (dict(framework="deepspeed"), False), (dict(lora_rank=8), False), (dict(framework="hf"), True)])
def test_memory_of_casts(how, casts):
    assert autocast(Strategy(dp=2, **how)) is casts


@pytest.mark.parametrize("arch, strategy, a_token", [
    (ARCH, Strategy(), 2 * 4 * 2048 + 4 * 32), (ARCH, Strategy(attention="eager"), 2 * 4 * 2048), (ARCH, MEGA, 2 * (2 * 2048 + 2 * 512) + 4 * 32),
    (replace(ARCH, kv_heads=32), Strategy(), 2 * 4 * 2048 + 4 * 32),
    (replace(ARCH, kv_heads=32, query_dim=80), Strategy(), 2 * (2560 + 3 * 2048) + 4 * 32), (ARCH, Strategy(tp=2), 2 * 2 * 2048 + 2 * 32),
    (LATENT, Strategy(), 2 * (2 * 32 * 192 + 2 * 32 * 128) + 4 * 32 + 2 * 2 * 2048), (LATENT, Strategy(tp=2), 2 * (32 * 192 + 32 * 128) + 2 * 32 + 2 * 2 * 2048)])
def test_memory_of_attention(arch, strategy, a_token):
    assert attention_bytes(arch, strategy) == a_token


@pytest.mark.parametrize("arch, how, a_logit", [
    (ARCH, dict(loss="chunked"), (5.25, 5.25)), (ARCH, dict(loss="chunked", compile=True), (4, 4)), (replace(ARCH, family="mpt"), {}, (4, 4)),
    (ARCH, dict(precision="fp32"), (12, 12)), (ARCH, dict(framework="megatron"), (12, 12)), (ARCH, dict(framework="deepspeed"), (12, 14)),
    (ARCH, dict(framework="hf"), (14, 14)), (ARCH, dict(framework="hf", trainer_version="4.57"), (16, 18)),
    (ARCH, dict(framework="hf", trainer_version="5.0"), (14, 14)), (ARCH, dict(framework="hf", tp=2), (16, 18)), (ARCH, {}, (12, 14)),
    (ARCH, dict(tp=2), (16, 18)), (ARCH, dict(dp=2, lora_rank=8), (16, 18)), (ARCH, dict(cp=2, lora_rank=8), (16, 18)), (ARCH, dict(lora_rank=8), (12, 14)),
    (ARCH, dict(dp=2), (12, 14))])
def test_memory_of_a_logit(arch, how, a_logit):
    assert logit_bytes(arch, Strategy(**how)) == a_logit


# --- engines: the type of gradients, and Megatron's 6 + 12/d bytes a parameter

@pytest.mark.parametrize("how, wide, each", [
    ({}, 2, 4), (dict(precision="bf16"), 2, 2), (dict(precision="fp32"), 4, 4), (dict(grad_dtype="bf16"), 2, 2), (dict(precision="bf16", grad_dtype="fp32"), 2, 4)])
def test_memory_of_reduced_gradients(how, wide, each):
    assert reduced_bytes(Strategy(**how), wide) == each


@pytest.mark.parametrize("how, more", [
    ({}, 2), (dict(precision="bf16"), 0), (dict(precision="fp16-mixed"), 0), (dict(precision="fp16-mixed", grad_dtype="fp32"), 2), (dict(grad_dtype="bf16"), 0),
    (dict(tp=2), 2), (dict(tp=2, sp=False), 4)])
def test_memory_of_accumulated_gradients(how, more):
    assert _accumulated(Strategy(framework="megatron", **how), 2) == more


SHARE = Share("all", 10, 60.0, 40.0, 0.0, 90.0, 0.0, 100.0, 1.0, True)  # 1000 parameters
FLOW = Flow(kept=1e6, again=2000.0, head=300.0, loss=700.0, pooled=50.0, unpacked=0.0, hidden=11.0, host=0.0)


def megatron_phases(share: Share = SHARE, arch: Architecture = ARCH, **how):
    step = step_on(arch, Strategy(framework="megatron", **how), Workload(100), share, FLOW)
    return {p.name: p for p in timeline("megatron", step)}


@pytest.mark.parametrize("d", [1, 2, 4])
def test_memory_of_megatron_is_six_and_twelve_by_d(d):
    found = megatron_phases(dp=d, zero=1)
    for p in found.values():
        assert p.parameters + p.gradients + p.optimizer + p.communication == 1000 * (6 + 12 / d)
        assert (p.parameters, p.gradients, p.optimizer, p.communication, p.spare) == (2000, 2000, 12000 / d, 2000, 2000)
        assert p.settled == 2000 + 12000 / d + 2000
    forward, loss, backward, step = found["forward"], found["loss"], found["backward"], found["optimizer"]
    assert (forward.activations, loss.activations, loss.loss, backward.activations) == (1e6, 1e6 + 300, 700, 1e6 + 2000)
    assert (forward.pool, loss.pool, backward.pool, backward.cached, step.cached, step.activations) == (0, 50, 0, 120, 1e6, 0)


def test_memory_of_megatron_without_zero_and_with_its_variants():
    assert megatron_phases(dp=2)["forward"].optimizer == 12000
    for where in ("optimizer", "parameters"): assert megatron_phases(dp=2, zero=1, offload=where)["forward"].optimizer == 0
    narrow = megatron_phases(dp=2, zero=1, grad_dtype="bf16")  # gradients are copied for the step: 2 and 4 bytes of this rank's share
    assert (narrow["forward"].communication, narrow["forward"].spare, narrow["forward"].pool, narrow["optimizer"].optimizer) == (0, 0, 1000, 6000 + 1000 + 2000)
    assert (narrow["loss"].pool, narrow["backward"].pool) == (1050, 1000)
    plain = megatron_phases(dp=2, zero=1, precision="bf16")
    assert (plain["forward"].communication, plain["forward"].pool) == (0, 0)
    said = megatron_phases(dp=2, zero=1, grad_dtype="fp32")["forward"]
    assert (said.communication, said.spare) == (2000, 0)  # it was asked for, so no variant does without
    deep = megatron_phases(dp=2, tp=2, sp=False, zero=1)  # Megatron-DeepSpeed: a whole fp32 copy, and a bucket of its own
    assert (deep["forward"].communication, deep["forward"].spare, deep["backward"].cached) == (4000 + 1e9, 0, 240)
    assert megatron_phases(cp=2, tp=2, sp=False, zero=1)["forward"].communication == 4000 + 1e9
    assert megatron_phases(dp=1, tp=2, sp=False, zero=1)["forward"].communication == 4000
    assert megatron_phases(dp=2, tp=2, sp=False)["forward"].communication == 4000
    assert megatron_phases(dp=2, tp=2)["forward"].communication == 2000
    wide = megatron_phases(SHARE._replace(embedding=30.0, head=970.0, layer=900.0, layers=0))["backward"]
    assert wide.cached == 2 * 300  # a third of a layer, where that is larger than the embedding
    middle = SHARE._replace(has_head=False)
    assert megatron_phases(middle, pp=2)["backward"].activations == 1e6 + 11 + 2000
    assert megatron_phases(middle)["backward"].activations == megatron_phases(pp=2)["backward"].activations == 1e6 + 2000
    large = megatron_phases(SHARE._replace(embedding=9000.0))["backward"]
    assert (large.activations, large.cached) == (1e6 + 18000, 2000)


def test_memory_of_megatron_with_adapters():
    found = megatron_phases(lora_rank=2)["backward"]
    assert found.cached == 0 and found.parameters > 2000 and found.gradients == 2 * (found.parameters - 2000) / 2


# --- every row, head and channel on its own scale

def judged(error, truth, scale=1.0, own=0.0, precision="fp32", rule=Rule(), noise=None):
    truth = np.asarray(truth, np.float64)
    full = [np.broadcast_to(np.asarray(a, np.float64), truth.shape) for a in (error, own)]
    return blocks(*full, truth, scale, precision, rule, noise)


FP32 = 2.0**-23
SMALL_ROW = np.array([[1.0, 1, 1], [0.5, 0.5, 0.5]])  # of which the second row has a scale of its own


def in_row(amount): return np.array([[0.0, 0, 0], [0, amount, 0]])


def test_tolerance_counts_the_parts_of_axes_that_have_several():
    assert judged(0.0, SMALL_ROW) == (5, None)
    assert judged(0.0, SMALL_ROW[:1]) == (3, None)
    assert judged(9.0, [0.5, 0.5]) == judged(0.0, np.zeros((0, 3))) == (0, None)


def test_tolerance_of_a_channel_is_a_factor_times_its_own_rounding():
    assert judged(in_row(8 * FP32), SMALL_ROW) == (5, None)  # 8 times 2 units in the last place of 0.5
    count, worst = judged(in_row(16 * FP32), SMALL_ROW)
    assert (count, worst) == (5, Block("index 1 of axis 0", 32 * FP32, 16.0))
    assert judged(in_row(16 * FP32).T, SMALL_ROW.T)[1] == Block("index 1 of axis 1", 32 * FP32, 16.0)
    assert judged(in_row(8 * FP32), SMALL_ROW, own=2 * FP32) == (5, None)
    assert judged(in_row(32 * FP32), SMALL_ROW, own=2 * FP32)[1].ratio == 16  # torch's own error, where that is larger
    assert judged(in_row(32 * FP32), SMALL_ROW, noise=np.full((2, 3), 2 * FP32))[1].ratio == 16
    assert judged(in_row(16 * FP32), SMALL_ROW, noise=np.full((2, 3), 2 * FP32)) == (5, None)


def test_tolerance_of_what_is_as_large_as_the_whole_is_judged_there():
    assert judged(1.0, np.ones((2, 3))) == judged(1.0, np.ones((2, 3)), rule=Rule(factor=0.5)) == (5, None)


def test_tolerance_takes_the_worst_part_and_the_first_of_equals():
    assert judged(16 * FP32, np.full((2, 3), 0.5))[1].where == "index 0 of axis 0"
    errors = np.array([[0.0, 0, 16], [0, 0, 0]]) * FP32
    truth = np.array([[0.5, 0.5, 0.25], [0.5, 0.5, 0.25]])
    assert judged(errors, truth)[1] == Block("index 2 of axis 1", 64 * FP32, 32.0)
    assert judged(in_row(0.75 * FP32), SMALL_ROW, rule=Rule(factor=0.5))[1].ratio == 0.75


def test_tolerance_never_asks_for_more_than_the_type_holds():
    step = np.array([[1.0, 1], [2.0**-14, 2.0**-14]])  # the smallest normal numbers of fp16
    assert judged([[0, 0], [0, 2.0**-18]], step, precision="fp16")[1] == Block("index 1 of axis 0", 2.0**-4, 16.0)
    nothing = np.array([[4.0, 4], [0, 0]])
    assert judged([[0, 0], [0, 2.0**-46]], nothing, scale=4.0)[1].ratio == 16
    assert judged([[0, 0], [0, 2.0**-47]], nothing, scale=4.0) == (4, None)


@pytest.mark.parametrize("truth, own, scale", [
    ([-1e9, 1], [-1e9, 1], 1), ([99, 1], [99, 1], 99), ([150, 1], [150, 1], 1), ([150, 1], [151, 1], 150), ([1, 0], [1, 0], 1), ([5, 5], [5, 5], 5),
    ([1e12, 1e9, 1e6, 1e3, 1], [1e12, 1e9, 1e6, 1e3, 1], 1e3), ([], [], 1e-30), ([0, 0], [0, 0], 1e-30)])
def test_tolerance_is_relative_to_what_was_computed(truth, own, scale):
    assert scale_of(np.array(truth, np.float64), np.array(own, np.float64)) == scale


def test_tolerance_of_a_small_channel_decides_the_verdict():
    truth = np.stack([np.linspace(1, 2, 8), np.linspace(1, 2, 8) * 1e-4])
    got = truth.copy()
    got[1] += 2e-8  # within the whole output's rounding, far beyond its own
    found = compared(got, truth, truth)
    assert (found.verdict, found.block, found.channels) == ("fail", "index 1 of axis 0", 10) and found.ratio > 8
    assert compared(got, truth, truth, rule=Rule(atol=1e-6)).verdict == compared(truth, truth, truth).verdict == "pass"


# --- what a file may do where a mask says that there is nothing

def masked(rows): return {"mask": torch.tensor(rows), "x": torch.ones(2, 2)}


ROWS = [[1, 1, 0], [1, 1, 1], [0, 0, 0]]
WHERE = np.array(ROWS) == 0


@pytest.mark.parametrize("inputs, shape, expected", [
    (masked(ROWS), (3, 3, 5), WHERE), (masked(ROWS), (3, 3), WHERE), (masked(ROWS), (3, 7), WHERE.all(1)), (masked(ROWS), (3,), WHERE.all(1)),
    (masked(ROWS), (2, 3), None), (masked(ROWS), (), None), (masked(ROWS[:2]), (2, 7), None), (masked([[1, 1], [1, 1]]), (2, 2), None),
    ({"x": torch.zeros(2, 2)}, (2, 2), None), ({"mask": torch.zeros(2, 2)}, (2, 2), None),  # floats are no such mask
    ({"first_mask": torch.ones(3, 3, dtype=torch.long), **masked(ROWS)}, (3, 3), WHERE)])
def test_padding_is_where_a_mask_says_so(inputs, shape, expected):
    found = hidden_positions(inputs, shape)
    assert (found is None) == (expected is None) and np.array_equal(found, expected)


def test_padding_is_taken_from_elsewhere_and_nothing_else_is():
    values = {"y": np.zeros((3, 3), np.float32), "alone": np.zeros((3, 3)), "other": np.zeros((3, 3)), "free": np.zeros((5, 1))}
    found = with_hidden(values, {"y": np.ones((3, 3)), "other": np.ones((3, 4)), "free": np.ones((5, 1))}, masked(ROWS))
    assert np.array_equal(found["y"], WHERE) and found["y"].dtype == np.float32
    assert not any(v.any() for k, v in found.items() if k != "y") and not values["y"].any()


ANSWER = {"average": 0.5, "zero": 0.0}


def padding_case(in_padding: float, elsewhere: float = 0.0, mask=((1, 1, 1), (0, 0, 0)), passes=None):
    truth = {"y": np.array([[0.0] * 3, [7.0] * 3])}
    got = {"y": np.array([[elsewhere] * 3, [in_padding] * 3])}

    def rerun():  # an empty row of attention, answered as the mode says
        answer = float(torch.softmax(torch.full((1, 2), -1e9), -1)[0, 0])
        made = {"y": np.array([[0.0] * 3, [answer] * 3])}
        return made, made
    usual = lambda got, own, truth: all(np.array_equal(got[k], truth[k]) and np.array_equal(own[k], truth[k]) for k in truth)
    return explained_by_padding(got, truth, truth, {"mask": torch.tensor(mask)}, passes or usual, rerun)


def test_padding_excuses_only_another_answer_to_empty_rows():
    assert "an average over all keys" in padding_case(0.5) and "zeros" in padding_case(0.0)
    assert padding_case(0.25) == padding_case(0.5, elsewhere=1.0) == padding_case(0.0, elsewhere=0.01) == ""


def test_padding_excuses_nothing_where_nothing_is_hidden():
    assert padding_case(0.5, mask=((1, 1, 1), (1, 1, 1)), passes=lambda *all: True) == ""
    assert padding_case(0.5, passes=lambda *all: False) == ""


@pytest.mark.parametrize("answer, first", [("average", 0.25), ("zero", 0.0)])
def test_padding_answers_are_given_to_empty_rows_alone(answer, first):
    scores = torch.tensor([[-5000.0, -6000, -1e9, -1e9], [-4999.0, -1e9, -1e9, -1e9]])
    out = torch.softmax(scores, -1)
    found = _softened(scores, out, -1, answer)
    assert found[0].tolist() == [first] * 4 and torch.equal(found[1], out[1])
    value, out = torch.arange(24.0).reshape(1, 2, 4, 3), torch.full((1, 2, 2, 3), 99.0)  # two heads, four keys
    found = _attended(None, None, value, out, scores[None, None], answer)
    means = [[4.5, 5.5, 6.5], [16.5, 17.5, 18.5]] if answer == "average" else [[0, 0, 0]] * 2
    assert found[0].tolist() == [[mean, [99] * 3] for mean in means]


# --- what a cause needs to be believed: the change makes the case pass, and it did not before

GOOD = 8.0


def context_with(error, **more): return SimpleNamespace(error=error, good=GOOD, graph="file", precision="fp32", provider="cpu", **more)


def optimised(none=1.0, before=50.0, levels=("extended", "all"), passes=("GeluFusionL2",), right=GOOD):
    def error(level, disabled=()):
        if level == "none": return none
        return right if level not in levels or set(disabled) & set(passes) else before
    return by_optimisation(error, before, GOOD)


def test_cause_optimisation():
    [found] = optimised()
    assert found.kind == "optimisation pass" and "level extended; leaving out GeluFusionL2 alone is enough" in found.evidence
    assert "level basic" in optimised(levels=("basic", "extended", "all"))[0].evidence
    [late] = optimised(levels=("all",), passes=())
    assert "level all" in late.evidence and "alone" not in late.evidence
    assert optimised(none=GOOD) and not optimised(none=9.0) and not optimised(before=GOOD)


@pytest.mark.parametrize("changed, after, told", [([], 1, ""), (["drop"], 49, "drop is in"), (["drop", "norm"], 1, "drop, norm are in"), (["drop"], 50, ""), (["drop"], 51, "")])
def test_cause_train_mode(monkeypatch, changed, after, told):
    monkeypatch.setattr(causes, "in_inference", lambda graph: ("quiet", changed))
    found = causes.by_train_mode(context_with({"quiet": after}.get), 50)
    assert [c.kind for c in found] == (["train mode"] if told else []) and all(told in c.evidence for c in found)


def undoable(what, undo=True): return causes.Difference("constant", 0, what, (lambda proto: None) if undo else None)


@pytest.mark.parametrize("after, before, alone, ratio, told", [
    (GOOD, 12, 99, 20, "8 × torch's own after"), (49, 100, 99, 20, "49 × torch's own after"), (50, 100, GOOD, 20, "the operator alone has error 20"),
    (50, 100, 9, 20, ""), (50, 100, GOOD, GOOD, ""), (9, 12, 99, 20, "")])
def test_cause_put_back(monkeypatch, after, before, alone, ratio, told):
    monkeypatch.setattr(causes, "undone", lambda graph, changes: "changed")
    monkeypatch.setattr(causes, "_alone", lambda *args: alone)
    put = lambda changes: causes._put_back(context_with({"changed": after}.get), SimpleNamespace(ratio=ratio), changes, before)
    assert bool(put([undoable("a"), undoable("b", False)])) == bool(told) and told in put([undoable("a")])
    assert put([undoable("a", False)]) == ""


def restored(monkeypatch, found, helps, foreign=""):
    monkeypatch.setattr(causes, "own_differences", lambda *args: found)
    monkeypatch.setattr(causes, "_put_back", lambda context, suspect, changes, before: "changed" if "+".join(d.what for d in changes) in helps else "")
    monkeypatch.setattr(causes, "_kind_of", lambda d, graph: d.what)
    monkeypatch.setattr(causes, "_foreign", lambda *args: foreign)
    return [(c.kind, c.evidence) for c in causes.by_restoring(context_with(None), SimpleNamespace(value="v"), 50)]


def test_cause_restored(monkeypatch):
    a, b, c = undoable("a"), undoable("b"), undoable("c", False)
    assert restored(monkeypatch, [a, b], {"b", "a+b"}) == [("b", "b; put back: changed")]
    assert restored(monkeypatch, [a, b], {"a+b"}) == [(x, f"{x}; all 2 differences put back: changed") for x in "ab"]
    assert restored(monkeypatch, [a, b], {}) == []
    assert restored(monkeypatch, [a, c], {"a+c"}) == [("c", "c (it could not be undone alone)")]
    assert [k for k, _ in restored(monkeypatch, [a], {"a"}, "Add x")] == ["a", "operator semantics"]
    alien = undoable("b no torch operator")
    assert len(restored(monkeypatch, [alien], {alien.what}, "Add x")) == 1


def fresh(monkeypatch, right=GOOD, before=9.0, after=GOOD, one="", found=None):
    groups = found or {"conv": [undoable("a")], "relu": [undoable("b")]}
    for name, value in (("reexported_graph", "fresh"), ("all_differences", groups), ("restoring_operator", one)):
        monkeypatch.setattr(causes, name, lambda *args, value=value: value)
    monkeypatch.setattr(causes, "undone", lambda graph, changes: tuple(d.what for d in changes))
    monkeypatch.setattr(causes, "_kind_of", lambda d, graph: d.what)
    return causes.by_fresh_export(context_with(lambda graph: right if graph == "fresh" else after), before)


def test_cause_fresh_export(monkeypatch):
    assert [(c.kind, "all 2 differences from a fresh export put back" in c.evidence) for c in fresh(monkeypatch)] == [("a", True), ("b", True)]
    [one] = fresh(monkeypatch, one="relu")
    assert one.kind == "b" and one.evidence.startswith("b; put back: ")
    assert fresh(monkeypatch, right=9.0) == fresh(monkeypatch, before=GOOD) == []
    [still] = fresh(monkeypatch, after=9.0)
    assert still.kind == "operator semantics" and still.evidence.endswith("; a; b") and "a fresh export is right" in still.evidence
    assert [c.kind for c in fresh(monkeypatch, after=1.0, found={"x": [undoable("a", False)]})] == ["operator semantics"]
    assert len(fresh(monkeypatch, found={"x": [undoable(str(i)) for i in range(7)]})) == 5


@pytest.mark.parametrize("fresh, right, told", [(21, {21, 16}, 21), (21, {16, 12}, 16), (21, {12, 23}, 12), (18, {18}, 18), (17, {17}, None), (21, set(), None)])
def test_cause_opset(monkeypatch, fresh, right, told):
    monkeypatch.setattr(causes, "opset_of", {"file": 17, "clean": fresh}.get)
    monkeypatch.setattr(causes, "relabelled", lambda graph, opset: opset)
    found = causes.by_opset(context_with(lambda opset: GOOD if opset in right else 9.0, clean="clean"), 9.0)
    assert [f"under opset {told}:" in c.evidence for c in found] == ([True] if told else [])
    assert causes.by_opset(context_with(lambda opset: GOOD, clean="clean"), GOOD) == []


@pytest.mark.parametrize("provider, precision, after, before, believed", [
    ("cuda", "fp32", GOOD, 9, True), ("cuda", "fp32", 9, 10, False), ("cuda", "fp32", 1, GOOD, False), ("cpu", "fp32", 1, 9, False), ("cuda", "fp16", 1, 9, False)])
def test_cause_tf32(monkeypatch, provider, precision, after, before, believed):
    monkeypatch.setattr(causes, "provider_name", lambda name: causes.PROVIDERS[name])
    asked = []
    context = context_with(lambda options: asked.append(options) or after)
    context.provider, context.precision = provider, precision
    assert [c.kind for c in causes.by_tf32(context, before)] == (["TF32"] if believed else [])
    assert all(options == {"use_tf32": 0} for options in asked)


@pytest.mark.parametrize("after, folder, external, kinds", [
    (GOOD, None, 0, ["runtime kernel"]), (9, None, 0, ["exporter bug"]), (1, "f", 1, []), (1, "f", 0, ["runtime kernel"]), (1, None, 1, ["runtime kernel"]), (None, None, 0, [])])
def test_cause_evaluator(monkeypatch, after, folder, external, kinds):
    def run(feeds):
        if after is None: raise ValueError("unknown operator")
    monkeypatch.setattr(causes, "_reference_backend", lambda data: SimpleNamespace(run=run))
    tensors = [SimpleNamespace(data_location=external)]
    context = context_with(None, feeds={}, ratio=lambda got: after)
    context.graph = SimpleNamespace(folder=folder, data=bytes, proto=SimpleNamespace(graph=SimpleNamespace(initializer=tensors)))
    found = causes.by_evaluator(context, SimpleNamespace(isolated=0.1, own=0.2, op="relu"))
    assert [c.kind for c in found] == kinds


@pytest.mark.parametrize("after, kinds", [(GOOD, []), (9, ["exporter bug"])])
def test_cause_trace(monkeypatch, after, kinds):
    monkeypatch.setattr(causes, "run_program", lambda *args: {"n": SimpleNamespace(own=1)})
    monkeypatch.setattr(causes, "_numpy", lambda value: value)
    specs = [SimpleNamespace(arg=SimpleNamespace(name=n)) for n in ("n", "m")]
    captured = SimpleNamespace(program=SimpleNamespace(graph_signature=SimpleNamespace(output_specs=specs)))
    seen = []
    context = context_with(None, captured=captured, inputs={}, truth={"y": 0, "z": 0}, ratio=lambda got: seen.append(got) or after)
    assert [c.kind for c in causes.by_trace(context, 50)] == kinds and seen == [{"y": 1}]


@pytest.mark.parametrize("rule, more, number", [
    (Rule(), {}, 3.0), (Rule(), dict(nonfinite=1), np.inf), (Rule(), dict(why="missing output"), np.inf), (Rule(), dict(why="beyond"), 3.0),
    (Rule(atol=1.0), {}, 0.0), (Rule(atol=1.0), dict(verdict="fail"), np.inf)])
def test_cause_number(rule, more, number):
    assert causes._as_number(SimpleNamespace(**dict(nonfinite=0, why="", verdict="pass", ratio=3.0) | more), rule) == number


EXPERIMENTS = ("train_mode", "overflow", "tf32", "optimisation", "restoring", "opset", "fresh_export", "attribute", "evaluator", "shape", "export_opset", "trace")


@pytest.mark.parametrize("suspect, found, not_tried", [
    (None, {}, {"restoring", "attribute", "evaluator", "export_opset"}), ("s", {}, {"export_opset"}),
    ("s", {"train_mode": "train mode"}, set(EXPERIMENTS[3:]) - {"restoring"}), (None, {"optimisation": "o"}, set(EXPERIMENTS[4:])),
    ("s", {"restoring": "weight"}, set(EXPERIMENTS[5:])), (None, {"opset": "o"}, {"restoring", *EXPERIMENTS[6:]}),
    ("s", {"fresh_export": "o"}, set(EXPERIMENTS[7:])), ("s", {"attribute": "o"}, set(EXPERIMENTS[8:])), ("s", {"evaluator": "runtime kernel"}, set(EXPERIMENTS[9:])),
    ("s", {"evaluator": "exporter bug"}, {"trace"}), ("s", {"evaluator": "exporter bug", "shape": "baked shape"}, {"export_opset", "trace"}),
    ("s", {"trace": "exporter bug"}, {"export_opset"})])
def test_causes_are_tried_in_turn(monkeypatch, suspect, found, not_tried):
    tried = []
    for name in EXPERIMENTS:
        answer = [causes.Cause(found[name], name)] * 2 if name in found else []
        monkeypatch.setattr(causes, f"by_{name}", lambda *args, name=name, answer=answer: tried.append(name) or answer)
    got = causes.find_causes(context_with(lambda: 50.0), None, suspect)
    assert set(EXPERIMENTS) - set(tried) == not_tried
    assert [c.evidence for c in got] == [n for n in EXPERIMENTS if n in found]  # each once


# --- what is numerics between two environments

THREADS, TF32 = "numerics.settings.threads", "numerics.settings.allow_tf32.matmul"
SEEN, FRESH = {"numerics.origin": "observed"}, {"numerics.origin": "default"}
SAME_DATA = {"data./a/x.sha256": "f" * 64, "data./a/x.files": 3}


@pytest.mark.parametrize("name, left, right, a, b, effect, why", [
    (THREADS, 2, 3, SEEN, SEEN, "numerics", "threads"), (THREADS, 2, 3, SEEN, FRESH, "numerics", "threads"),
    (THREADS, None, 3, SEEN, SEEN, "record", "only one"), (THREADS, 2, None, SEEN, SEEN, "record", "only one"),
    ("libraries.torch.mkl", None, "x", SEEN, SEEN, "record", "only one"), ("libraries.torch.mkl", "y", "x", SEEN, SEEN, "numerics", ""),
    ("numerics.settings.seed", 0, 1, SEEN, SEEN, "numerics", "another seed"), ("numerics.settings.seed", 0, 1, SEEN, FRESH, "record", "observed on one side"),
    ("variables.PYTHONHASHSEED", "1", "2", SEEN, FRESH, "numerics", ""),
    ("libraries.versions.onednn", None, "3", {}, {"libraries.versions.onednn": "3"}, "record", "on one side only"),
    ("libraries.versions.onednn", None, "3", {"libraries.versions.mkl": "1"}, {"libraries.versions.onednn": "3"}, "numerics", ""),
    ("libraries.versions.onednn", "2", "3", {}, {"libraries.versions.onednn": "3"}, "numerics", ""),
    ("variables.OMP_NUM_THREADS", "1", "2", {THREADS: 2}, {THREADS: 2}, "record", "without effect: threads is 2"),
    ("variables.OMP_NUM_THREADS", "1", "2", {THREADS: 2}, {THREADS: 3}, "numerics", ""), ("variables.OMP_NUM_THREADS", "1", "2", {}, {}, "numerics", ""),
    ("python.version", "3.11.1", "3.11.2", {}, {}, "record", "a patch release of Python"), ("python.version", "3.11.1", "3.12.1", {}, {}, None, "(minor version)"),
    ("packages.torch.version", "2.1.0", "2.1.1", {}, {}, "numerics", "(patch release)"),
    ("packages.torch.record", "a", "b", {"packages.torch.version": "2"}, {}, "numerics", "2 on both sides, but another build"),
    (TF32, True, False, SEEN, SEEN, "numerics", "; neither machine has a GPU"), ("data./a/x.sha256", "f" * 64, "e" * 64, SAME_DATA, {"data./a/x.sha256": "e" * 64}, "numerics", ""),
    ("data./a/x.sha256", "f" * 64, None, SAME_DATA, {"data./b/x.sha256": "f" * 64}, "record", "the same data under another path"),
    ("data./b/x.sha256", None, "f" * 64, SAME_DATA, {"data./b/x.sha256": "f" * 64}, "record", "the same data under another path"),
    ("data./b/x.sha256", None, "e" * 64, SAME_DATA, {"data./b/x.sha256": "e" * 64}, "numerics", ""),
    ("data./a/x.sha256", "f" * 64, None, SAME_DATA, {"source.untracked.x.sha256": "f" * 64}, "numerics", ""),
    ("python.argv", ["t.py", "--lr", "1"], ["t.py", "--lr", "2"], {}, {}, "numerics", "other arguments"), ("python.argv", ["t.py"], ["t.py"], {}, {}, "record", "")])
def test_numerics_or_only_for_the_record(name, left, right, a, b, effect, why):
    found = _judge(name, left, right, a, b)
    assert effect in (None, found[0]) and why in found[1], found


def test_numerics_of_tf32_matter_where_there_is_a_gpu():
    gpu = {"accelerators.gpus.0.name": "H100", "packages.torch.version": "2.1.0"}
    for a, b in ((gpu, {}), ({}, gpu)): assert "neither machine" not in _judge(TF32, True, False, a | SEEN, b | SEEN)[1]
    assert "neither machine" not in _judge("numerics.settings.seed", 0, 1, SEEN, SEEN)[1]


def test_numerics_say_where_that_is_known_from():
    assert _judge(THREADS, 2, 3, SEEN, SEEN)[1].endswith("]") and _judge("numerics.settings.seed", 0, 1, SEEN, SEEN)[1] == "another seed"


def captured(**settings): return _finished({"numerics": {"origin": "observed", "settings": settings}})


@pytest.mark.parametrize("left, right, verdict, effects", [
    (dict(threads=1), dict(threads=1), "same", []), (dict(threads=1), dict(threads=2), "differs", ["numerics"]),
    (dict(interop_threads=1), dict(interop_threads=2), "differs", ["performance"]), (dict(seed=1), {}, "same", ["record"]),
    (dict(interop_threads=1, threads=1), dict(interop_threads=2, threads=2, seed=1), "differs", ["numerics", "performance", "record"])])
def test_numerics_make_two_environments_differ(left, right, verdict, effects):
    found = diff(captured(**left), captured(**right))
    assert (found.verdict, [d.effect for d in found.differences]) == (verdict, effects)


# --- what verify counts: files that the lock left out, and files that it does not know

@pytest.fixture
def with_copy(tmp_path, no_hub):
    folder = write(tmp_path / "model", {"config.json": {"model_type": "tiny"}, "model.safetensors": one(size=300), "pytorch_model.bin": bytes(100), "notes.txt": b"n"})
    return lock(str(folder)), folder


def test_left_out_copies_are_no_problem_while_they_are_those_copies(with_copy):
    made, folder = with_copy
    assert [s.path for s in made.skipped if s.sha256] == ["pytorch_model.bin"]
    found = verify(made, folder)
    assert found.ok and "pytorch_model.bin" in found.unlocked and not set(found.unlocked) & {f.path for f in made.files}
    assert (found.files_checked, found.bytes_checked) == (len(made.files), made.size_bytes)
    for other in (b"\1" + bytes(99), bytes(99)):
        (folder / "pytorch_model.bin").write_bytes(other)
        assert [(p.path, p.kind) for p in verify(made, folder).problems] == [("pytorch_model.bin", "unlocked")]
    (folder / "pytorch_model.bin").unlink()
    assert verify(made, folder).ok


@pytest.mark.parametrize("name, kind", [("modeling_tiny.py", "unlocked"), ("tokenizer.json", "unlocked"), ("readme2.txt", None)])
def test_left_out_is_what_no_loader_reads(with_copy, name, kind):
    made, folder = with_copy
    (folder / name).write_text("x = 1")
    found = verify(made, folder)
    assert [(p.path, p.kind) for p in found.problems] == ([(name, kind)] if kind else [])
    assert name in found.unlocked and found.ok == (kind is None)


def test_left_out_files_beside_a_single_one_are_no_question(with_copy):
    made, folder = with_copy
    (folder / "modeling_tiny.py").write_text("x = 1")
    assert not verify(made, folder).ok and verify(made, folder / "config.json").ok
    single = lock(str(folder / "model.safetensors"))
    assert verify(single, folder / "model.safetensors").ok
    single.save(folder.parent / "single.json")
    remember_folder(folder.parent / "single.json", folder / "model.safetensors")
    assert verify(folder.parent / "single.json").ok  # made from that file alone
    made.save(folder / "lock.json")
    assert not verify(folder / "lock.json").ok


def test_left_out_of_the_reading_is_what_is_known_or_not_there(with_copy):
    made, folder = with_copy
    assert verify(made, folder).bytes_hashed == made.size_bytes
    assert verify(made, folder).bytes_hashed == 0 and verify(made, folder, full=True).bytes_hashed == made.size_bytes
    (folder / "model.safetensors").unlink()
    found = verify(made, folder, full=True)
    assert [p.kind for p in found.problems] == ["missing"] and 0 < found.bytes_hashed < made.size_bytes


def test_left_out_without_a_hash_is_known_by_its_size(tmp_path, no_hub):
    write(tmp_path, {"x.bin": bytes(7)})
    known = lambda size, **more: _is_as_skipped(tmp_path, Skipped("x.bin", size, "a copy", **more), False, lambda n: None)
    assert known(7) and not known(8) and not known(7, sha256="0" * 64)
    assert not _is_as_skipped(tmp_path, Skipped("none.bin", 7, "a copy"), False, lambda n: None)
    (tmp_path / "folder.bin").mkdir()
    size = (tmp_path / "folder.bin").stat().st_size
    assert not _is_as_skipped(tmp_path, Skipped("folder.bin", size, "a copy"), False, lambda n: None)


# --- what was signed is what is locked

COMMIT = "c" * 40


def locked_as(hashes: dict[str, str], repo: str | None = "org/m"):
    return ModelLock(repo, COMMIT if repo else None, [LockedFile(p, 1, h * 64) for p, h in hashes.items()])


@pytest.mark.parametrize("repo, signed, subject, said", [
    ("org/m", {"a": "1", "b": "2"}, f"org/m@{COMMIT}", None), ("org/m", {"a": "1", "b": "2"}, "model", None), (None, {"a": "1", "b": "2"}, f"org/x@{COMMIT}", None),
    ("org/m", {"a": "1", "b": "3"}, "model", ": b has another hash$"), ("org/m", {"a": "1"}, "model", ": b is in the lock and was not signed$"),
    ("org/m", {"a": "1", "b": "2", "c": "3"}, "model", ": c was signed and is not in the lock$"),
    ("org/m", {"a": "1", "b": "2"}, f"org/x@{COMMIT}", f": it is of org/x@{COMMIT}, and the lock of org/m@{COMMIT}$"),
    ("org/m", {"a": "2", "b": "3"} | dict.fromkeys("cd", "3"), "model", "c was signed and is not in the lock; d was signed and is not in the lock$"),
    ("org/m", {"a": "2", "b": "3"} | dict.fromkeys("cdefg", "3"), "model", "d was signed and is not in the lock and 3 more$")])
def test_signed_is_what_is_locked(repo, signed, subject, said):
    args = locked_as({"a": "1", "b": "2"}, repo), {p: h * 64 for p, h in signed.items()}, subject, "m.sig"
    if said is None: _compare(*args)
    else:
        with pytest.raises(WrongSignature) as caught: _compare(*args)
        assert re.search(said, caught.value.message)


# --- the cheapest way to rent

H100 = find_device("h100")


def price(gpus: int, usd: float, name: str = "", spot: bool = False, cloud: str = "c"): return Price(cloud, name or f"i{gpus}", H100.name, gpus, usd, spot)


@pytest.mark.parametrize("listed, how, instance, gpus, usd", [
    ([price(1, 2), price(8, 20)], dict(gpus=8), "i8", 8, 20), ([price(1, 2), price(8, 20)], {}, "i1", 1, 2), ([price(1, 2), price(8, 20)], dict(gpus=16), "2 × i8", 16, 40),
    ([price(8, 12)], {}, "1 × i8, 7 GPUs idle", 1, 12), ([price(8, 12)], dict(gpus=12), "2 × i8, 4 GPUs idle", 12, 24), ([price(2, 5), price(8, 12)], dict(gpus=2), "i2", 2, 5),
    ([price(1, 2), price(1, 1, "s", True)], {}, "i1", 1, 2), ([price(1, 2), price(1, 1, "s", True)], dict(spot=True), "s", 1, 1), ([price(1, 2, "b"), price(1, 2, "a")], {}, "a", 1, 2),
    ([price(1, 2, "a", cloud="z"), price(1, 2, "b", cloud="y")], {}, "b", 1, 2), ([replace(price(1, 1, "x"), gpu="T4-16GB"), price(1, 3)], {}, "i1", 1, 3)])
def test_price_of_so_many_gpus(listed, how, instance, gpus, usd):
    found = cheapest(listed, H100, **how)
    assert (found.instance, found.gpus, found.usd_per_hour) == (instance, gpus, usd)


def test_price_that_nobody_lists():
    assert cheapest([], H100) is None and cheapest([price(1, 1, spot=True)], H100) is None


@pytest.mark.parametrize("usd, kept", [([10, 10, 10, 4.0], 4), ([10, 10, 10, 3.9], 3), ([10, 10, 3.9], 3), ([10, 10, 10, 10, 3.9], 4)])
def test_price_that_is_a_slip(usd, kept):
    listed = [price(1, x) for x in usd] + [price(1, 0.5, spot=True), price(1, 99, spot=True)]
    assert len(credible(listed)) == kept + 2
    assert len(credible([price(8, 8 * x) for x in usd])) == kept  # by GPU, not by instance


# --- the plan that is shown first: the simplest that is nearly as good

def option(rung, speed, fits="yes", gpus=8, **how):
    return SimpleNamespace(rung=rung, gpus=gpus, fits=fits, strategy=Strategy(**how), tokens_per_second_per_gpu=Estimate(speed, speed, speed))


@pytest.mark.parametrize("first, other, minimize, chosen", [
    ({}, dict(speed=90), "cost", 1), ({}, dict(speed=89), "cost", 0), ({}, dict(gpus=4), "time", 0), ({}, dict(gpus=4), "cost", 1), ({}, dict(gpus=16, speed=50), "time", 1),
    ({}, dict(gpus=16), "gpus", 0), ({}, {}, "gpus", 1), ({}, dict(fits="tight"), "cost", 0), (dict(fits="tight"), {}, "cost", 1),
    (dict(fits="tight"), dict(fits="tight"), "cost", 1), ({}, dict(offload="parameters"), "cost", 0), (dict(offload="parameters"), dict(offload="parameters"), "cost", 1),
    (dict(offload="parameters"), {}, "cost", 1), (dict(rung="one GPU"), {}, "cost", 0), (dict(rung="data parallel"), {}, "cost", 0),
    (dict(rung="data parallel", zero=1), {}, "cost", 1), (dict(rung="data parallel", recompute="full"), dict(recompute="selective"), "cost", 1),
    (dict(rung="data parallel", recompute="full"), dict(zero=1), "cost", 0)])
def test_headline_is_the_simplest_of_those_near(first, other, minimize, chosen):
    plans = [option(**dict(rung="3D parallel", speed=100) | first), option(**dict(rung="data parallel", speed=100) | other)]
    assert _headline(plans, minimize) == chosen
    assert _headline(plans[:1], minimize) == 0 and _headline([], minimize) is None


# --- DeepSpeed's file

@pytest.mark.parametrize("how, expected", [
    (DEEP, {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3, "train_batch_size": 24, "gradient_clipping": 1.0, "bf16": {"enabled": True},
            "fp16": ABSENT, "zero_optimization": {"stage": 2, "overlap_comm": True, "contiguous_gradients": True}}),
    (dict(dp=2, framework="deepspeed"), {"zero_optimization": {"stage": 0, "overlap_comm": False, "contiguous_gradients": False}}),
    (dict(dp=2, zero=1), {"zero_optimization": {"stage": 1, "overlap_comm": True, "contiguous_gradients": True}}),
    (DEEP | dict(offload="optimizer", precision="fp16-mixed"), {"fp16": {"enabled": True}, "bf16": ABSENT, "zero_optimization": {
        "stage": 2, "overlap_comm": True, "contiguous_gradients": True, "offload_optimizer": {"device": "cpu", "pin_memory": True}}}),
    (DEEP | dict(zero=3, offload="parameters"), {"zero_optimization": {
        "stage": 3, "overlap_comm": True, "contiguous_gradients": True, "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True}}}),
    (DEEP | dict(precision="fp32"), {"bf16": ABSENT, "fp16": ABSENT, "fp32": ABSENT}), (DEEP | dict(cpu=True), {"bf16": ABSENT})])
def test_launch_of_deepspeed(how, expected):
    found = deepspeed_config(job(**how))
    assert {k: found.get(k, ABSENT) for k in expected} == expected


@pytest.mark.parametrize("how", [dict(tp=2), dict(pp=2), dict(cp=2), dict(dp=4, zero=3, shard_group=2), DEEP | dict(precision="fp8-mixed")])
def test_launch_of_deepspeed_refuses(how):
    with pytest.raises(BadInput): deepspeed_config(job(**how))
