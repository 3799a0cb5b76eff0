"""What must hold for any model and strategy: parts add up, more of something never takes less, and what cannot be run is refused."""
from dataclasses import replace
import json
import shlex
import time
import pytest
from fsdl_devinfra import cli
from fsdl_devinfra.core.device_table import devices, find_device
from fsdl_devinfra.core.errors import BadInput
from fsdl_devinfra.core.units import size_text
from fsdl_devinfra.memory import PARTS, Architecture, Footprint, Strategy, Workload, device_peak, estimate
from fsdl_devinfra.memory.strategy import CHOICES

LLAMA = Architecture.from_numbers(32, 4096, 32, 128256, ffn=14336, kv_heads=8, name="8B")
MOE = Architecture.from_config(dict(model_type="mixtral", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=32000, num_local_experts=8, num_experts_per_tok=2))
DEEPSEEK = Architecture.from_config(dict(model_type="deepseek_v3", hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048, num_hidden_layers=61, num_attention_heads=128, num_key_value_heads=128, kv_lora_rank=512, q_lora_rank=1536, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8, first_k_dense_replace=3, vocab_size=129280))
T5 = Architecture.from_config(dict(model_type="t5", d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8, vocab_size=32128))
VIT = Architecture.from_config(dict(model_type="vit", hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, image_size=224, patch_size=16, num_labels=1000))
BERT = Architecture.from_config(dict(model_type="bert", hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, vocab_size=30522))
MODELS = [LLAMA, MOE, DEEPSEEK, T5, VIT, BERT]

def strategies():
    yield Strategy()
    for name, options in CHOICES.items():
        for option in options: yield Strategy(**{name: option})
    for zero in range(4):
        for framework in CHOICES["framework"]: yield Strategy(dp=8, zero=zero, framework=framework)
    yield from (Strategy(tp=4, dp=2, zero=3), Strategy(tp=2, sp=False), Strategy(pp=4, dp=2, zero=1, framework="megatron"), Strategy(pp=2, vpp=2, zero=3, dp=2), Strategy(cp=4, zero=3), Strategy(dp=8, zero=3, shard_group=4),
                Strategy(lora_rank=8), Strategy(lora_rank=8, base_weights="nf4"), Strategy(inference=True), Strategy(inference=True, base_weights="int8"), Strategy(dp=8, zero=3, offload="parameters"),
                Strategy(dp=8, zero=2, offload="optimizer", framework="deepspeed"), Strategy(optimizer_in_backward=True), Strategy(compile=True, loss="chunked"), Strategy(states_only=True), Strategy(dp=8, ep=8, zero=3))

@pytest.mark.parametrize("a", MODELS, ids=lambda a: a.family)
def test_every_strategy_of_the_field(a):
    ran = 0
    for s in strategies():
        try: f = estimate(a, s, Workload(256, 2), find_device("h100"))
        except BadInput as e: assert e.hint; continue
        ran += 1
        assert tuple(f.per_gpu_bytes) == PARTS and all(isinstance(v, int) and v >= 0 for v in f.per_gpu_bytes.values())
        assert f.peak_bytes.low <= f.peak_bytes.value <= f.peak_bytes.high and f.fits in ("yes", "no", "tight")
        assert f.peak_phase in f.timeline and f.host_bytes >= 0
        assert abs(device_peak(a, s, Workload(256, 2)) - estimate(a, s, Workload(256, 2)).device_bytes.value) < 8
        assert Footprint.from_dict(f.to_dict()) == f
        assert f.verdict() and "<svg" in f._repr_html_()
    assert ran > 25

def peak(a=LLAMA, s=Strategy(dp=8, zero=3), w=Workload(4096, 2)): return estimate(a, s, w).device_bytes.value

def test_parts_add_up_to_the_device_figure():
    for measure, without in (("allocated", ("runtime", "reserve")), ("reserved", ("runtime",)), ("device", ())):
        f = estimate(LLAMA, Strategy(dp=8, zero=3), Workload(4096, 2), measure=measure)
        assert abs(sum(v for k, v in f.per_gpu_bytes.items() if k not in without) - f.peak_bytes.value) <= 8

