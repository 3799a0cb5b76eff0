"""Documents that nobody would write: JSON of every kind where a config, an index or a Hub's answer should be. Each ends in a sentence, never in a traceback."""
from __future__ import annotations

import json
import logging
import sys
import types
import warnings
from pathlib import Path

import pytest

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fsdl_devinfra.core.errors import BadInput, CheckError, MissingExtra
from fsdl_devinfra.hub import remote
from fsdl_devinfra.hub.checkpoint import Checkpoint, _inspect_hub, inspect, tied_tensors
from fsdl_devinfra.hub.loading import load
from fsdl_devinfra.hub.locks import lock_hub
from fsdl_devinfra.hub.layout import Wish
from fsdl_devinfra.hub.source import Source

KEYS = ["architectures", "architecture", "_class_name", "model_type", "auto_map", "trust_remote_code", "custom_pipelines", "text_config", "vision_config", "tie_word_embeddings",
        "quantization_config", "library_name", "num_classes", "pretrained_cfg", "_diffusers_version", "transformers_version", "weight_map", "metadata", "dtype", "id2label", "model_args"]
LISTING = ["sha", "siblings", "rfilename", "size", "blobId", "lfs", "oid", "sha256", "cardData", "license", "library_name", "gated", "path", "type"]
FILES = ["config.json", "model_index.json", "adapter_config.json", "tokenizer_config.json", "processor_config.json", "modules.json", "model.safetensors.index.json", "unet/config.json"]
VALUES = st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats() | st.text(max_size=6) | st.sampled_from(["a" * 40, "b" * 64, "config.json", "model.safetensors", "../x", "file", "w"])


def anything(keys: list[str]) -> st.SearchStrategy:
    return st.recursive(VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(keys), inner, max_size=6), max_leaves=12)


def documents(keys: list[str]) -> st.SearchStrategy: return anything(keys) | st.dictionaries(st.sampled_from(keys), anything(keys), min_size=1, max_size=8)


def fuzz(examples: int): return settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def write_weights(folder: Path) -> None:
    text = b'{"model.embed_tokens.weight":{"dtype":"U8","shape":[4,4],"data_offsets":[0,16]},"w":{"dtype":"U8","shape":[2],"data_offsets":[16,18]}}'
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(18))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model"); (folder / "unet").mkdir(); write_weights(folder)
    return folder


@fuzz(150)
@given(files=st.dictionaries(st.sampled_from(FILES), documents(KEYS), min_size=1, max_size=3))
def test_inspect_of_any_documents(folder, files):
    for name in FILES: (folder / name).unlink(missing_ok=True)
    for name, document in files.items(): (folder / name).write_text(json.dumps(document))
    try: found = inspect(folder)
    except CheckError: return
    assert str(found) and json.loads(Checkpoint.from_dict(json.loads(found.to_json())).to_json())["tensors"] == json.loads(found.to_json())["tensors"]


class Liar:
    """A Hub that answers with the documents it was given."""
    base, bytes_read = "http://hub.example.org", 0

    def __init__(self, info: object, tree: object): self.info, self.tree = info, tree

    def read(self, url: str, *_: object, **__: object) -> tuple[remote.Reply, bytes]:
        said = self.info if "/revision/" in url else self.tree if "/tree/" in url else {}
        return remote.Reply(url, 200, {}, None, None, None, None), json.dumps(said).encode()

    def span(self, *_: object) -> bytes: raise CheckError("no ranges here")


SIBLING = st.fixed_dictionaries({}, optional={name: anything(LISTING) for name in ("rfilename", "size", "blobId", "lfs")})
INFO = anything(LISTING) | st.builds(lambda more, files: {"sha": "a" * 40} | more | {"siblings": files}, st.dictionaries(st.sampled_from(LISTING), anything(LISTING), max_size=4), st.lists(SIBLING, max_size=3))


@fuzz(200)
@given(info=INFO, tree=documents(LISTING))
def test_a_hub_that_answers_with_anything(info, tree):
    usual = remote.Remote
    try:
        remote.Remote = lambda: Liar(info, tree)
        for call in _inspect_hub, lock_hub:
            try: found = call(Source("org/x", repo="org/x"), Wish())
            except CheckError: continue
            assert str(found) and type(found).from_dict(json.loads(found.to_json()))
    finally: remote.Remote = usual


