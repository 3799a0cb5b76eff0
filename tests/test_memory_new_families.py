"""Gemma 3n and 4, and DeepSeek's sparse attention: as Transformers builds them, and what their caches keep."""
import json

import pytest

from fsdl_devinfra.memory import Architecture, Strategy, Workload, estimate
from fsdl_devinfra.memory.serving import ServeOptions, request_bytes

transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")

SMALL = dict(vocab_size=1000, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_hidden_layers=6)
GEMMA = SMALL | dict(vocab_size_per_layer_input=1000, hidden_size_per_layer_input=8, intermediate_size=96, pad_token_id=0, bos_token_id=1, eos_token_id=2)
LATENT = SMALL | dict(num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, n_routed_experts=8,
                      num_experts_per_tok=2, moe_intermediate_size=32, intermediate_size=96, n_group=1, topk_group=1, index_n_heads=4, index_head_dim=32)


def both(kind, **how):
    "What is counted, what Transformers builds (with the router's bias, which checkpoints hold and which is no parameter there)."
    config = transformers.CONFIG_MAPPING[kind](**how)
    plain = json.loads(json.dumps(config.to_dict(), default=str))
    with torch.device("meta"): module = transformers.AutoModelForCausalLM.from_config(config)
    module.tie_weights()
    biases = sum(b.numel() for name, b in module.named_buffers() if name.endswith("e_score_correction_bias"))
    return Architecture.from_config(plain, name=kind), sum(p.numel() for p in module.parameters()) + biases


@pytest.mark.parametrize("how", [
    {}, dict(num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 3),
    dict(num_kv_shared_layers=2, use_double_wide_mlp=True, layer_types=["sliding_attention", "full_attention"] * 3), dict(hidden_size_per_layer_input=0),
    dict(attention_k_eq_v=True, num_global_key_value_heads=1, global_head_dim=32), dict(global_head_dim=24),
    dict(enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=32)])
def test_gemma_4(how):
    model, built = both("gemma4_text", **GEMMA | how)
    assert (model.parameters, model.source) == (built, "config")


@pytest.mark.parametrize("how", [{}, dict(num_kv_shared_layers=2), dict(intermediate_size=[96, 64, 96, 64, 96, 64]), dict(altup_num_inputs=3, laurel_rank=5)])
def test_gemma_3n(how):
    usual = GEMMA | dict(num_kv_shared_layers=0, layer_types=["sliding_attention", "full_attention"] * 3, activation_sparsity_pattern=[0.0] * 6)
    model, built = both("gemma3n_text", **usual | how)
    assert (model.parameters, model.source) == (built, "config")


@pytest.mark.parametrize("kind, how", [("deepseek_v32", {}), ("deepseek_v32", dict(index_n_heads=3, index_head_dim=48)), ("glm_moe_dsa", {}),
                                       ("glm_moe_dsa", dict(indexer_types=["full", "shared"] * 3))])
def test_sparse_attention(kind, how):
    model, built = both(kind, **LATENT | how)
    assert (model.parameters, model.source) == (built, "config")


def cache(model): return estimate(model, Strategy(inference=True), Workload(1000)).kv_cache_bytes


def test_borrowed_keys_are_cached_once():
    layers = dict(layer_types=["full_attention"] * 6, intermediate_size=96, num_hidden_layers=6, model_type="gemma4_text")
    whole, borrowing = (Architecture.from_config(SMALL | layers | dict(num_kv_shared_layers=n, sliding_window=None)) for n in (0, 2))
    assert cache(borrowing) == cache(whole) * 4 / 6


@pytest.mark.parametrize("heads, how", [(2, {}), (1, dict(attention_k_eq_v=True, num_global_key_value_heads=1))])
def test_layers_without_a_window_have_heads_of_their_own(heads, how):
    plain = SMALL | dict(layer_types=["sliding_attention", "full_attention"] * 3, intermediate_size=96, model_type="gemma4_text", sliding_window=100, global_head_dim=32)
    model = Architecture.from_config(plain | how)
    windowed, whole = 3 * 100 * 2 * 2 * 16, 3 * 1000 * 2 * heads * 32
    assert cache(model) == 2 * (windowed + whole)
    assert request_bytes(model, ServeOptions("llama.cpp"), 1000, 0).growing == 2 * (3 * 256 * 2 * 2 * 16 + whole)


def test_an_indexer_keeps_a_key_for_each_token():
    sparse, plain = (Architecture.from_config(LATENT | dict(model_type=kind, index_head_dim=width)) for kind, width in (("deepseek_v32", 128), ("deepseek_v3", 0)))
    assert cache(sparse) - cache(plain) == 1000 * 6 * 2 * 128
    kept = [request_bytes(model, ServeOptions("vllm"), 1000, 1000).growing for model in (sparse, plain)]
    assert kept[0] - kept[1] == 1000 * 6 * (128 + 4)


def test_a_speech_encoder_beside_the_text_is_a_guess():
    text = dict(model_type="llama", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=100, intermediate_size=96)
    assert Architecture.from_config(dict(model_type="granite_speech", text_config=text, encoder_config={})).source == "guess"
    assert Architecture.from_config(dict(model_type="fuyu", patch_size=30, text_config=text)).source == "guess"
    assert Architecture.from_config(text).source == "config"
