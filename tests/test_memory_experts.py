"""Adapters on experts, and what quantisation leaves of them in 16 bits: counted as PEFT and bitsandbytes find them."""
from __future__ import annotations

import json

import pytest

from fsdl_devinfra.compute.cluster import cluster
from fsdl_devinfra.compute.throughput import data_seconds, throughput
from fsdl_devinfra.memory import Architecture, Strategy, Workload
from fsdl_devinfra.memory.engines import stored_widths
from fsdl_devinfra.memory.footprint import estimate
from fsdl_devinfra.memory.states import RENAMED_EXPERTS, adapter_parameters
from fsdl_devinfra.memory.strategy import CHOICES

transformers = pytest.importorskip("transformers")

TINY = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=96, vocab_size=128)
EIGHT = dict(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, n_shared_experts=1, first_k_dense_replace=1)
LATENT = dict(n_group=2, topk_group=1, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, num_key_value_heads=4)
FOUR = dict(num_experts=4, num_experts_per_tok=2)
LOCAL = dict(num_local_experts=4, num_experts_per_tok=2)
#: model type, what it has besides, and the parameters that PEFT 0.21.2 trains in it under Transformers 5.24 (rank 8, all-linear)
ADAPTED = [
    ("llama", {}, 22272),  # the control: no experts
    ("mixtral", LOCAL, 76896), ("olmoe", FOUR, 76896), ("qwen3_moe", FOUR | dict(moe_intermediate_size=32), 46176),
    ("deepseek_v2", EIGHT | LATENT, 59840), ("deepseek_v3", EIGHT | LATENT, 59840), ("glm4_moe", EIGHT | dict(n_group=1, topk_group=1), 56960),
    ("ernie4_5_moe", dict(moe_num_experts=4, moe_k=2, moe_intermediate_size=32, moe_num_shared_experts=1, moe_layer_start_index=1), 34368),
    ("qwen2_moe", FOUR | dict(moe_intermediate_size=32, shared_expert_intermediate_size=48), 20376),
    ("gpt_oss", LOCAL | dict(intermediate_size=64), 10752), ("granitemoe", LOCAL, 10752), ("phimoe", LOCAL, 12384),
    ("llama4_text", dict(num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=80, interleave_moe_layer_step=1), 23904),
]


def configured(kind: str, more: dict) -> tuple[object, Architecture]:
    config = transformers.AutoConfig.for_model(kind, **(TINY | more))
    return config, Architecture.from_config(json.loads(json.dumps(config.to_dict(), default=str)))


@pytest.mark.parametrize(("kind", "more", "trained"), ADAPTED, ids=[case[0] for case in ADAPTED])
def test_adapters_are_where_peft_puts_them(kind: str, more: dict, trained: int) -> None:
    _, model = configured(kind, more)
    assert adapter_parameters(model, Strategy(lora_rank=8)) == trained


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "more", "trained"), ADAPTED, ids=[case[0] for case in ADAPTED])
def test_peft_says_so_itself(kind: str, more: dict, trained: int) -> None:
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    config, _ = configured(kind, more)
    with torch.device("meta"): module = transformers.AutoModelForCausalLM.from_config(config)
    adapted = peft.get_peft_model(module, peft.LoraConfig(r=8, target_modules="all-linear"))
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == trained


def test_the_types_whose_experts_are_found_are_those_of_transformers() -> None:
    """PEFT reads them from Transformers; those that nothing here counts are left out."""
    mapping = pytest.importorskip("transformers.conversion_mapping")._MODEL_TO_CONVERSION_PATTERN
    read = {kind for kind, pattern in mapping.items() if pattern in ("mixtral", "qwen2_moe")} | {"mixtral"}
    assert read >= RENAMED_EXPERTS
    vision = {"qwen3_omni_moe_text", "qwen3_omni_moe_thinker"}
    assert {kind for kind in read - RENAMED_EXPERTS - vision if kind.islower()} <= {"beam", "sarvam_mla"}


