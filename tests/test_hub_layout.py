"""One model, never two: every layout in which a repository holds copies, and beside it the same repository without them."""
from __future__ import annotations

import json
from pathlib import Path

import pytest

from fsdl_devinfra.core.errors import BadInput
from fsdl_devinfra.hub.checkpoint import inspect
from fsdl_devinfra.hub.layout import Wish
from fsdl_devinfra.hub.locks import ModelLock, lock
from fsdl_devinfra.hub.pulling import pulled
from fsdl_devinfra.hub.server import LoopbackHub
from hub_files import gguf, safetensors
from fsdl_devinfra.hub.verification import verify

W = {"w": ("F16", [8, 8])}  # one small matrix: 64 parameters
HALF = {"v": ("F16", [8, 8])}
LLAMA = '{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}'


def index(**shards: str) -> str:
    return json.dumps({"metadata": {}, "weight_map": shards})


def write(folder: Path, files: dict[str, str | bytes | dict]) -> Path:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        data = safetensors(content) if isinstance(content, dict) else content.encode() if isinstance(content, str) else content
        (folder / path).write_bytes(data)
    return folder


SINGLE = {"config.json": LLAMA, "model.safetensors": W}
SHARDED = {"config.json": LLAMA, "model-00001-of-00002.safetensors": W, "model-00002-of-00002.safetensors": HALF,
           "model.safetensors.index.json": index(w="model-00001-of-00002.safetensors", v="model-00002-of-00002.safetensors")}
PIPELINE = {"model_index.json": '{"_class_name": "P", "unet": ["diffusers", "U"], "vae": ["diffusers", "A"], "image_encoder": [null, null]}',
            "unet/config.json": '{"_class_name": "U"}', "unet/diffusion_pytorch_model.safetensors": W, "vae/config.json": '{"_class_name": "A"}',
            "vae/diffusion_pytorch_model.safetensors": HALF}
B = b"\x80\x02N" + b"0N" * 98 + b"."  # a pickle of 200 bytes
CASES = {
    "gpt-oss original/ and metal/": (SINGLE, {"original/model.safetensors": {"block.0.w": ("F16", [8, 8])}, "original/config.json": "{}",
                                              "metal/model.bin": B}),
    "llama original/*.pth": (SHARDED, {"original/consolidated.00.pth": B, "original/params.json": "{}"}),
    "mistral consolidated": (SHARDED, {"consolidated.safetensors": {"layers.0.w": ("F16", [16, 8])}}),
    "mistral consolidated in shards": (SHARDED, {"consolidated-00001-of-00002.safetensors": W, "consolidated-00002-of-00002.safetensors": HALF,
                                                 "consolidated.safetensors.index.json": index(w="consolidated-00001-of-00002.safetensors")}),
    "trainer checkpoints": (SINGLE, {f"checkpoint-{n}/{p}": c for n in (500, 1000) for p, c in SINGLE.items()}),
    "a checkpoint in a folder of any name": (SINGLE, {f"step_final/{p}": c for p, c in SINGLE.items()}),
    "stale shards": (SHARDED, {"model-00001-of-00003.safetensors": W, "model-00002-of-00003.safetensors": HALF}),
    "shards beside the single file": (SINGLE, {p: c for p, c in SHARDED.items() if p != "config.json"}),
    "fp16 variant": (SINGLE, {"model.fp16.safetensors": W}),
    "ema variants in a pipeline": (PIPELINE, {"unet/diffusion_pytorch_model.non_ema.safetensors": W, "unet/diffusion_pytorch_model.fp16.safetensors": W}),
    "sharded variant": (SHARDED, {"model.fp16-00001-of-00002.safetensors": W, "model.fp16-00002-of-00002.safetensors": HALF,
                                  "model.safetensors.index.fp16.json": index(w="model.fp16-00001-of-00002.safetensors")}),
    "bin beside safetensors": (SINGLE, {"pytorch_model.bin": B}),
    "bin shards beside safetensors": (SHARDED, {"pytorch_model-00001-of-00001.bin": B, "pytorch_model.bin.index.json": index(w="pytorch_model-00001-of-00001.bin")}),
    "tensorflow, flax and rust": (SINGLE, {"tf_model.h5": B, "flax_model.msgpack": B, "rust_model.ot": B}),
    "onnx and openvino exports": (SINGLE, {"onnx/model.onnx": B, "onnx/model_q4.onnx": B, "onnx/model.onnx_data": B, "openvino/openvino_model.bin": B}),
    "openvino in the root": (SINGLE, {"openvino_model.bin": B}),
    "gguf beside": (SINGLE, {"x-Q4_K_M.gguf": B, "x-Q8_0.gguf": B}),
    "FLUX root files": (PIPELINE, {"flux1-dev.safetensors": {"a.w": ("F16", [16, 8])}, "ae.safetensors": W}),
    "SDXL root files and other folders": (PIPELINE, {"sd_xl_base_1.0.safetensors": W, "sd_xl_base_1.0_0.9vae.safetensors": W, "vae_1_0/config.json": '{"_class_name": "A"}',
                                                     "vae_1_0/diffusion_pytorch_model.safetensors": HALF, "unet/openvino_model.bin": B, "vae_decoder/model.onnx": B}),
    "a copy under a name of its own": (SINGLE, {"llama-merged-final.safetensors": W}),
}


