"""Loads are exact: what a constructor computes, and what a library leaves out on purpose, as from_pretrained has it."""
from __future__ import annotations

import json

import pytest

from fsdl_devinfra.core.errors import BadInput

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
GPTJ = {"vocab_size": 64, "n_embd": 64, "n_layer": 1, "n_head": 4, "rotary_dim": 16, "n_positions": 2048}
CASES = {"gptj": GPTJ, "codegen": GPTJ, "llama": SMALL, "gpt_neox": SMALL, "bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 4, "vocab_size": 60},
         "marian": {"vocab_size": 60, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
                    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 512, "pad_token_id": 0, "decoder_start_token_id": 0}}


def differences(ours, theirs) -> list[str]:
    found = []
    for kind in "named_parameters", "named_buffers":
        a, b = dict(getattr(ours, kind)(remove_duplicate=False)), dict(getattr(theirs, kind)(remove_duplicate=False))
        found += sorted(a.keys() ^ b.keys())
        found += [n for n in a.keys() & b.keys() if a[n].dtype != b[n].dtype or not torch.equal(torch.nan_to_num(a[n].float()), torch.nan_to_num(b[n].float()))]
    return found


@pytest.mark.parametrize("name", ["gptj", "llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("codegen", "gpt_neox", "bloom", "marian"))])
@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_tables_that_no_file_stores(tmp_path, name, stored):
    from fsdl_devinfra.hub.loading import load
    config = transformers.AutoConfig.for_model(name, **CASES[name])
    auto = transformers.AutoModelForSeq2SeqLM if name == "marian" else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    auto.from_config(config).to(getattr(torch, stored)).save_pretrained(tmp_path)
    for asked in None, "float32", "float16":
        theirs = auto.from_pretrained(tmp_path, **({"dtype": getattr(torch, asked)} if asked else {}))
        assert differences(load(tmp_path, auto, dtype=asked), theirs) == []


@pytest.mark.parametrize("names", ["new", "gamma"])
def test_bert_as_it_was_pretrained(tmp_path, names):
    from fsdl_devinfra.hub.loading import load
    from safetensors.torch import load_file, save_file
    transformers.BertForPreTraining(transformers.BertConfig(**SMALL)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["BertForMaskedLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    file = tmp_path / "model.safetensors"
    if names == "gamma":
        old = {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v.clone() for k, v in load_file(file).items()}
        save_file(old, file, metadata={"format": "pt"})
    for auto in None, transformers.AutoModel, transformers.AutoModelForMaskedLM:
        theirs = (auto or transformers.AutoModelForMaskedLM).from_pretrained(tmp_path)
        assert differences(load(tmp_path, auto), theirs) == []


@pytest.mark.parametrize("extra", ["bert.encoder.layer.2.output.dense.bias", "bert.encoder.layer.0.classifier.weight", "bert.pooler.dense.weight", "bert.other.weight"])
def test_a_tensor_too_many_is_still_refused(tmp_path, extra):
    from fsdl_devinfra.hub.loading import load
    from safetensors.torch import load_file, save_file
    transformers.BertModel(transformers.BertConfig(**SMALL)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = extra.removeprefix("bert.")
    if name in tensors: del tensors[name]  # a part that the class has must be there
    else: tensors[name] = torch.zeros(32)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match="unexpected|not in the module|missing"): load(tmp_path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_fsdp_wrapped_module.", ""])
def test_the_prefix_of_a_wrapper_is_named(tmp_path, prefix):
    from fsdl_devinfra.hub.loading import load
    from safetensors.torch import load_file, save_file
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({prefix + n: t for n, t in tensors.items()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if not prefix: assert load(tmp_path)
    else:
        with pytest.raises(BadInput, match=f"begins with '{prefix}'"): load(tmp_path)


@pytest.mark.parametrize("made, whole", [("LlamaForCausalLM", False), ("LlamaModel", True), ("BertForSequenceClassification", False), ("BertModel", True)])
def test_without_architectures_no_head_is_lost_in_silence(tmp_path, made, whole):
    from fsdl_devinfra.hub.loading import load
    cls = getattr(transformers, made)
    cls(cls.config_class(**SMALL)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    if whole: assert differences(load(tmp_path), transformers.AutoModel.from_pretrained(tmp_path)) == []
    else:
        with pytest.raises(BadInput, match="names no architecture, and the base model has no place for (lm_head|classifier)"): load(tmp_path)
    assert differences(load(tmp_path, cls), cls.from_pretrained(tmp_path)) == []  # the class that is named decides


def test_names_that_a_library_ignores_on_purpose(tmp_path):
    """T5 has two copies of an embedding, GPT-2's oldest files masks, and both load."""
    from fsdl_devinfra.hub.loading import load
    from safetensors.torch import load_file, save_file
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=60, n_positions=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    old = {n.removeprefix("transformer."): t.clone() for n, t in load_file(file).items()}  # as gpt2 is on the Hub: without the prefix, with masks
    masks = {f"h.{i}.attn.bias": torch.tril(torch.ones(1, 1, 32, 32)) for i in range(2)}
    save_file(old | masks, file, metadata={"format": "pt"})
    assert differences(load(tmp_path), transformers.GPT2LMHeadModel.from_pretrained(tmp_path)) == []
    save_file(old | masks | {"h.0.other": torch.ones(2)}, file, metadata={"format": "pt"})
    with pytest.raises(BadInput, match="h.0.other"): load(tmp_path)