def held(model: Architecture, **options: object) -> dict[str, float]:
    found = estimate(model, Strategy(**(dict(lora_rank=8) | options)), Workload(128, 1))  # pyright: ignore[reportArgumentType]
    return {part: max(moment.get(part, 0) for moment in found.timeline.values()) for part in ("parameters", "activations", "optimizer")}


def test_what_adapters_on_experts_hold() -> None:
    """Against a dry run of PEFT's model (16 experts of 512 x 1024, 8 layers, torch 2.14): 0.93 GiB allocated with adapters on all linear
    layers and 0.44 on attention alone; with activation checkpointing 0.58 and 0.41."""
    _, model = configured("qwen3_moe", dict(hidden_size=512, intermediate_size=1024, moe_intermediate_size=1024, num_hidden_layers=8,
                                            num_attention_heads=8, num_key_value_heads=4, head_dim=64, num_experts=16, num_experts_per_tok=2, vocab_size=1024))
    for traced, options in ((0.93, {}), (0.44, dict(lora_targets="attention")), (0.58, dict(recompute="full")),
                            (0.41, dict(lora_targets="attention", recompute="full"))):
        found = sum(held(model, **options).values()) / 2**30
        assert abs(found / traced - 1) < 0.04, (options, found)


def test_bitsandbytes_leaves_experts_that_are_parameters() -> None:
    _, mixtral = configured("mixtral", LOCAL | dict(hidden_size=1024, intermediate_size=4096))
    _, llama = configured("llama", dict(hidden_size=1024, intermediate_size=4096))
    def frozen(model: Architecture, **options: object) -> float: return held(model, lora_targets="attention", base_weights="nf4", **options)["parameters"]
    newest, before, asked = (frozen(mixtral, **how) for how in (dict(framework="hf"), dict(framework="hf", trainer_version="4.57"), {}))
    experts = mixtral.parts.expert
    assert newest - before == pytest.approx(experts * (2 - (0.5 + 0.127 / 8)), rel=1e-3) and asked == pytest.approx(before, rel=1e-3)
    assert frozen(llama, framework="hf") == pytest.approx(frozen(llama), rel=1e-3)  # the control: linear modules alone
    said = estimate(mixtral, Strategy(lora_rank=8, base_weights="nf4"), Workload(128, 1)).assumptions
    assert any("leaves them in 16 bits" in note and "--framework hf" in note for note in said)


def test_expert_parallel_ranks_hold_their_experts_adapters() -> None:
    _, model = configured("mixtral", LOCAL | dict(hidden_size=1024, intermediate_size=4096))
    one, four = (held(model, framework="megatron", dp=4, ep=ep)["optimizer"] for ep in (1, 4))
    assert four < 0.4 * one


@pytest.mark.parametrize("framework", ["hf", "fsdp"], ids=["hf", "control"])
def test_time_gathers_experts_in_the_bytes_that_memory_holds(framework: str) -> None:
    """Under the Trainer experts stay in 16 bits and are sent so; `fsdp` is asked for four bits and gets them."""
    _, mixtral = configured("mixtral", LOCAL | dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=8))
    four, sixteen = (Strategy(framework=framework, dp=8, zero=3, lora_rank=8, base_weights=base) for base in ("nf4", None))
    took = [data_seconds(mixtral, one, cluster("L40S", 8), mixtral.layers)[0] for one in (four, sixteen)]
    held = [stored_widths(mixtral, one).expert for one in (four, sixteen)]
    assert (held[0] == held[1]) == (framework == "hf")
    assert (took[0] > 0.9 * took[1]) == (framework == "hf"), took


@pytest.mark.parametrize("base", CHOICES["base_weights"])
def test_a_step_over_every_kind_of_base_has_a_time(base: str | None) -> None:
    _, model = configured("llama", {})
    plain = throughput(model, Strategy(lora_rank=8), Workload(seq_len=64), cluster("H100 SXM", 1)).step_seconds.value
    took = throughput(model, Strategy(lora_rank=8, base_weights=base), Workload(seq_len=64), cluster("H100 SXM", 1)).step_seconds.value
    assert took >= plain > 0
