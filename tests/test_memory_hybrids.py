"""Hybrids, towers and packed weights: what Transformers' own modules count, and what a configuration says is stored."""
import pytest
from fsdl_devinfra.memory import Architecture, Strategy, Workload, estimate

#: model type -> (what its default configuration is given, parameters of the module that Transformers 5.24 builds from it on the meta device)
COUNTS = {
    "qwen3_next": (dict(num_hidden_layers=8), 13_797_675_136), "qwen3_5_text": (dict(num_hidden_layers=4), 2_899_186_752),
    "qwen3_5_moe_text": (dict(num_hidden_layers=4), 4_381_469_760), "jamba": (dict(num_hidden_layers=8), 13_295_237_088),
    "granitemoehybrid": (dict(num_hidden_layers=4, layer_types=["mamba", "mamba", "attention", "mamba"]), 5_018_284_672),
    "bamba": (dict(num_hidden_layers=4, attn_layer_indices=[1]), 2_105_209_472), "falcon_h1": ({}, 8_514_961_408),
    "mamba": ({}, 159_308_544), "mamba2": ({}, 7_285_403_648), "falcon_mamba": ({}, 159_308_544), "rwkv": ({}, 7_392_649_216),
    "lfm2": ({}, 2_705_497_600), "gemma3": ({}, 2_723_312_896), "qwen2_5_vl": ({}, 75_789_228_800), "qwen3_5": ({}, 9_407_453_936),
    "qwen3_vl": ({}, 12_616_410_352)}

@pytest.mark.parametrize("kind", COUNTS)
def test_a_hybrid_or_a_tower_is_counted_exactly(kind):
    transformers = pytest.importorskip("transformers")
    given, expected = COUNTS[kind]
    try: config = transformers.AutoConfig.for_model(kind, **given).to_dict()
    except ValueError: pytest.skip(f"this Transformers does not know {kind}")
    named = "ConditionalGeneration" if "vision_config" in config else "CausalLM"
    a = Architecture.from_config(config | {"architectures": ["For" + named]})
    assert a.parameters == expected and a.source == "config"

LLAMA = dict(model_type="llama", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
             intermediate_size=14336, vocab_size=128256, max_position_embeddings=131072)

def _weights(config): return estimate(Architecture.from_config(config), Strategy(inference=True), Workload(128)).per_gpu_bytes["parameters"]

@pytest.mark.parametrize("said, low, high", [
    (dict(quant_method="awq", bits=4, group_size=128, zero_point=True), 5.2, 5.5),
    (dict(quant_method="fp8", weight_block_size=[128, 128]), 8.3, 8.6),
    (dict(quant_method="modelopt", quant_algo="NVFP4"), 5.5, 5.8),
    (dict(quant_method="compressed-tensors", config_groups={"g": {"weights": {"num_bits": 8, "type": "int"}}}), 8.3, 8.6),
    (dict(quant_method="bitsandbytes", load_in_4bit=True), 5.5, 5.8)])
def test_a_quantised_checkpoint_counts_as_it_is_stored(said, low, high):
    whole, packed = _weights(LLAMA) / 2**30, _weights(LLAMA | {"quantization_config": said}) / 2**30
    assert 14.9 < whole < 15.0 and low < packed < high

def test_layers_that_are_left_out_stay_in_16_bits():
    said = dict(quant_method="fp8", modules_to_not_convert=[f"model.layers.{i}.mlp" for i in range(16)])
    assert _weights(LLAMA | {"quantization_config": said}) > 1.2 * _weights(LLAMA | {"quantization_config": dict(quant_method="fp8")})

def test_headers_give_packed_bytes_to_the_byte():
    shapes = {"model.embed_tokens.weight": ("BF16", (1000, 64)), "lm_head.weight": ("BF16", (1000, 64)),
              "model.layers.0.mlp.up_proj.qweight": ("I32", (64, 20)), "model.layers.0.mlp.up_proj.scales": ("F16", (1, 160))}
    a = Architecture.from_config(dict(LLAMA, hidden_size=64, num_hidden_layers=1, intermediate_size=160, vocab_size=1000), shapes)
    held = estimate(a, Strategy(inference=True), Workload(128)).per_gpu_bytes["parameters"]
    assert held == 2 * 2 * 64_000 + 4 * 1280 + 2 * 160

def test_mla_needs_no_whole_head_width():
    a = Architecture.from_config(dict(model_type="glm4_moe_lite", hidden_size=2048, num_hidden_layers=3, num_attention_heads=20, kv_lora_rank=512,
                                      q_lora_rank=768, qk_nope_head_dim=192, qk_rope_head_dim=64, v_head_dim=256, intermediate_size=10240,
                                      moe_intermediate_size=1536, n_routed_experts=64, num_experts_per_tok=4, first_k_dense_replace=1, vocab_size=1000))
    assert a.kv_lora_rank == 512 and a.dense_layers == 1