def test_more_takes_more():
    base = peak()
    for w in (Workload(8192, 2), Workload(4096, 4)): assert peak(w=w) > base
    for s in (Strategy(dp=4, zero=3), Strategy(dp=8, zero=2), Strategy(dp=8, zero=0)): assert peak(s=s) > base
    assert peak(s=Strategy(dp=8, zero=3, recompute="full")) < peak(s=Strategy(dp=8, zero=3, recompute="selective")) < base
    assert peak(s=Strategy(dp=8, zero=3, attention="eager")) > base
    assert peak(s=Strategy(dp=8, zero=3, loss="fused")) < peak(s=Strategy(dp=8, zero=3, loss="chunked")) < base
    assert peak(s=Strategy(dp=8, zero=3, compile=True)) < base < peak(s=Strategy(dp=8, zero=3, precision="fp32"))

def test_splitting_takes_less():
    big = Architecture.from_numbers(80, 8192, 64, 128256, ffn=28672, kv_heads=8)
    one = peak(big, Strategy(recompute="full"))
    for s in (Strategy(tp=8, recompute="full"), Strategy(pp=8, recompute="full"), Strategy(dp=8, zero=3, recompute="full"), Strategy(cp=4, zero=3, recompute="full")): assert peak(big, s) < one, s
    assert peak(MOE, Strategy(dp=8, ep=8)) < peak(MOE, Strategy(dp=8))
    assert peak(big, Strategy(dp=64, zero=3, shard_group=8)) > peak(big, Strategy(dp=64, zero=3))

def test_pipeline_holds_more_where_it_starts():
    big = Architecture.from_numbers(80, 8192, 64, 32000, ffn=28672, kv_heads=8)
    few, many = (estimate(big, Strategy(pp=8, tp=8, framework="megatron"), Workload(4096, 1, m)) for m in (1, 32))
    assert many.device_bytes.value > few.device_bytes.value and many.fullest_stage == "the first stage"
    with_v = estimate(big, Strategy(pp=8, vpp=2, tp=8, framework="megatron"), Workload(4096, 1, 32))
    assert with_v.device_bytes.value > many.device_bytes.value

def test_offload_moves_bytes_to_the_host():
    a = Architecture.from_numbers(40, 5120, 40, 50257, gated=False, tied=True)
    on, off = (estimate(a, Strategy(zero=2, framework="deepspeed", precision="fp16-mixed", recompute="full", offload=o), Workload(1024)) for o in ("none", "optimizer"))
    assert off.host_bytes >= 16 * a.parameters and on.host_bytes == 0
    assert on.device_bytes.value - off.device_bytes.value > 14 * a.parameters
    assert estimate(a, Strategy(zero=2, framework="deepspeed", precision="fp16-mixed", recompute="full", offload="optimizer"), Workload(1024), find_device("v100-32")).fits != "no"
    assert estimate(a, Strategy(zero=2, framework="deepspeed", precision="fp16-mixed", recompute="full"), Workload(1024), find_device("v100-32")).fits == "no"

def test_inference_cache():
    f = [estimate(LLAMA, Strategy(inference=True), Workload(4096, 1, kv_cache_tokens=t)).per_gpu_bytes["activations"] for t in (1000, 2000)]
    assert f[1] - f[0] == 1000 * 32 * 2 * 8 * 128 * 2
    mla = [estimate(DEEPSEEK, Strategy(inference=True), Workload(4096, 1, kv_cache_tokens=t)).per_gpu_bytes["activations"] for t in (1000, 2000)]
    assert mla[1] - mla[0] == 1000 * 61 * (512 + 64) * 2  # DeepSeek-V3 caches one 576-wide vector a token and layer

def test_refusals_name_the_reason():
    for s, w, why in ((Strategy(tp=3), Workload(), "heads"), (Strategy(pp=64), Workload(), "32 layers"), (Strategy(cp=3), Workload(4096), "sequence of 4096"), (Strategy(tp=8), Workload(4095), "sequence-parallel"),
                      (Strategy(ep=2, dp=2), Workload(), "experts"), (Strategy(vpp=2), Workload(), "pipeline"), (Strategy(pp=2, vpp=2), Workload(grad_accum=3), "micro-batches"), (Strategy(sp=True), Workload(), "tp is 1"),
                      (Strategy(zero=2, pp=2, framework="megatron"), Workload(), "cannot be combined"), (Strategy(shard_group=2, dp=4), Workload(), "full sharding"), (Strategy(shard_group=3, dp=4, zero=3), Workload(), "shard groups"),
                      (Strategy(offload="parameters"), Workload(), "sharded"), (Strategy(base_weights="nf4"), Workload(), "cannot be trained"), (Strategy(optimizer_in_backward=True), Workload(grad_accum=4), "micro-batches"),
                      (Strategy(inference=True, lora_rank=4), Workload(), "LoRA")):
        with pytest.raises(BadInput, match=why): estimate(LLAMA, s, w)
    with pytest.raises(BadInput, match="8-bit"): estimate(LLAMA, Strategy(precision="fp8-mixed"), Workload(), find_device("a100"))

