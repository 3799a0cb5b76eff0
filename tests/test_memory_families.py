"""Parameter counts of families and heads: what Transformers builds from its own defaults, and what is not counted but refused or called a guess."""
import json
from pathlib import Path
from unittest.mock import patch
import pytest
from fsdl_devinfra.core.errors import CheckError
from fsdl_devinfra.memory import Architecture
from fsdl_devinfra.memory.architecture import _ALIKE, FAMILIES, NoTransformer

COUNTS = json.loads((Path(__file__).parent / "data" / "family_counts.json").read_text())

@pytest.mark.parametrize("name", COUNTS)
def test_count(name):
    config, expected = COUNTS[name]
    a = Architecture.from_config(config)
    assert (a.parameters, a.source) == (expected, "config")

PLAIN = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=100)

@pytest.mark.parametrize("config", [
    dict(PLAIN, model_type="a-new-hybrid", layer_types=["full_attention", "linear_attention"]),
    dict(PLAIN, model_type="a-new-translator", is_encoder_decoder=True),
    dict(PLAIN, model_type="a-new-ear", conv_dim=[512]),
    dict(PLAIN, model_type="a-new-eye", image_size=32, patch_size=4),
    dict(model_type="two-towers", text_config=dict(PLAIN, model_type="their-text", hidden_act="gelu"), vision_config=PLAIN),
    dict(PLAIN, model_type="bart", architectures=["BartForCausalLM"]),
    dict(PLAIN, model_type="bart", tie_word_embeddings=False),
    dict(PLAIN, model_type="marian", share_encoder_decoder_embeddings=False),
    dict(PLAIN, model_type="rembert"),
], ids=lambda c: c["model_type"])
def test_what_is_built_otherwise_is_not_counted(config):
    with pytest.raises(NoTransformer, match="by formula"): Architecture.from_config(config)

def test_an_unknown_decoder_is_a_guess():
    assert Architecture.from_config(dict(PLAIN, model_type="a-new-llama", layer_types=["sliding_attention", "full_attention"])).source == "guess"

def test_a_model_without_a_head_has_no_logits():
    from fsdl_devinfra.memory import Strategy, Workload, estimate
    body, whole = (Architecture.from_config(dict(PLAIN, model_type="llama", architectures=[name])) for name in ("LlamaModel", "LlamaForCausalLM"))
    assert whole.parameters - body.parameters == 64 * 100
    loss = [estimate(a, Strategy(), Workload(128)).timeline["loss"]["loss"] for a in (body, whole)]
    assert loss[0] < loss[1]

def test_a_text_encoder_is_half_of_t5():
    config = dict(model_type="t5", d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, vocab_size=32128, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    a = Architecture.from_config(dict(config, architectures=["T5EncoderModel"]))
    assert (a.parameters, a.decoder_layers) == (4_762_310_656, 0)  # the text encoder of Stable Diffusion 3 and FLUX

def _heads():
    "Every class that Transformers has for a known family."
    from transformers.models.auto import modeling_auto as auto
    names = ("", "FOR_CAUSAL_LM_", "FOR_SEQ_TO_SEQ_CAUSAL_LM_", "FOR_MASKED_LM_", "FOR_SEQUENCE_CLASSIFICATION_", "FOR_TOKEN_CLASSIFICATION_",
             "FOR_QUESTION_ANSWERING_", "FOR_IMAGE_CLASSIFICATION_", "FOR_PRETRAINING_", "FOR_MULTIPLE_CHOICE_")
    tables = [getattr(auto, f"MODEL_{n}MAPPING_NAMES") for n in names]
    found = ((kind, table.get(kind)) for kind in sorted({*FAMILIES, *_ALIKE}) for table in tables)
    return sorted({(kind, name if isinstance(name, str) else name[0]) for kind, name in found if name})

#: what a default configuration lacks, or that keeps a model small
_GIVEN = {"nemotron": dict(num_key_value_heads=8, head_dim=128), "ministral": dict(head_dim=128), "hunyuan_v1_dense": dict(head_dim=128), "dots1": None, "dbrx": None,
          "qwen3_moe": dict(num_hidden_layers=2), "deepseek_v3": dict(num_hidden_layers=4, first_k_dense_replace=4), "deepseek_v2": dict(num_hidden_layers=3), "llama4": None,
          "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 16)}

@pytest.mark.slow
def test_every_head_of_every_family_as_transformers_builds_it():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    exact, wrong = 0, {}
    for kind, name in _heads():
        if _GIVEN.get(kind, {}) is None: continue
        config = transformers.CONFIG_MAPPING[kind](**_GIVEN.get(kind, {}))
        config.pad_token_id = getattr(config, "pad_token_id", None)
        try: a = Architecture.from_config({**json.loads(json.dumps(config.to_dict(), default=str)), "architectures": [name]})
        except CheckError: continue
        with torch.device("meta"), patch.object(transformers.PreTrainedModel, "init_weights", lambda model: model.tie_weights()):
            model = getattr(transformers, name)._from_config(config)
        model.tie_weights()
        built = sum({id(p): p.numel() for p in model.parameters()}.values())
        # Transformers holds the routers' biases as buffers; checkpoints store them, so that they may be counted
        routers = sum(b.numel() for n, b in model.named_buffers() if n.endswith(("e_score_correction_bias", "expert_bias")))
        if a.parameters in (built, built + routers): exact += 1
        elif a.source != "guess": wrong[name] = (a.parameters, built)
    assert wrong == {}
    assert exact > 300

def test_a_tied_model_without_a_named_head_can_still_be_trained_as_a_language_model():
    bart = Architecture.from_config(dict(PLAIN, model_type="bart", d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, architectures=["BartModel"]))
    assert bart.classes == 0 and bart.tied
    glm = dict(PLAIN, model_type="chatglm", architectures=["ChatGLMModel"])
    assert Architecture.from_config(dict(glm, auto_map={"AutoModelForCausalLM": "x"})).parts.head == 6400 and Architecture.from_config(glm).parts.head == 0