def test_windows_count_when_cache_tokens_are_given():
    config = dict(LLAMA, sliding_window=128, layer_types=["sliding_attention", "full_attention"] * 16)
    held = {tokens: estimate(Architecture.from_config(c), Strategy(inference=True), Workload(128, 1, None, 32768)).per_gpu_bytes["activations"]
            for tokens, c in (("windows", config), ("none", LLAMA))}
    assert held["windows"] < 0.52 * held["none"]

def test_active_parameters_leave_the_looked_up_embedding_out():
    a = Architecture.from_config(LLAMA)
    assert a.active_parameters == a.parameters - 128256 * 4096

def test_deepspeed_in_fp32_moves_four_bytes():
    a = Architecture.from_config(LLAMA)
    wide, narrow = (estimate(a, Strategy(framework="deepspeed", zero=3, dp=8, precision=p), Workload(512)).per_gpu_bytes["communication"]
                    for p in ("fp32", "bf16-mixed"))
    assert wide == 2 * narrow

def test_a_trainer_of_before_the_fused_kernel_copies_moments():
    a = Architecture.from_config(LLAMA)
    old, new = (estimate(a, Strategy(framework="hf", trainer_version=v, precision="bf16"), Workload(128)).peak_bytes.value for v in ("4.40", None))
    assert old > new

def _kept_by(module, x):
    "Bytes that torch keeps for the backward pass of a module, its weights and its input left out."
    torch = pytest.importorskip("torch")
    outside = {p.untyped_storage().data_ptr() for p in [*module.parameters(), x]}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in outside: kept[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor): module(x)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

def test_a_gated_convolution_keeps_what_torch_says_it_keeps():
    "The one mixer whose kernels save on a CPU what they save on a GPU."
    torch, modeling = pytest.importorskip("torch"), pytest.importorskip("transformers.models.lfm2.modeling_lfm2")
    from transformers import AutoConfig
    from fsdl_devinfra.memory.mixers import short_convolution
    config = AutoConfig.for_model("lfm2", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, full_attn_idxs=[1])
    x = torch.randn(2, 256, 64, requires_grad=True).mul(1.0)
    measured = _kept_by(modeling.Lfm2ShortConv(config, 0), x) / 4 / (2 * 256)
    assert measured == pytest.approx(short_convolution(config.to_dict()).kept, rel=0.01)

def test_the_second_half_of_rwkv_keeps_what_torch_says_it_keeps():
    torch, modeling = pytest.importorskip("torch"), pytest.importorskip("transformers.models.rwkv.modeling_rwkv")
    from transformers import AutoConfig
    from fsdl_devinfra.memory.mixers import rwkv
    narrow, wide = (dict(hidden_size=64, attention_hidden_size=64, intermediate_size=ffn) for ffn in (256, 512))
    x = torch.randn(2, 256, 64, requires_grad=True).mul(1.0)
    measured = [_kept_by(modeling.RwkvFeedForward(AutoConfig.for_model("rwkv", num_hidden_layers=2, **c), 0), x) / 4 / 512 for c in (narrow, wide)]
    assert measured[1] - measured[0] == pytest.approx(rwkv(wide).kept - rwkv(narrow).kept, rel=0.01)
    assert measured[0] == pytest.approx(5 * 64 + 2 * 256, rel=0.01)

NEMOTRON = dict(model_type="nemotron_h", hidden_size=1024, num_attention_heads=16, num_key_value_heads=4, head_dim=64, intermediate_size=4096,
                mamba_num_heads=32, mamba_head_dim=64, n_groups=8, ssm_state_size=128, vocab_size=1000, num_hidden_layers=4)

@pytest.mark.parametrize("pattern", ["M-M*", "MMMM", "M***", "----"])
def test_a_layer_keeps_what_its_kind_keeps(pattern):
    "The average layer of a hybrid is the mean of its layers: each kind alone, and the mixture."
    from fsdl_devinfra.memory.activations import attention_bytes, mixer_bytes, mlp_bytes
    strategy = Strategy(precision="bf16")
    def kept(layers): return [size(Architecture.from_config(NEMOTRON | dict(hybrid_override_pattern=layers)), strategy) for size in (mixer_bytes, mlp_bytes)]
    alone = {"M": kept("MMMM")[0], "-": kept("MM--")[1] * 2}
    share = {kind: pattern.count(kind) / 4 for kind in "M-*"}
    if "M" in pattern:
        model = Architecture.from_config(NEMOTRON | dict(hybrid_override_pattern=pattern))
        assert kept(pattern) == pytest.approx([share["M"] * alone["M"], share["-"] * alone["-"]])
        full = Architecture.from_config(NEMOTRON | dict(model_type="llama"))
        assert attention_bytes(model, strategy) == pytest.approx(share["*"] * attention_bytes(full, strategy))

