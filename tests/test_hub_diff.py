"""`hub diff` against models that were changed on purpose, each beside the unchanged one."""
from __future__ import annotations

import json
import random
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from hub_files import write as write_files
from jsonschema import Draft202012Validator
from safetensors.numpy import save_file

from fsdl_devinfra.hub import comparison, diff, lock
from fsdl_devinfra.hub.comparison import changed_modules
from fsdl_devinfra.hub.server import LoopbackHub

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_theta": 1e4}
TOKENIZER = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}, "added_tokens": []}
TEMPLATE = "{% for m in messages %}\n{{ m.content }}\n{% endfor %}"


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    names = ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"]
    names += [f"model.layers.{i}.{p}.weight" for i in range(3) for p in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm")]
    return {n: np.ones(8, "f4") if "norm" in n else rng.normal(size=(8, 8)).astype("f4") for n in names}


def write(folder: Path, state: dict[str, np.ndarray], shards: int = 1, **documents: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    names = list(state)
    parts = [names[i::shards] for i in range(shards)]
    for i, part in enumerate(parts):
        file = "model.safetensors" if shards == 1 else f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({n: state[n] for n in part}, folder / file, {"format": "pt"})
    if shards > 1:
        where = {n: f"model-{i + 1:05}-of-{shards:05}.safetensors" for i, part in enumerate(parts) for n in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps(documents.get("config", CONFIG)))
    (folder / "tokenizer.json").write_text(json.dumps(documents.get("tokenizer", TOKENIZER)))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": documents.get("template", TEMPLATE)}))
    return folder


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN", "HF_ENDPOINT"): monkeypatch.delenv(name, raising=False)


@pytest.fixture
def base(tmp_path) -> Path:
    return write(tmp_path / "base", tensors())


def test_the_same_model_is_the_same(base, tmp_path, cli):
    other = shutil.copytree(base, tmp_path / "copy")
    assert diff(base, other).verdict == "same"
    ran = cli("hub", "diff", base, other)
    assert ran.status == 0 and "every byte is the same" in ran.out


@pytest.mark.parametrize("full", [False, True])
def test_one_tensor_is_found(base, tmp_path, full):
    state = tensors()
    state["lm_head.weight"][3, 3] += 0.5
    found = diff(base, write(tmp_path / "new", state), full=full)
    assert (found.verdict, found.summary) == ("differs", "only lm_head changed.")
    assert [t.name for t in found.tensors] == ["lm_head.weight"] and found.counts["same"] == 11
    assert (found.tensors[0].statistics is not None) == full
    if full:
        said = found.tensors[0].statistics
        assert said.changed_share == 1 / 64 and said.max_abs_difference == pytest.approx(0.5)


def test_random_changes_are_found_whatever_the_shards(tmp_path):
    rng = random.Random(11)
    for case in range(12):
        state = tensors(case)
        changed = set(rng.sample(sorted(state), rng.randint(0, 4)))
        left = write(tmp_path / f"l{case}", state, shards=rng.randint(1, 4))
        new = {n: t + 1 if n in changed else t for n, t in state.items()}
        right = write(tmp_path / f"r{case}", dict(rng.sample(sorted(new.items()), len(new))), shards=rng.randint(1, 4))
        found = diff(left, right)
        assert {t.name for t in found.tensors} == changed, (case, changed)
        assert found.verdict == ("differs" if changed else "same")


def test_shards_and_one_file_hold_the_same_tensors(base, tmp_path, cli):
    ran = cli("hub", "diff", base, write(tmp_path / "sharded", tensors(), shards=3), "--json")
    assert ran.status == 0 and ran.json["verdict"] == "same" and "same tensors, other files" in ran.json["summary"]
    assert ran.json["tensors"] == [] and {f["path"] for f in ran.json["files"]} >= {"model.safetensors", "model-00001-of-00003.safetensors"}


def test_renamed_cast_reshaped_added_and_removed(base, tmp_path):
    state = tensors()
    kinds = {
        "renamed": {n.replace("model.", "transformer."): t for n, t in state.items()},
        "dtype": {n: t.astype("f2") for n, t in state.items()},
        "shape": state | {"lm_head.weight": np.zeros((9, 8), "f4")},
        "added": state | {"extra.bias": np.zeros(3, "f4")},
        "removed": {n: t for n, t in state.items() if n != "lm_head.weight"},
    }
    for kind, new in kinds.items():
        found = diff(base, write(tmp_path / kind, new), full=True)
        assert {t.change for t in found.tensors} == {kind}, (kind, found)
        assert found.verdict == "differs"
    cast = diff(base, tmp_path / "dtype", full=True)
    assert all(t.statistics.is_cast for t in cast.tensors) and "a cast and nothing else" in cast.summary
    names = {t.name: t.right_name for t in diff(base, tmp_path / "renamed").tensors}
    assert names == {n: n.replace("model.", "transformer.") for n in state if n.startswith("model.")}  # also the norms, which are all ones


def test_a_head_that_is_tied_is_no_difference(tmp_path):
    state = tensors()
    state["lm_head.weight"] = state["model.embed_tokens.weight"].copy()
    config = CONFIG | {"tie_word_embeddings": True}
    stored = write(tmp_path / "stored", state, config=config)
    tied = write(tmp_path / "tied", {n: t for n, t in state.items() if n != "lm_head.weight"}, config=config)
    assert diff(stored, tied).verdict == "same" and diff(tied, stored).verdict == "same"
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    assert [t.change for t in diff(write(tmp_path / "other", state, config=config), tied).tensors] == ["removed"]


DOCUMENTS = [
    ({"config": CONFIG | {"rope_theta": 5e5}}, "configuration", "base of the rotary position embedding"),
    ({"tokenizer": TOKENIZER | {"added_tokens": [{"content": "<|tool|>", "id": 2}]}}, "tokenizer", "1 token added ('<|tool|>')"),
    ({"template": TEMPLATE.replace("m.content", "m.content | trim")}, "template", "1 line added, 1 line removed"),
]


@pytest.mark.parametrize("changed,kind,words", DOCUMENTS, ids=[d[1] for d in DOCUMENTS])
def test_documents_in_words(base, tmp_path, changed, kind, words):
    found = diff(base, write(tmp_path / "new", tensors(), **changed))
    assert found.verdict == "differs" and not found.tensors
    assert [(r.kind, r.effect) for r in found.documents] == [(kind, "model")] and words in found.documents[0].what


def test_a_card_and_white_space_are_for_the_record(base, tmp_path):
    other = Path(shutil.copytree(base, tmp_path / "other"))
    (other / "README.md").write_text("# A card\n")
    (other / "config.json").write_text(json.dumps(CONFIG, indent=4))
    found = diff(base, other)
    assert found.verdict == "same" and {r.effect for r in found.documents} == {"record"}


@pytest.fixture
def revisions(tmp_path, monkeypatch):
    """A Hub with two revisions that differ in the second of two shards."""
    root = tmp_path / "shelf" / "models--org--tiny"
    (root / "refs").mkdir(parents=True)
    state = tensors()
    name = list(state)[1]
    for commit, ref, new in (("a" * 40, "v1", state), ("b" * 40, "v2", state | {name: state[name] * 2})):
        write(root / "snapshots" / commit, new, shards=2)
        (root / "refs" / ref).write_text(commit)
    with LoopbackHub(tmp_path / "shelf", redirect=True) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.changed = name
        yield hub


def test_weights_with_the_same_hash_are_not_downloaded(revisions):
    for full in (False, True):
        found = diff("org/tiny@v1", "org/tiny@v2", full=full)
        assert [t.name for t in found.tensors] == [revisions.changed]
        sent = revisions.sent("*model-00001-of-00002.safetensors")
        size = next(f.size_bytes for f in lock("org/tiny@v1").files if "00001" in f.path)
        assert sent <= 4 * size - 4 * 4 * 64, sent  # headers, of both revisions, twice; the data of none


def test_what_is_too_large_stays_undecided_until_asked(revisions, monkeypatch):
    monkeypatch.setattr(comparison, "SMALL", 10)
    found = diff("org/tiny@v1", "org/tiny@v2")
    assert {t.change for t in found.tensors} == {"undecided"} and found.bytes_downloaded == 0 and found.verdict == "differs"
    assert "--full" in " ".join(found.notes)
    found = diff("org/tiny@v1", "org/tiny@v2", full=True)
    assert [t.change for t in found.tensors] == ["changed"] and found.tensors[0].statistics.relative_norm == pytest.approx(1)


def test_locks_hubs_and_folders_in_any_pair(revisions, tmp_path, base, cli):
    file = lock("org/tiny@v1").save(tmp_path / "v1.lock.json")
    env = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": revisions.url, "HF_HOME": str(tmp_path / "home")}
    assert cli("hub", "diff", file, "org/tiny@v1", env=env).status == 0
    assert cli("hub", "diff", file, base, env=env).status == 0  # the same tensors in one file
    ran = cli("hub", "diff", file, "org/tiny@v2", "--json", env=env)
    assert ran.status == 1 and [t["name"] for t in ran.json["tensors"]] == [revisions.changed]
    Draft202012Validator(json.loads((ROOT / "fsdl_devinfra/schemas/model-diff.1.json").read_text())).validate(ran.json)


def test_two_locks_are_compared_by_hash_without_a_network(revisions, tmp_path, cli):
    for tag in ("v1", "v2"): lock(f"org/tiny@{tag}").save(tmp_path / f"{tag}.json")
    same, other = cli("hub", "diff", tmp_path / "v1.json", tmp_path / "v1.json"), cli("hub", "diff", tmp_path / "v1.json", tmp_path / "v2.json")
    assert same.status == 0 and other.status == 1 and "only hashes were compared" in other.out


def test_a_folder_that_changed_since_its_lock_is_not_taken_for_it(base, tmp_path):
    file = lock(base).save(base / "model.lock.json")
    assert diff(file, base).verdict == "same"
    state = tensors()
    state["lm_head.weight"] += 1
    write(base, state)
    found = diff(file, base)
    assert found.verdict == "differs" and {t.change for t in found.tensors} <= {"undecided", "changed"}
    assert not any(t.sha256 for t in found.tensors if t.change == "undecided")


def test_pickles_are_compared_by_hash_alone(tmp_path):
    for name, data in (("a", b"K\x01."), ("b", b"K\x02.")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pytorch_model.bin").write_bytes(data)
        (tmp_path / name / "config.json").write_text("{}")
    found = diff(tmp_path / "a", tmp_path / "b")
    assert found.verdict == "differs" and "not read" in found.summary and not found.tensors
    assert diff(tmp_path / "a", tmp_path / "a").verdict == "same"


@pytest.mark.parametrize("argv", [["nonsense folder/x", "{base}"], ["{base}", "{tmp}/missing.json"], ["{base}"], ["{base}", "org/none"]])
def test_mistakes_are_sentences(argv, base, tmp_path, cli):
    ran = cli("hub", "diff", *(a.format(base=base, tmp=tmp_path) for a in argv))
    assert ran.status == 2 and ran.sentence()
    said = cli("hub", "diff", *(a.format(base=base, tmp=tmp_path) for a in argv), "--json")
    assert said.status == 2 and set(said.json) == {"error", "hint"}


def test_modules_are_never_too_large():
    """Whatever changed: the named modules cover it and nothing else."""
    rng = random.Random(3)
    names = list(tensors())
    for _ in range(200):
        changed = set(rng.sample(names, rng.randint(1, len(names))))
        covered = {n for n in names for m in changed_modules(changed, names) if _is_in(n, m)}
        assert covered == changed


def _is_in(name: str, module: str) -> bool:
    if not module: return True
    parts, wanted = name.split("."), module.split(".")
    if len(parts) < len(wanted): return False
    def holds(part: str, want: str) -> bool:
        if not want.replace("-", "").replace(",", "").isdigit(): return part == want
        return part.isdigit() and any(int(r.split("-")[0]) <= int(part) <= int(r.split("-")[-1]) for r in want.split(","))
    return all(holds(p, w) for p, w in zip(parts, wanted))


def gguf(settings: dict[str, str | float], data: bytes = bytes(range(128))) -> bytes:
    """A GGUF file with one tensor of 32 floats."""
    def text(value: str) -> bytes: return struct.pack("<Q", len(value.encode())) + value.encode()
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, len(settings))
    for key, value in settings.items():
        head += text(key) + (struct.pack("<I", 8) + text(value) if isinstance(value, str) else struct.pack("<If", 6, value))
    head += text("w") + struct.pack("<IQIQ", 1, 32, 0, 0)
    return head + bytes(-len(head) % 32) + data


GGUF = {"general.architecture": "llama", "general.name": "one", "llama.rope.freq_base": 1e4, "tokenizer.chat_template": "{{ a }}"}


@pytest.mark.parametrize("changed, same", [({}, True), ({"general.name": "two"}, True), ({"llama.rope.freq_base": 1e6}, False),
                                           ({"tokenizer.chat_template": "{{ b }}"}, False), ({"general.architecture": "qwen2"}, False)])
def test_settings_in_a_gguf_file_are_compared(tmp_path, changed, same):
    write_files(tmp_path / "a", {"m.gguf": gguf(GGUF)})
    write_files(tmp_path / "b", {"other-name.gguf": gguf(GGUF | changed)})
    found = diff(tmp_path / "a", tmp_path / "b")
    assert found.verdict == ("same" if same else "differs")
    assert [r.what.split()[0] for r in found.documents if r.kind != "other" or changed] == list(changed)
    assert not found.tensors