def test_uneven_stages_are_allowed():
    assert estimate(Architecture.from_numbers(126, 16384, 128, 128256, ffn=53248, kv_heads=8), Strategy(dp=8, tp=8, pp=8, zero=3), Workload(8192, 1)).peak_bytes.value > 0

def test_remedies_are_true():
    f = estimate(LLAMA, Strategy(), Workload(8192, 2), find_device("h100"))
    assert f.fits == "no" and f.remedies
    small = estimate(LLAMA, Strategy(dp=8, zero=3), Workload(8192, 2), find_device("h100"))
    assert small.fits == "no" and any(r.startswith("full activation checkpointing, ") for r in small.remedies)
    assert estimate(LLAMA, Strategy(dp=8, zero=3, recompute="full"), Workload(8192, 2), find_device("h100")).fits == "yes"

def _options(remedy):
    return shlex.split(remedy.partition(": ")[2])

@pytest.mark.parametrize("asked", [[], ["--batch-size", "8"], ["--lora-rank", "8", "--recompute", "selective"], ["--optimizer", "lion"], ["--inference"]])
def test_a_remedy_is_a_command_that_does_what_it_says(asked, capsys):
    "Each is run as it is printed: it fits with the memory it names, and no option stands twice."
    assert cli.main(["memory", "llama-3.1-8b", "--gpu", "T4-16GB", *asked, "--json"]) == 1
    remedies = json.loads(capsys.readouterr().out)["remedies"]
    assert remedies
    for remedy in (r for r in remedies if ": fsdl-devinfra " in r):
        words = _options(remedy)
        flags = [word for word in words if word.startswith("--")]
        assert len(flags) == len(set(flags)), remedy
        assert cli.main([*words[1:], "--json"]) == 0, remedy
        said = json.loads(capsys.readouterr().out)
        assert said["fits"] in ("yes", "tight") and size_text(said["device_bytes"]["value"]) in remedy

def test_adapters_on_the_same_card_come_before_more_cards():
    remedies = estimate(LLAMA, Strategy(), Workload(4096, 1), find_device("4090")).remedies
    assert remedies[0].startswith("QLoRA") and all("--dp" not in r for r in remedies[:1])

def test_reserve_never_exceeds_the_gpu_while_tensors_fit():
    seen = set()
    for d in devices():
        f = estimate(LLAMA, Strategy(dp=8, zero=3, recompute="full"), Workload(8192, 2), d)
        live = sum(v for k, v in f.per_gpu_bytes.items() if k != "reserve")
        if live <= d.memory_bytes: assert f.device_bytes.value <= d.memory_bytes; seen.add("fits")
        else: assert f.device_bytes.value >= live; seen.add("does not")
    assert seen == {"fits", "does not"}

def test_ten_thousand_strategies_in_two_seconds():
    runs = [Strategy(dp=d, tp=t, zero=z, recompute=r) for d in (1, 2, 4, 8, 16, 32, 64, 128) for t in (1, 2, 4, 8) for z in (0, 1, 2, 3) for r in ("none", "selective", "full")]
    w, start, n = Workload(4096, 1), time.process_time(), 0
    while n < 10_000:
        for s in runs: device_peak(LLAMA, s, w)
        n += len(runs)
    assert time.process_time() - start < 2 * 1.5  # the benchmark gives the figure; here only that it has not doubled

