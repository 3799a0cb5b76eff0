"""RecurrentGemma, Zamba, xLSTM and MiniMax-01: parameters as Transformers builds them, activations as torch keeps them, caches as its classes hold them."""
import json
import random

import pytest

from fsdl_devinfra.memory import Architecture, Strategy, Workload
from fsdl_devinfra.memory.activations import layer_bytes
from fsdl_devinfra.memory.engines import cache_bytes
from fsdl_devinfra.memory.mixers import griffin, lightning, mlstm

transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")

def recurrent_gemma(pick):
    heads = pick(2, 4, 8)
    return dict(hidden_size=heads * pick(8, 16), num_attention_heads=heads, num_key_value_heads=pick(1, heads), intermediate_size=2 * pick(48, 96), lru_width=heads * pick(8, 24),
                conv1d_width=pick(2, 4), attention_bias=pick(True, False), num_hidden_layers=pick(3, 5, 8), attention_window_size=pick(16, 64),
                block_types=pick(["recurrent", "recurrent", "attention"], ["recurrent", "attention"]), tie_word_embeddings=pick(True, False))

def zamba(pick):
    hidden = pick(32, 64)
    return dict(hidden_size=hidden, num_attention_heads=pick(2, 4), num_key_value_heads=2, intermediate_size=pick(48, 96), num_hidden_layers=pick(6, 9, 14),
                n_mamba_heads=pick(1, 2, 4), mamba_d_state=pick(4, 16), mamba_d_conv=pick(2, 4), mamba_expand=pick(1, 2), mamba_dt_rank=pick("auto", 5),
                mamba_conv_bias=pick(True, False), mamba_proj_bias=pick(True, False), attn_layer_period=pick(3, 6), attn_layer_offset=pick(1, 2))

def zamba2(pick):
    layers = pick(6, 9, 12)
    kinds = [pick("mamba", "hybrid") for _ in range(layers - 1)] + ["hybrid"]
    return dict(hidden_size=pick(32, 64), num_attention_heads=pick(2, 4), intermediate_size=pick(48, 96), num_hidden_layers=layers, layers_block_type=kinds, n_mamba_heads=pick(2, 4),
                mamba_d_state=pick(4, 16), mamba_ngroups=pick(1, 2), num_mem_blocks=pick(1, 2), adapter_rank=pick(3, 8), use_shared_attention_adapter=pick(True, False),
                add_bias_linear=pick(True, False), num_key_value_heads=2)

def xlstm(pick):
    heads = pick(2, 4)
    return dict(hidden_size=heads * pick(16, 32), num_heads=heads, num_hidden_layers=pick(1, 3), use_bias=pick(True, False), qk_dim_factor=pick(0.5, 1.0), v_dim_factor=pick(1.0, 2.0),
                ffn_proj_factor=pick(2.667, 1.5), ffn_round_up_to_multiple_of=pick(16, 64), weight_mode=pick("single", "fused"))

def minimax(pick):
    heads = pick(2, 4)
    return dict(hidden_size=heads * 16, num_attention_heads=heads, num_key_value_heads=pick(1, 2), head_dim=pick(None, 8, 32), intermediate_size=pick(48, 96), num_hidden_layers=pick(2, 5),
                num_local_experts=pick(4, 8), num_experts_per_tok=pick(1, 2), tie_word_embeddings=pick(True, False),
                layer_types=pick(None, ["linear_attention"] * 5))

FAMILIES = dict(recurrent_gemma=recurrent_gemma, zamba=zamba, zamba2=zamba2, xlstm=xlstm, minimax=minimax)

@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kind", FAMILIES)
def test_parameters_are_those_of_the_module(kind, seed):
    given = FAMILIES[kind](lambda *choices: draw.choice(choices)) if (draw := random.Random(f"{kind}{seed}")) else {}
    if given.get("layer_types"): given["num_hidden_layers"] = 5
    config = transformers.CONFIG_MAPPING[kind](vocab_size=draw.choice((100, 300)), **given)
    with torch.device("meta"): module = transformers.AutoModelForCausalLM.from_config(config)
    module.tie_weights()
    model = Architecture.from_config(json.loads(json.dumps(config.to_dict(), default=str)) | {"architectures": ["ForCausalLM"]})
    assert (model.parameters, model.source) == (sum(p.numel() for p in module.parameters()), "config")

