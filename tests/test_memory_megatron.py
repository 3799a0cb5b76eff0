"""Megatron's bytes a parameter against the table of its own documentation, and what `--grad-dtype` does elsewhere."""
import pytest

from fsdl_devinfra.core.device_table import find_device
from fsdl_devinfra.memory import Architecture, Strategy, Workload, estimate
from fsdl_devinfra.memory.footprint import doubts

MODEL = Architecture.from_numbers(16, 2048, 16, 32_000)
WORK = Workload(2048)


def bytes_a_parameter(strategy, phase="forward"):
    parts = estimate(MODEL, strategy, WORK, advice=False).timeline[phase]
    return sum(parts[name] for name in ("parameters", "gradients", "optimizer", "communication")) / MODEL.parameters


@pytest.mark.parametrize("precision,grad_dtype,zero,per_parameter,shared", [
    ("bf16-mixed", None, 1, 6, 12), ("bf16-mixed", "fp32", 1, 6, 12), ("bf16-mixed", None, 0, 18, 0), ("fp8-mixed", None, 1, 6, 12),
    ("bf16-mixed", "bf16", 1, 4, 12), ("fp16-mixed", None, 1, 4, 12)])
def test_table_of_the_distributed_optimizer(precision, grad_dtype, zero, per_parameter, shared):
    "docs/user-guide/features/dist_optimizer.md of Megatron-LM; the last 4/d of 16-bit gradients are there in the step alone."
    ranks = 8
    s = Strategy(dp=ranks, framework="megatron", zero=zero, precision=precision, grad_dtype=grad_dtype)
    assert bytes_a_parameter(s) == pytest.approx(per_parameter + shared / ranks, abs=1e-6)
    if grad_dtype == "bf16" or precision == "fp16-mixed":
        assert bytes_a_parameter(s, "optimizer") >= per_parameter + 16 / ranks - 1e-6


def test_megatron_deepspeed_keeps_both_gradients():
    "--no-sp: 2 + 2 + 4 + 12/d, as before."
    old, new = (estimate(MODEL, Strategy(dp=4, tp=2, sp=sp, framework="megatron", zero=1), WORK, advice=False).timeline["forward"]
                for sp in (False, None))
    assert old["communication"] - new["communication"] > 0.9 * 2 * MODEL.parameters / 2


def test_lower_bound_is_for_16_bit_gradients():
    open_, said = (estimate(MODEL, Strategy(dp=8, framework="megatron", zero=1, grad_dtype=d), WORK, advice=False).peak_bytes
                   for d in (None, "fp32"))
    assert open_.value == said.value and open_.high == said.high
    assert said.low - open_.low == pytest.approx(2 * MODEL.parameters, rel=0.01)


@pytest.mark.parametrize("strategy", [dict(framework="deepspeed", zero=2, dp=4), dict(zero=3, dp=4, loss="fused", recompute="full")])
def test_wide_gradients_take_more(strategy):
    narrow, wide = (estimate(MODEL, Strategy(**strategy, grad_dtype=d), WORK, advice=False).peak_bytes.value for d in ("bf16", "fp32"))
    assert narrow < wide


def test_sft_of_8b_on_eight_h100_is_not_called_impossible():
    llama = Architecture.from_numbers(32, 4096, 32, 128_256, ffn=14_336, kv_heads=8)
    s = Strategy(dp=8, framework="megatron", zero=1, compile=True)
    assert estimate(llama, s, Workload(4096, 1, 4), find_device("h100"), advice=False).fits == "tight"
    assert estimate(llama, Strategy(dp=1, framework="megatron"), Workload(4096), find_device("h100"), advice=False).fits == "no"


def test_xla_recomputes_by_itself():
    usual, xla = (doubts(MODEL, Strategy(kernels=kernels), WORK)["activations"][0] for kernels in (None, "jax"))
    assert usual < 0.1 < 0.8 < xla < 1