def test_asynchronous_tensor_parallelism_takes_memory_outside_the_allocator():
    run = dict(dp=4, tp=8, zero=3, recompute="full")
    plain, overlapped = (estimate(LLAMA, Strategy(async_tp=x, **run), Workload(8192, 4), measure="device") for x in (False, True))
    assert overlapped.per_gpu_bytes["runtime"] - plain.per_gpu_bytes["runtime"] == 2 * 2 * 4096 * 8192 * 4 // 8
    assert estimate(LLAMA, Strategy(async_tp=True, **run), Workload(8192, 4)).peak_bytes == estimate(LLAMA, Strategy(**run), Workload(8192, 4)).peak_bytes

def test_bounds_of_the_loss_cover_what_versions_of_a_framework_do():
    "A compiled loss keeps 4 bytes a logit, an eager one 8 to 14, and one of 16-bit logits as they are 6."
    w, run = Workload(8192, 2), dict(dp=8, zero=3, recompute="selective")
    for compiled in (False, True):
        f = estimate(LLAMA, Strategy(compile=compiled, **run), w)
        assert f.peak_phase == "loss"
        saved = (8 if compiled else 4) * 8192 * 2 * 128256
        assert f.peak_bytes.low < f.peak_bytes.value - saved

def test_a_loss_of_16_bit_logits_is_in_the_range():
    f = estimate(LLAMA, Strategy(precision="bf16", lora_rank=8, recompute="full"), Workload(8192, 2), measure="allocated")
    assert f.peak_phase == "loss" and f.peak_bytes.low < f.peak_bytes.value - 6 * 8192 * 2 * 128256

def test_a_bitsandbytes_base_may_have_hidden_states_in_32_bits():
    f, plain = (estimate(LLAMA, Strategy(lora_rank=8, base_weights=b, precision="bf16", recompute="full", loss="fused"), Workload(8192, 2)) for b in ("nf4", None))
    assert plain.peak_bytes.high - plain.peak_bytes.value < plain.per_gpu_bytes["activations"]
    assert f.peak_bytes.high - f.peak_bytes.value > f.per_gpu_bytes["activations"] * 0.9

@pytest.mark.parametrize("measure", ["allocated", "reserved", "device"])
def test_the_device_figure_is_that_of_the_fullest_stage_whatever_is_asked(measure):
    a = Architecture.from_config(dict(model_type="gpt_oss", hidden_size=2880, intermediate_size=2880, num_hidden_layers=24, num_attention_heads=64, num_key_value_heads=8, head_dim=64, vocab_size=201088, num_local_experts=32, num_experts_per_tok=4))
    s, w = Strategy(dp=2, pp=4, vpp=2, zero=1, precision="fp16-mixed", recompute="full", attention="eager", loss="chunked", framework="megatron", compile=True), Workload(2048, 8, 4)
    assert abs(estimate(a, s, w, measure=measure).device_bytes.value / device_peak(a, s, w) - 1) < 1e-6

GPT = Architecture.from_numbers(72, 14336, 64, 250880, gated=False, tied=True, dropout=True)

def test_flat_buffers_leave_no_holes_and_cached_blocks_stay():
    "Megatron-DeepSpeed: the step's buffer does not fit where the activations were, so that what they took stays reserved."
    s, w = Strategy(dp=4, tp=8, sp=False, pp=12, zero=1, recompute="full", attention="eager", precision="fp16-mixed", framework="megatron"), Workload(2048, 2, 256)
    f = estimate(GPT, s, w, measure="reserved")
    step, back = f.timeline["optimizer"], f.timeline["backward"]
    assert step["reserve"] > back["activations"] - 2**31 and step["activations"] == 0
    assert estimate(GPT, replace(s, optimizer="none"), w).timeline["forward"]["reserve"] == f.timeline["forward"]["reserve"]  # 6 GiB of states, no hole

def test_every_communicator_of_a_pipeline_counts():
    one, many = (estimate(GPT, Strategy(tp=8, sp=False, pp=pp, dp=4, zero=1, framework="megatron", precision="fp16-mixed", recompute="full"), Workload(2048, 1, 64), measure="device").per_gpu_bytes["runtime"] for pp in (1, 4))
    assert abs(many - one - 3 * 0.3e9) < 2

def test_a_layer_of_gptq_is_unpacked_for_its_backward_pass():
    run = dict(lora_rank=64, zero=2, framework="deepspeed", precision="fp16-mixed", recompute="full")
    packed, plain = (estimate(LLAMA, Strategy(base_weights=b, **run), Workload(512, 1)).timeline["backward"] for b in ("int4-gptq", None))
    layer = LLAMA.parts.layer / 32
    assert abs(packed["activations"] - plain["activations"] - 2 * layer - 5 * 4096 * 14336) < 2