def kept(module, x, call):
    "Elements of 16 bits that torch keeps for each token, weights, buffers and the input left out."
    outside = {t.untyped_storage().data_ptr() for t in [*module.parameters(), *module.buffers(), x]}
    held = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in outside: held[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor): call(module, x)
    return sum(t.untyped_storage().nbytes() for t in held.values()) / 2 / (x.shape[0] * x.shape[1])

def tokens(length, hidden): return torch.randn(2, length, hidden, dtype=torch.bfloat16, requires_grad=True).mul(1.0)

@pytest.mark.parametrize("given", [dict(hidden_size=96, lru_width=160, num_attention_heads=4), dict(hidden_size=64, lru_width=64, num_attention_heads=8)])
def test_griffins_block_keeps_what_torch_says_it_keeps(given):
    modeling = pytest.importorskip("transformers.models.recurrent_gemma.modeling_recurrent_gemma")
    config = transformers.AutoConfig.for_model("recurrent_gemma", num_hidden_layers=3, **given)
    block, x = modeling.RecurrentGemmaRecurrentBlock(config, 0).to(torch.bfloat16), tokens(96, given["hidden_size"])
    places = torch.arange(96)[None].expand(2, -1)
    assert kept(block, x, lambda m, x: m(x, places, None, use_cache=False)) == pytest.approx(griffin(config.to_dict()).kept, rel=0.02)

@pytest.mark.parametrize("given", [dict(num_attention_heads=6, head_dim=24, block_size=48), dict(num_attention_heads=4, head_dim=64, block_size=64)])
def test_lightning_attention_keeps_what_torch_says_it_keeps(given):
    modeling = pytest.importorskip("transformers.models.minimax.modeling_minimax")
    config = transformers.AutoConfig.for_model("minimax", hidden_size=96, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], **given)
    layer, x = modeling.MiniMaxLightningAttention(config, 0).to(torch.bfloat16), tokens(384, 96)
    assert kept(layer, x, lambda m, x: m(x, None, None)) == pytest.approx(lightning(config.to_dict()).kept, rel=0.02)

@pytest.mark.parametrize("given", [dict(hidden_size=96, num_heads=6, chunk_size=48), dict(hidden_size=128, num_heads=2, qk_dim_factor=1.0, v_dim_factor=1.5)])
def test_mlstm_keeps_what_torch_says_it_keeps(given):
    modeling = pytest.importorskip("transformers.models.xlstm.modeling_xlstm")
    config = transformers.AutoConfig.for_model("xlstm", num_hidden_layers=2, mode="train", **given)
    layer, x = modeling.xLSTMLayer(config).to(torch.bfloat16), tokens(384, given["hidden_size"])
    assert kept(layer, x, lambda m, x: m(x)) == pytest.approx(mlstm(config.to_dict()).kept, rel=0.03)

def test_states_are_those_of_the_caches():
    modeling = pytest.importorskip("transformers.models.xlstm.modeling_xlstm")
    config = transformers.AutoConfig.for_model("xlstm", hidden_size=256, num_heads=4, num_hidden_layers=2)
    held = modeling.xLSTMCache(config, 1).rnn_state[0]
    assert sum(t.numel() for t in held) == mlstm(config.to_dict()).state

GRIFFIN = dict(model_type="recurrent_gemma", hidden_size=64, num_attention_heads=4, num_key_value_heads=1, intermediate_size=128, lru_width=64, vocab_size=100, num_hidden_layers=6,
               attention_window_size=100, tie_word_embeddings=True)

def test_griffin_remembers_a_window_and_a_state():
    model = Architecture.from_config(GRIFFIN)
    windows, states = 2 * 100 * 2 * 16 * 2, 4 * (4 * 64 + 2 * 64 * 3)
    for length in (1_000, 500_000):
        assert cache_bytes(model, Strategy(inference=True), Workload(length)) * 6 == windows + states