@pytest.mark.parametrize("name", CASES)
def test_copies_are_neither_counted_nor_locked(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    plain, copies = CASES[name]
    alone, both = inspect(write(tmp_path / "alone", plain)), inspect(write(tmp_path / "both", plain | copies))
    assert alone.skipped == [] and alone.tensors.parameters in (64, 128)
    assert (both.tensors, both.weight_bytes, both.weight_format) == (alone.tensors, alone.weight_bytes, alone.weight_format)
    weights = {p for p in copies if p.rpartition(".")[2] in ("safetensors", "bin", "pth", "h5", "msgpack", "ot", "onnx", "onnx_data", "gguf")}
    assert weights <= {s.path for s in both.skipped} and all(s.why and s.size_bytes for s in both.skipped)
    locked = lock(tmp_path / "both")
    assert [f.path for f in locked.files if f.path not in copies] == sorted(plain) and not weights & {f.path for f in locked.files}
    assert {s.path for s in locked.skipped} == {s.path for s in both.skipped} and verify(locked, tmp_path / "both").ok
    assert ModelLock.from_dict(json.loads(locked.to_json())) == locked


PARTS = {
    "a small projector": SHARDED | {"mm_projector.safetensors": {"p": ("U8", [4])}},
    "a part that is there as .bin only": PIPELINE | {"vae/diffusion_pytorch_model.safetensors": "", "vae/diffusion_pytorch_model.bin": B},
    "a folder of another class": SINGLE | {"talker/config.json": '{"architectures": ["T"]}', "talker/model.safetensors": HALF},
    "sentence-transformers": SINGLE | {"modules.json": '[{"path": ""}, {"path": "2_Dense"}]', "2_Dense/config.json": "{}", "2_Dense/model.safetensors": HALF},
    "only original/": {"original/model.safetensors": W},
    "only consolidated": {"consolidated.safetensors": W, "params.json": "{}"},
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_a_model_are_no_copies(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    files = {p: c for p, c in PARTS[name].items() if c}
    assert [f.path for f in lock(write(tmp_path / "m", files)).files] == sorted(files)
    assert inspect(tmp_path / "m").skipped == []


def test_the_last_checkpoint_of_a_run_without_a_final_model(tmp_path):
    found = inspect(write(tmp_path, {f"checkpoint-{n}/{p}": c for n in (500, 1000, 90) for p, c in SINGLE.items()}))
    assert found.tensors.parameters == 64 and {s.path.split("/")[0] for s in found.skipped} == {"checkpoint-500", "checkpoint-90"}


QUANTS = {"m-Q4_K_M.gguf": gguf(200), "m-Q8_0.gguf": gguf(400), "BF16/m-BF16-00001-of-00002.gguf": gguf(400), "BF16/m-BF16-00002-of-00002.gguf": gguf(200),
          "m-UD-IQ2_M.gguf": gguf(50), "mmproj-F16.gguf": gguf(24), "mmproj-F32.gguf": gguf(48), "README.md": "x"}


@pytest.mark.parametrize("quant,paths", [(None, ["BF16/m-BF16-00001-of-00002.gguf", "BF16/m-BF16-00002-of-00002.gguf"]), ("Q4_K_M", ["m-Q4_K_M.gguf"]),
                                         ("q8_0", ["m-Q8_0.gguf"]), ("IQ2_M", ["m-UD-IQ2_M.gguf"])])
def test_one_quantisation_with_its_projector(tmp_path, quant, paths):
    wish = Wish(quant=quant) if quant else None
    assert [f.path for f in lock(write(tmp_path, QUANTS), wish=wish).files] == sorted([*paths, "README.md", "mmproj-F16.gguf"])


def test_a_quantisation_that_is_not_there(tmp_path):
    with pytest.raises(BadInput, match="no weights in Q3_K_S") as said: lock(write(tmp_path, QUANTS), wish=Wish(quant="Q3_K_S"))
    assert "Q4_K_M" in said.value.hint and "Q8_0" in said.value.hint


def test_a_variant_by_name(tmp_path):
    files = PIPELINE | {"unet/diffusion_pytorch_model.fp16.safetensors": W}
    found = [f.path for f in lock(write(tmp_path, files), wish=Wish(quant="fp16")).files]
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in found and "unet/diffusion_pytorch_model.safetensors" not in found
    assert "vae/diffusion_pytorch_model.safetensors" in found  # a part without that variant keeps what it has


def test_globs_choose_files_and_copies(tmp_path):
    write(tmp_path, SINGLE | {"original/model.safetensors": HALF, "tokenizer.json": "{}"})
    def paths(**wish): return [f.path for f in lock(tmp_path, wish=Wish(**wish)).files]
    assert paths(include=("*.json",)) == ["config.json", "tokenizer.json"]
    assert paths(exclude=("tok*", "*.safetensors")) == ["config.json"]
    assert paths(include=("original/",)) == ["original/model.safetensors"]
    with pytest.raises(BadInput): paths(include=("nothing",))


def test_on_a_hub_and_from_the_command_line(tmp_path, monkeypatch, cli):
    write(tmp_path / "shelf" / "org" / "m", SINGLE | {"original/model.safetensors": HALF, "pytorch_model.bin": B})
    write(tmp_path / "shelf" / "org" / "q", QUANTS)
    with LoopbackHub(tmp_path / "shelf") as hub:
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        online = {"HF_HUB_OFFLINE": "0"}
        said = cli("hub", "inspect", "org/m", "--json", env=online).json
        assert said["tensors"]["parameters"] == 64
        assert {s["path"]: s["size_bytes"] for s in said["skipped"]}.keys() == {"original/model.safetensors", "pytorch_model.bin"}
        assert "Skipped" in cli("hub", "inspect", "org/m", env=online).out
        lock_file = tmp_path / "m.lock.json"
        assert cli("hub", "lock", "org/m", "-o", lock_file, env=online).status == 0
        assert cli("hub", "pull", lock_file, env=online).status == 0 and cli("hub", "verify", lock_file).status == 0
        one = pulled("org/q", tmp_path / "one", wish=Wish(quant="Q4_K_M"))
        assert sorted(p.name for p in Path(one.path).iterdir() if p.is_file()) == ["README.md", "m-Q4_K_M.gguf", "mmproj-F16.gguf"]
        assert cli("hub", "pull", "org/q", "--quant", "Q9", env=online).status == 2


def test_lock_then_verify_as_the_help_shows_them(tmp_path, monkeypatch, cli):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = write(tmp_path / "my-model", SINGLE)
    assert cli("hub", "lock", "./my-model", cwd=tmp_path).status == 0
    assert cli("hub", "verify", "model.lock.json", cwd=tmp_path).status == 0
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert cli("hub", "verify", "model.lock.json", cwd=tmp_path).status == 1
    folder.rename(tmp_path / "moved")
    gone = cli("hub", "verify", "model.lock.json", cwd=tmp_path)
    assert gone.status == 2 and "Which folder" in gone.sentence() + gone.err
    assert cli("hub", "verify", "model.lock.json", "moved", cwd=tmp_path).status == 1


# ---- logical parameters: a layer of 64 × 128 in each library's layout, with a norm of 64 beside it
NORM = {"n.weight": ("F16", [64])}
STORED = {
    "plain": ({"l.weight": ("F16", [128, 64])}, {}),
    "a parameter called scales": ({"l.weight": ("F16", [127, 64]), "l.scales": ("F16", [64])}, {}),
    "gptq": ({"l.qweight": ("I32", [8, 128]), "l.qzeros": ("I32", [2, 16]), "l.scales": ("F16", [2, 128]), "l.g_idx": ("I32", [64])}, {"bits": 4}),
    "gptq, 3 bits": ({"l.qweight": ("I32", [6, 128]), "l.qzeros": ("I32", [2, 12]), "l.scales": ("F16", [2, 128])}, {"bits": 3}),
    "awq": ({"l.qweight": ("I32", [64, 16]), "l.qzeros": ("I32", [2, 16]), "l.scales": ("F16", [2, 128])}, {"bits": 4}),
    "nf4": ({"l.weight": ("U8", [4096, 1]), "l.weight.absmax": ("U8", [128]), "l.weight.nested_absmax": ("F32", [1]),
             "l.weight.quant_state.bitsandbytes__nf4": ("U8", [90])}, {"load_in_4bit": True}),
    "mxfp4": ({"l_blocks": ("U8", [128, 2, 16]), "l_scales": ("U8", [128, 2])}, {"quant_method": "mxfp4"}),
    "nvfp4": ({"l.weight": ("U8", [128, 32]), "l.weight_scale": ("F8_E4M3", [128, 4]), "l.weight_scale_2": ("F32", [])}, {"quant_method": "modelopt"}),
    "fp8 with scales": ({"l.weight": ("F8_E4M3", [128, 64]), "l.weight_scale_inv": ("F32", [1, 1])}, {"quant_method": "fp8"}),
}


@pytest.mark.parametrize("kind", STORED)
def test_parameters_are_logical_and_elements_are_stored(tmp_path, kind):
    tensors, quantised = STORED[kind]
    config = {"model_type": "llama"} | ({"quantization_config": quantised} if quantised else {})
    found = inspect(write(tmp_path, {"config.json": json.dumps(config), "model.safetensors": tensors | NORM})).tensors
    assert found.parameters == 128 * 64 + 64
    elements = 64
    for _, shape in tensors.values():
        size = 1
        for n in shape: size *= n
        elements += size
    assert found.elements == elements == sum(found.by_dtype.values())


@pytest.mark.parametrize("tied,parameters", [(True, 80), (False, 160), (None, 160)])
def test_tied_weights_count_once(tmp_path, tied, parameters):
    config = {"model_type": "llama"} | ({} if tied is None else {"tie_word_embeddings": tied})
    tensors = {"model.embed_tokens.weight": ("F16", [20, 4]), "lm_head.weight": ("F16", [20, 4])}
    found = inspect(write(tmp_path, {"config.json": json.dumps(config), "model.safetensors": tensors})).tensors
    assert (found.parameters, found.elements) == (parameters, 160)


# ---- what may stand for a model
def test_a_cache_folder_is_its_current_snapshot(tmp_path):
    cache = tmp_path / "models--org--m"
    for commit, files in ("a" * 40, SINGLE), ("b" * 40, SHARDED): write(cache / "snapshots" / commit, files)
    write(cache, {"refs/main": "a" * 40, "blobs/x": "x"})
    assert inspect(cache).tensors.parameters == 64 and len(lock(cache).files) == 2
    (cache / "refs" / "main").write_text("b" * 40)
    assert inspect(cache).tensors.parameters == 128
    (cache / "refs" / "main").unlink()
    assert inspect(cache).tensors.parameters in (64, 128)  # the newest, and never both


def test_addresses_and_old_names(tmp_path, monkeypatch):
    write(tmp_path / "shelf" / "org" / "m", SINGLE)
    with LoopbackHub(tmp_path / "shelf") as hub:
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        commit = inspect("org/m").commit
        for name in f"{hub.url}/org/m", "https://huggingface.co/org/m/", f"https://huggingface.co/org/m/tree/{commit}", "https://huggingface.co/org/m/tree/main/sub":
            found = inspect(name)
            assert (found.repo, found.commit, found.tensors.parameters) == ("org/m", commit, 64)
        with pytest.raises(BadInput, match="gpt2"): inspect("gpt2")
        assert hub.seen[-1].path.startswith("/api/models/gpt2/revision/main")
        with pytest.raises(BadInput): inspect("https://example.com/org/m")


# ---- offline first: what the cache can answer is answered
@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "no network"])
def test_offline_the_cache_answers(tmp_path, cli, how):
    write(tmp_path / "shelf" / "org" / "m", SHARDED)
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    with LoopbackHub(tmp_path / "shelf") as hub:
        online = home | {"HF_ENDPOINT": hub.url}
        assert cli("hub", "lock", "org/m", "-o", tmp_path / "online.json", env=online).status == 0
        path = cli("hub", "pull", "org/m", env=online).out.strip()
        commit = Path(path).name
        seen = cli("hub", "inspect", "org/m", "--json", env=online).json
    away = home | ({"HF_HUB_OFFLINE": "1"} if how == "HF_HUB_OFFLINE" else {"HF_ENDPOINT": "http://127.0.0.1:9"})
    for model in "org/m", f"org/m@{commit}":
        assert cli("hub", "pull", model, env=away).out.strip() == path
        found = cli("hub", "inspect", model, "--json", env=away).json
        assert (found["commit"], found["repo"], found["tensors"]) == (commit, "org/m", seen["tensors"])
        assert cli("hub", "lock", model, "-o", tmp_path / "away.json", env=away).status == 0
        assert (tmp_path / "away.json").read_bytes() == (tmp_path / "online.json").read_bytes()
    assert cli("hub", "inspect", "org/other", env=away).status == 2  # and what it cannot is one sentence
    for record in (tmp_path / "home" / "fsdl-devinfra" / "locks").iterdir(): record.unlink()
    assert cli("hub", "pull", "org/m", env=away).out.strip() == path  # as the official client left it: no record of ours
    (Path(path) / "model-00002-of-00002.safetensors").unlink()
    partial = cli("hub", "pull", "org/m", env=away)
    assert partial.status == 2 and "part of org/m" in partial.err


def test_an_index_and_its_shards_name_the_same_tensors(tmp_path):
    good = write(tmp_path / "good", SHARDED)
    assert inspect(good).risks == []
    text = {"w": "model-00001-of-00002.safetensors", "v": "model-00002-of-00002.safetensors"}
    (good / "model.safetensors.index.json").write_text(index(**text, ghost="model-00002-of-00002.safetensors"))
    assert "no shard holds" in inspect(good).risks[0].why
    (good / "model.safetensors.index.json").write_text(index(**text, lm_head="model-00002-of-00002.safetensors"))  # tied: listed and not stored
    assert inspect(good).risks == []
    write(good, {"model-00002-of-00002.safetensors": HALF | {"hidden": ("F16", [2])}})
    assert "does not name" in inspect(good).risks[0].why


def test_no_module_of_the_package_needs_itself():
    import ast
    folder = Path(__file__).resolve().parents[1] / "fsdl_devinfra" / "hub"
    imports: dict[str, set[str]] = {f.stem: set() for f in folder.glob("*.py") if f.stem != "__init__"}
    for name in imports:
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            if not isinstance(node, ast.ImportFrom) or not node.module: continue
            if node.level == 1 or node.module.startswith("fsdl_devinfra.hub."): imports[name].add(node.module.rpartition(".")[2])
    reached = {name: set(found) for name, found in imports.items()}
    for _ in imports:
        for name, found in reached.items(): found |= {deeper for other in found for deeper in imports.get(other, ())}
    assert [name for name, found in reached.items() if name in found] == []