def test_a_model_without_attention_has_no_cache_and_no_longest_sequence():
    a = Architecture.from_config(dict(model_type="mamba2", hidden_size=1024, num_hidden_layers=4, num_heads=32, head_dim=64, n_groups=2, vocab_size=1000))
    assert a.attending == 0 and a.positions > 500_000
    from fsdl_devinfra.memory.serving import ServeOptions, request_bytes
    assert [request_bytes(a, ServeOptions(), n, 2048).growing for n in (100, 100_000)] == [0, 0]
    assert request_bytes(a, ServeOptions(), 100, 2048).fixed == 4 * (4 * 2048 * 128 + 2 * (2048 + 2 * 2 * 128) * 3)

@pytest.mark.parametrize("kind", ["mamba2", "nemotron_h"])
def test_norms_of_recurrent_models_keep_what_torch_says_they_keep(kind):
    "An RMSNorm in 16 bits and the product that reads it: its input in 32 bits, what is scaled, and what the product reads."
    torch = pytest.importorskip("torch")
    from fsdl_devinfra.memory.activations import norm_bytes
    modeling = pytest.importorskip(f"transformers.models.{kind}.modeling_{kind}")
    norm = next(getattr(modeling, name) for name in dir(modeling) if name.endswith("RMSNorm") and "Gated" not in name)
    after = torch.nn.Sequential(norm(64), torch.nn.Linear(64, 8, bias=False)).to(torch.bfloat16)
    x = torch.randn(2, 256, 64, dtype=torch.bfloat16, requires_grad=True).mul(1.0)
    measured = _kept_by(after, x) / (2 * 256)
    model = Architecture.from_config(NEMOTRON | dict(model_type=kind, num_heads=32, hybrid_override_pattern="MMMM", hidden_size=64))
    assert norm_bytes(model, Strategy(precision="bf16")) == pytest.approx(measured, rel=0.02)

def test_adapters_on_a_model_without_attention_are_refused():
    from fsdl_devinfra.core.errors import BadInput
    a = Architecture.from_config(dict(model_type="mamba2", hidden_size=1024, num_hidden_layers=4, num_heads=32, head_dim=64, vocab_size=1000))
    with pytest.raises(BadInput, match="adapters are counted on attention"): estimate(a, Strategy(lora_rank=8), Workload(128))
    assert estimate(a, Strategy(tp=2, dp=1), Workload(128)).peak_bytes.value < estimate(a, Strategy(), Workload(128)).peak_bytes.value

#: BERT-large as Transformers' page on one GPU trained it in January 2022, and two of its figures that are no row of the table: MiB
BERT = dict(model_type="bert", architectures=["BertForSequenceClassification"], hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
            intermediate_size=4096, vocab_size=30522, max_position_embeddings=512, hidden_dropout_prob=0.1)

@pytest.mark.parametrize("recompute, measured", [("none", 8681), ("full", 6775)])
def test_an_old_trainer_holds_what_its_pytorch_held(recompute, measured):
    "Gradients filled with zeros, the scores that softmax read, and no copies of moments; today's PyTorch is another matter."
    a, batch = Architecture.from_config(BERT), Workload(512, 1, 4)
    old, new = (estimate(a, Strategy(framework="hf", trainer_version=version, precision="fp32", attention="eager", recompute=recompute), batch, measure="device")
                for version in ("4.15", "4.40"))
    assert old.peak_bytes.value / 2**20 == pytest.approx(measured, rel=0.02)
    assert abs(new.peak_bytes.value / 2**20 / measured - 1) > 0.03

def test_a_score_takes_what_torch_says_it_takes():
    "Softmax in 32 bits, the dropout of a GPU, and a product in 16 bits: 7 bytes a score under autocast, 9 in fp32."
    torch = pytest.importorskip("torch")
    from fsdl_devinfra.memory.activations import core_bytes

    class Core(torch.nn.Module):
        def __init__(self, dtype):
            super().__init__()
            self.values = torch.nn.Parameter(torch.ones(64, 2, dtype=dtype))

        def forward(self, scores):
            kept, _ = torch.native_dropout(torch.softmax(scores.float(), -1), 0.1, True)
            return kept.to(scores.dtype) @ self.values

    for dtype, precision in ((torch.float32, "fp32"), (torch.bfloat16, "bf16-mixed")):
        x = torch.randn(4, 64, 64, dtype=dtype, requires_grad=True).mul(1.0)
        held = core_bytes(Architecture.from_config(BERT), Strategy(precision=precision, attention="eager"), Workload(64)) / (16 * 64)
        assert _kept_by(Core(dtype), x) / x.numel() == pytest.approx(held, rel=0.03)