def test_a_shared_block_is_held_once_and_passed_often():
    zamba = dict(model_type="zamba2", hidden_size=64, num_hidden_layers=6, num_attention_heads=4, intermediate_size=128, vocab_size=100, n_mamba_heads=4)
    once, often = (Architecture.from_config(zamba | dict(layers_block_type=["mamba"] * (6 - uses) + ["hybrid"] * uses)) for uses in (1, 4))
    own = 64 * 64 + 64 * 128 + 128 * 2 * 128  # a product and an adapter
    assert often.parameters - once.parameters == 3 * own
    assert often.active_parameters - once.active_parameters > 3 * own + 3 * (3 * 64 * 128)
    assert cache_bytes(often, Strategy(inference=True), Workload(10_000)) > 3 * cache_bytes(once, Strategy(inference=True), Workload(10_000))

def test_hidden_states_in_32_bits_are_checkpointed_in_32_bits():
    mamba = dict(model_type="mamba2", hidden_size=1024, num_hidden_layers=8, num_heads=32, vocab_size=1000)
    strategy = Strategy(recompute="full", precision="bf16")
    wide, narrow = (layer_bytes(Architecture.from_config(mamba | dict(residual_in_fp32=is_wide)), strategy, Workload(4096)) for is_wide in (True, False))
    assert (wide, narrow) == (4 * 1024, 2 * 1024)

#: class of a norm → bytes that it and the product behind it keep for each element in 16-bit training
NORMS = {"nemotron_h": "NemotronHRMSNorm", "mamba2": "Mamba2RMSNorm", "gemma2": "Gemma2RMSNorm", "cohere": "CohereLayerNorm", "olmo": "OlmoLayerNorm", "apertus": "ApertusRMSNorm",
         "recurrent_gemma": "RecurrentGemmaRMSNorm", "xlstm": "xLSTMRMSNorm", "minimax": "MiniMaxRMSNorm", "zamba2": "Zamba2RMSNorm", "gpt_oss": "GptOssRMSNorm", "olmo2": "Olmo2RMSNorm"}

@pytest.mark.parametrize("kind", NORMS)
def test_a_norm_keeps_what_torch_says_it_keeps(kind):
    from fsdl_devinfra.memory.architecture import FAMILIES as ROWS
    modeling = pytest.importorskip(f"transformers.models.{kind}.modeling_{kind}")
    after = torch.nn.Sequential(getattr(modeling, NORMS[kind])(64), torch.nn.Linear(64, 8, bias=False)).to(torch.bfloat16)
    assert 2 * kept(after, tokens(256, 64), lambda m, x: m(x)) / 64 == pytest.approx(4 + ROWS[kind]["copies"], rel=0.03)

def test_an_mlp_among_experts_is_no_expert():
    from fsdl_devinfra.memory.activations import mlp_bytes
    nemotron = dict(model_type="nemotron_h", hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64, intermediate_size=4096, mamba_num_heads=8, mamba_head_dim=64, n_groups=2,
                    ssm_state_size=16, vocab_size=100, num_hidden_layers=4, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, moe_shared_expert_intermediate_size=64)
    said = {pattern: mlp_bytes(Architecture.from_config(nemotron | dict(hybrid_override_pattern=pattern)), Strategy(precision="bf16")) for pattern in ("M-ME", "M-M-", "MEME")}
    assert said["M-ME"] == pytest.approx((said["M-M-"] + said["MEME"]) / 2)

def test_a_cache_that_does_not_grow_is_not_solved_for():
    from fsdl_devinfra.core.device_table import find_device
    from fsdl_devinfra.core.errors import BadInput
    from fsdl_devinfra.memory.serving import ServeOptions, serve, serving_text
    from fsdl_devinfra.memory.solving import solve
    xlstm, card = Architecture.from_config(dict(model_type="xlstm", hidden_size=1024, num_hidden_layers=4, num_heads=4, vocab_size=1000)), find_device("h100")
    for model in (xlstm, Architecture.from_config(GRIFFIN)):
        with pytest.raises(BadInput, match="no cache that grows"): solve("kv-tokens", model, Strategy(inference=True), Workload(1000), card)
        assert solve("micro-batch", model, Strategy(inference=True), Workload(1000), card)[0] > 1
    said = serving_text(serve(xlstm, ServeOptions(), card)[0])
    assert "no cache that grows" in said and "tokens fit" not in said
    attends = Architecture.from_config(dict(model_type="llama", hidden_size=1024, num_hidden_layers=4, num_attention_heads=4, vocab_size=1000))
    assert "tokens fit" in serving_text(serve(attends, ServeOptions(), card)[0])