@pytest.mark.parametrize("said, why", [({"siblings": [{"rfilename": "a", "size": 1, "blobId": "b" * 40}] * 2}, "twice"), ({"siblings": [{"size": 1}]}, "without a name")])
def test_listings_that_are_refused(said, why):
    with pytest.raises(remote.WrongBytes, match=why): remote.find(Liar({"sha": "a" * 40} | said, []), "org/x")


@pytest.mark.parametrize("text", [[], [1], "x", 5, None, True, {}])
def test_a_text_config_of_another_kind(text):
    assert tied_tensors(["model.embed_tokens.weight"], {}, {"text_config": text}) == {}


# Loading

SMALL = st.sampled_from([0, 1, 2, -1, "x", None, 1.5, True, [], {}, "silu", {"rope_type": "default"}])
LLAMA = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 8}
NAMED = st.sampled_from([None, [], 5, {}, "LlamaForCausalLM", ["LlamaForCausalLM"], ["DigitsViT"], [None], [["a"]], ["AutoModel"], ["BertModel"], ["__doc__"], [""]])
TYPES = st.sampled_from(["llama", "bert", "vit", "nonsense", 5, None, [], {}])
SIZES = ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "rope_parameters", "rope_scaling", "hidden_act", "dtype", "quantization_config", "auto_map", "tie_word_embeddings"]
CONFIGS = st.builds(lambda more, named, kind: LLAMA | more | named | kind, st.dictionaries(st.sampled_from(SIZES), SMALL, max_size=3),
                    st.fixed_dictionaries({}, optional={"architectures": NAMED}), st.fixed_dictionaries({}, optional={"model_type": TYPES}))


@pytest.mark.slow
def test_load_with_any_config(tmp_path):
    pytest.importorskip("torch"); pytest.importorskip("transformers"); write_weights(tmp_path)
    @fuzz(120)
    @given(config=CONFIGS | documents(KEYS))
    def check(config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckError) as error: load(tmp_path)  # the weights fit no model
        assert error.value.hint
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(): warnings.simplefilter("ignore"); check()
    finally: logging.disable(logging.NOTSET)


@pytest.mark.parametrize("config", ["[]", "3", '"x"', "null", "true"])
def test_a_config_that_is_no_object(tmp_path, config):
    pytest.importorskip("torch"); write_weights(tmp_path); (tmp_path / "config.json").write_text(config)
    with pytest.raises(BadInput, match="config.json"): load(tmp_path)


def test_a_timm_model_needs_timm_and_loads_nothing_by_itself(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch"); write_weights(tmp_path); made = []
    def config(**keys: object) -> Path: (tmp_path / "config.json").write_text(json.dumps(keys)); return tmp_path
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtra) as error: load(config(architecture="resnet18"))
    assert error.value.hint == "pip install timm"  # no extra of this package brings it
    class Net(torch.nn.Module):
        def __init__(self, **kwargs: object):
            made.append(kwargs); super().__init__(); self.model = torch.nn.Module(); self.model.embed_tokens = torch.nn.Embedding(4, 4); self.register_buffer("w", torch.empty(2))
    timm = types.SimpleNamespace(is_model=lambda name: name == "resnet18", create_model=lambda name, pretrained, num_classes=0, width=1: Net(num_classes=num_classes, width=width))
    monkeypatch.setitem(sys.modules, "timm", timm)
    load(config(architecture="resnet18", num_classes=7, model_args={"width": 2})); load(config(architecture="resnet18", model_args=[1]))
    assert made == [{"num_classes": 7, "width": 2}, {"num_classes": 0, "width": 1}]
    for bad in ({"architecture": "hf-hub:org/other"}, {"architecture": 5}, {"architecture": "resnet18", "model_args": {"checkpoint_path": "x.bin"}}, {"architecture": "resnet18", "model_args": {"pretrained": True}}):
        with pytest.raises(BadInput, match="load something by itself"): load(config(**bad))
    with pytest.raises(BadInput, match="timm cannot build a model.*unexpected"): load(config(architecture="resnet18", model_args={"depth": 3}))
