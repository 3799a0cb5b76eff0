"""Closed forms that are exact: ZeRO's table, DeepSpeed's estimator, kernels of the loss (Korthikanti's tables are in nbs/memory/04_activations)."""
import pytest
from fsdl_devinfra.memory import Architecture, Strategy, Workload, deepspeed_estimate, estimate
from fsdl_devinfra.memory.activations import cross_entropy_bytes, linear_cross_entropy_bytes

ZERO = {  # ranks → size → GB at stages 1, 2, 3 (Rajbhandari et al. 2020, table 1)
    1: {7.5: (120, 120, 120), 128: (2048, 2048, 2048), 1000: (16000, 16000, 16000)},
    4: {7.5: (52.5, 41.25, 30), 128: (896, 704, 512), 1000: (7000, 5500, 4000)},
    64: {7.5: (31.41, 16.64, 1.875), 128: (536, 284, 32), 1000: (4187.5, 2218.75, 250)},
    1024: {7.5: (30.09, 15.10, 0.117), 128: (513.5, 257.75, 2), 1000: (4011.7, 2013.7, 15.6)},
}

@pytest.mark.parametrize("framework", ["deepspeed", "megatron"])
@pytest.mark.parametrize("ranks", ZERO)
def test_zero_table(ranks, framework):
    for billions, row in ZERO[ranks].items():
        a = Architecture.from_parameters(round(billions * 1e9))
        for stage, expected in zip((1, 2, 3), row):
            f = estimate(a, Strategy(dp=ranks, zero=stage, framework=framework, states_only=True, precision="fp16-mixed"), Workload())
            said = f.peak_bytes.value / 1e9
            digits = len(str(expected).split(".")[1]) if "." in str(expected) else 0
            assert abs(said - expected) <= 0.5001 * 10 ** -digits, (billions, stage)
            assert f.peak_bytes.low == f.peak_bytes.value == f.peak_bytes.high

def test_fsdp_holds_its_master_copy_as_the_parameter():
    f = estimate(Architecture.from_parameters(10**9), Strategy(dp=8, zero=3, states_only=True), Workload())
    assert [f.per_gpu_bytes[k] for k in ("parameters", "gradients", "optimizer")] == [5 * 10**8, 5 * 10**8, 10**9]

def test_deepspeed_estimator():
    P, largest = 2_851_000_000, 32 * 10**6
    assert deepspeed_estimate(P, 2, 8, 8, offload_optimizer=True)[0] == 2 * P
    assert deepspeed_estimate(P, 2, 8, 8, offload_optimizer=True)[1] == int(P * 32 * 1.5)
    assert round(deepspeed_estimate(P, 2, 8, 8, offload_optimizer=False)[0] / 2**30, 2) == 11.28
    assert deepspeed_estimate(P, 2, 8, 8, offload_optimizer=False)[1] == int(P * 4 * 8 * 1.5)
    assert deepspeed_estimate(P, 3, 8, 8, largest, offload_parameters=True)[0] == 4 * largest
    assert deepspeed_estimate(P, 3, 8, 8, largest)[0] == 4 * largest + int(2 * P / 8)
    assert deepspeed_estimate(P, 3, 8, 8, largest, offload_optimizer=False)[0] == 4 * largest + int(18 * P / 8)

def test_loss_kernels():
    for vocab, hf, liger in ((4096, 1280.126, 256.33), (131072, 40960.125, 8192.33)):
        assert abs(cross_entropy_bytes(8 * 2048 * vocab) / 2**20 - hf) < 0.2
        assert abs(cross_entropy_bytes(8 * 2048 * vocab, fused=True) / 2**20 - liger) < 0.5
    for tokens, mib in ((4096, 6092.28), (8192, 9162.31), (16384, 15302.38), (32768, 27582.50)):
        assert abs(linear_cross_entropy_bytes(tokens, 4096, 128256) / 2**20 - mib) < 0.01

def test_states_under_frozen_weights():
    "16-bit frozen weights under mixed precision, 16 bytes for each adapter parameter."
    a = Architecture.from_numbers(32, 4096, 32, 32000, ffn=11008)
    f = estimate(a, Strategy(lora_rank=8, lora_targets="attention-qv", states_only=True), Workload())
    assert f.per_gpu_bytes["parameters"] == 2 * a.parameters + 4 * 4_194_304
    assert f.per_gpu_bytes["optimizer"] == 8 * 4_194_304

@pytest.mark.parametrize("optimizer, each", [("sgd", 4), ("sgd-plain", 0), ("adamw", 8)])
def test_what_an_optimizer_remembers(optimizer, each):
    a = Architecture.from_numbers(2, 64, 4, 1000)
    held = estimate(a, Strategy(optimizer=optimizer, states_only=True)).per_gpu_bytes["optimizer"]
    assert held == each * a.parameters