@pytest.mark.parametrize("kinds, repeats", [(["hybrid", "mamba"] * 3, 1), (["mamba", "hybrid"] * 2, 0)])
def test_time_has_the_products_of_every_use_of_a_shared_block(kinds, repeats):
    "What `cost` multiplies is what `memory` says a token passes through: two blocks, three uses; and two uses, where nothing is repeated."
    from fsdl_devinfra.compute.operations import layer_products, product_scale
    model = Architecture.from_config(dict(model_type="zamba2", hidden_size=64, num_hidden_layers=len(kinds), layers_block_type=kinds, num_attention_heads=4, intermediate_size=128,
                                          vocab_size=100, n_mamba_heads=4, num_mem_blocks=2))
    products = model.layers * sum(inner * outer * times for inner, outer, times in layer_products(model)) * product_scale(model)
    assert products == pytest.approx(model.parts.layer + model.repeated) and bool(model.repeated) == bool(repeats)
    assert products == pytest.approx(model.active_parameters - model.parts.embedding - model.parts.other)

JAMBA = dict(model_type="jamba", hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96, vocab_size=100, num_hidden_layers=8, num_experts=1, num_experts_per_tok=1)
NEMOTRON = dict(model_type="nemotron_h", hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=96, mamba_num_heads=8, mamba_head_dim=16, n_groups=2,
                ssm_state_size=16, vocab_size=100, num_hidden_layers=5, hybrid_override_pattern="M-*-M")
FALCON = dict(model_type="falcon_h1", hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=96, vocab_size=100, num_hidden_layers=4, mamba_n_heads=4,
              mamba_d_head=16, mamba_d_ssm=64)
LLAMA = dict(model_type="llama", hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96, vocab_size=100, num_hidden_layers=3)

def first(*choices): return choices[0]

def adapted(config):
    "Inputs and outputs of the linear layers that are used, those around attention apart: what adapters of rank 1 have."
    with torch.device("meta"): module = transformers.AutoModelForCausalLM.from_config(config)
    module.tie_weights()
    found = {name if "adapter_list" not in name else id(layer.weight): layer for name, layer in module.named_modules() if isinstance(layer, torch.nn.Linear) and "lm_head" not in name}
    sizes = {name: layer.in_features + layer.out_features for name, layer in found.items()}
    attends = sum(size for name, size in sizes.items() if str(name).split(".")[-1] in ("q_proj", "k_proj", "v_proj", "o_proj"))
    return sum(sizes.values()), attends

@pytest.mark.parametrize("given", [JAMBA, NEMOTRON, FALCON, LLAMA, GRIFFIN, dict(model_type="zamba", **zamba(first)), dict(model_type="zamba2", **zamba2(first)),
                                   dict(model_type="zamba2", **zamba2(first)) | dict(layers_block_type=["hybrid", "mamba"] * 3, num_mem_blocks=2)], ids=lambda given: given["model_type"])
def test_adapters_are_put_on_the_layers_that_there_are(given):
    "`--lora-rank`: PEFT finds modules, and a block that layers share is one at each of its uses; Llama is the control."
    from fsdl_devinfra.memory.states import adapter_parameters
    config = transformers.CONFIG_MAPPING[given["model_type"]](**{key: value for key, value in given.items() if key != "model_type"})
    model = Architecture.from_config(json.loads(json.dumps(config.to_dict(), default=str)))
    found = tuple(adapter_parameters(model, Strategy(lora_rank=1, lora_targets=targets)) for targets in ("all-linear", "attention"))
    assert found == adapted(config)