def test_pure_bf16_reduces_in_bf16():
    mixed, pure = (estimate(LLAMA, Strategy(dp=8, zero=3, precision=p, recompute="full"), Workload(512, 1)).timeline["backward"]["communication"] for p in ("bf16-mixed", "bf16"))
    assert abs(mixed - pure - 2 * 2 * LLAMA.parts.layer / 32) < 2

def gemma(**more): return Architecture.from_config(dict(model_type="gemma2", hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4, head_dim=256,
                                                        vocab_size=256000, sliding_window=4096, **more))

@pytest.mark.parametrize("more, windowed", [({}, 13), (dict(layer_types=["sliding_attention"] * 20 + ["full_attention"] * 6), 20), (dict(sliding_window_pattern=13), 24), (dict(use_sliding_window=False), 0)])
def test_a_window_bounds_the_cache_of_the_layers_that_have_it(more, windowed):
    a = gemma(**more)
    assert a.windowed_layers == windowed
    short, long = (estimate(a, Strategy(inference=True), Workload(n)).timeline["decode"]["activations"] for n in (4096, 8192))
    assert abs(long - short - (26 - windowed) * 4096 * 2 * 4 * 256 * 2) <= 1

def test_a_window_only_masks_the_scores_of_eager_attention():
    kept = [estimate(gemma(**m), Strategy(attention="eager", recompute="none"), Workload(8192)).timeline["forward"]["activations"] for m in ({}, dict(use_sliding_window=False))]
    assert kept[0] == kept[1]

def test_selective_recomputation_makes_only_the_core_of_attention_again():
    run = dict(tp=8, framework="megatron", attention="eager")
    back = {r: estimate(LLAMA, Strategy(recompute=r, **run), Workload(4096)).timeline["backward"]["activations"] for r in ("none", "selective", "full")}
    core = 32 * 4096 * 2 / 8 * 4096
    assert 31 * core <= back["none"] - back["selective"] <= 32 * core  # one layer's is made again, where nothing larger is

def test_offloaded_activations_are_never_more_than_there_are():
    small = Architecture.from_numbers(1, 512, 8, 1000)
    on, off = (estimate(small, Strategy(offload=o), Workload(512)).timeline["backward"]["activations"] for o in ("none", "activations"))
    assert off <= on

def test_adapters_of_latent_attention_and_of_a_decoder_that_looks_at_its_encoder():
    from fsdl_devinfra.memory.states import adapter_parameters
    mla = (7168 + 1536) + (1536 + 128 * 192) + (7168 + 512 + 64) + (512 + 128 * 256) + (128 * 128 + 7168)
    attention = Strategy(lora_rank=8, lora_targets="attention")
    assert adapter_parameters(DEEPSEEK, attention) == 8 * 61 * mla
    assert adapter_parameters(T5, attention) == 8 * (6 + 2 * 6) * 8 * 512

def test_adapters_are_sharded_over_all_ranks_and_experts_over_theirs():
    for framework in ("fsdp", "deepspeed"):
        run = [Strategy(dp=8, ep=ep, zero=3, lora_rank=16, framework=framework, states_only=True) for ep in (1, 8)]
        one, eight = (estimate(MOE, s, Workload(512)).timeline["states"] for s in run)
        assert one["optimizer"] == eight["optimizer"] and one["parameters"] == eight["parameters"]

def test_the_host_holds_what_is_trained():
    full, lora = (estimate(LLAMA, Strategy(dp=8, zero=3, offload="optimizer", lora_rank=r), Workload(512)).host_bytes for r in (None, 16))
    assert full == LLAMA.parameters and lora < full / 100  # 8 bytes of AdamW, over 8 ranks
    paged = [estimate(LLAMA, Strategy(optimizer="adamw-8bit-paged", lora_rank=r, precision="bf16"), Workload(512)).host_bytes for r in (None, 16)]
    assert paged[1] < paged[0] / 100
    whole = estimate(LLAMA, Strategy(dp=8, zero=3, offload="parameters", lora_rank=16), Workload(512)).host_bytes
    assert whole > 2 * LLAMA.parameters / 8
