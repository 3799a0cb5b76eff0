"""`hub bom`: documents that CycloneDX's own library accepts and reads back, and a licence chain that invents nothing."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import DIGITS
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import ComponentType
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from fsdl_devinfra.core.errors import BadInput
from fsdl_devinfra.hub import LoopbackHub, bom, lock
from fsdl_devinfra.hub.materials import card_lists


def is_valid(document: str) -> bool:
    return JsonStrictValidator(SchemaVersion.V1_6).validate_str(document) is None


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on which adapters, bases and data sets name each other."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN"): monkeypatch.delenv(name, raising=False)
    cards = {
        "org/tuned": "license: apache-2.0\nbase_model: org/base\ndatasets:\n- org/words\n- 'org/gone'",
        "org/base": "license: other\nlicense_name: my-own-license\nbase_model:\n  - org/oldest\ndatasets: [org/words]",
        "org/oldest": "tags:\n- text",
        "org/round": "license: mit\nbase_model: org/circle",
        "org/circle": "license: mit\nbase_model: org/round",
        "datasets/org/words": "license: cc-by-sa-4.0",
    }
    for repo, card in cards.items():
        folder = tmp_path / "shelf" / repo
        folder.mkdir(parents=True)
        (folder / "README.md").write_text(f"---\n{card}\n---\n# A card\n")
        (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    with LoopbackHub(tmp_path / "shelf") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def test_the_embedded_model(tmp_path, cli):
    ran = cli("hub", "bom", DIGITS, "-o", tmp_path / "m.cdx.json", "--json")
    assert ran.status == 0 and is_valid((tmp_path / "m.cdx.json").read_text()) and ran.json["bom"] == json.loads((tmp_path / "m.cdx.json").read_text())
    files = {c["name"]: c["hashes"][0]["content"] for c in ran.json["bom"]["components"]}
    assert files == {f.path: f.sha256 for f in lock(DIGITS).files}


def test_it_can_go_beside_the_lock(hub, tmp_path, cli):
    env = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    for model in ("org/tuned", str(DIGITS)):
        ran = cli("hub", "lock", model, "-o", tmp_path / "l.json", "--bom", tmp_path / "b.json", env=env)
        assert ran.status == 0 and is_valid((tmp_path / "b.json").read_text()), ran.err
        again = cli("hub", "bom", tmp_path / "l.json", "-o", tmp_path / "c.json", env=env)
        assert again.status == 0 and (tmp_path / "c.json").read_bytes() == (tmp_path / "b.json").read_bytes()  # the same lock, the same bill


def test_their_library_reads_it_back(hub):
    made = bom("org/tuned").bom
    read = Bom.from_json(made)
    assert read.metadata.component.type == ComponentType.MACHINE_LEARNING_MODEL and read.metadata.component.name == "org/tuned"
    assert str(read.metadata.component.purl) == f"pkg:huggingface/org/tuned@{lock('org/tuned').commit}"
    kinds = {c.name: c.type for c in read.components}
    assert kinds["org/base"] == ComponentType.MACHINE_LEARNING_MODEL and kinds["org/words"] == ComponentType.DATA
    refs = {d.ref.value: {x.ref.value for x in d.dependencies} for d in read.dependencies}
    assert {"model:org/base", "data:org/words", "file:config.json"} <= refs["model"] and refs["model:org/base"] == {"model:org/oldest", "data:org/words"} and is_valid(json.dumps(made))


def test_the_chain_says_what_is_known_and_what_is_not(hub):
    chain = bom("org/tuned").licenses
    assert {k.name: (k.license, k.known) for k in chain.links} == {
        "org/tuned": ("apache-2.0", "stated"), "org/base": ("my-own-license", "stated"), "org/oldest": (None, "not stated"),
        "org/words": ("cc-by-sa-4.0", "stated"), "org/gone": (None, "not reachable")}
    said = " ".join(chain.remarks)
    assert "org/tuned says apache-2.0, and org/base, which it was made from, says my-own-license" in said
    assert "org/oldest: states no license" in said and "org/gone: could not be asked" in said


def test_a_chain_with_one_licence_has_no_remark(hub):
    chain = bom("org/round").licenses  # and a circle ends
    assert [(k.name, k.license) for k in chain.links] == [("org/round", "mit"), ("org/circle", "mit")] and chain.remarks == []


def test_an_adapter_whose_base_nobody_can_be_asked_about(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base", "peft_type": "LORA"}')
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    made = bom(tmp_path / "adapter")
    assert [(k.relation, k.known) for k in made.licenses.links] == [("itself", "not stated"), ("adapter of", "not reachable")]
    assert is_valid(json.dumps(made.bom)) and "licenses" not in made.bom["metadata"]["component"]


@pytest.mark.parametrize("card", ["license: [mit, apache-2.0]", "license: llama3.1", "license: \"Ünïcode; weird\"", "license: other", "base_model: ./local/path\nlicense: mit",
                                  "datasets:\n- not an id at all!\n- a/b/c", "license:\n", "language:\n- en\n- de"])
def test_odd_cards_make_valid_documents(card, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = Path(tmp_path / "m")
    folder.mkdir()
    (folder / "README.md").write_text(f"---\n{card}\n---\n", encoding="utf-8")
    (folder / "config.json").write_text("{}")
    assert is_valid(json.dumps(bom(folder).bom)), bom(folder).bom


def test_front_matter():
    text = "---\nlicense: mit # free\nbase_model:\n- a/b\n-   'c/d'\ndatasets: [x/y, \"z/w\"]\nempty:\nmodel-index:\n- name: n\n  results: []\n---\n# T\n- not/this\n"
    assert card_lists(text) == {"license": ["mit"], "base_model": ["a/b", "c/d"], "datasets": ["x/y", "z/w"]}


def test_mistakes_are_sentences(tmp_path, cli):
    for argv in (["nowhere/at/all"], [tmp_path / "absent.json"], [DIGITS, "-o", tmp_path / "no" / "where.json"]):
        ran = cli("hub", "bom", *argv)
        assert ran.status == 2 and ran.sentence()


def test_the_lock_is_not_written_over_by_its_own_document(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    file = lock(tmp_path / "model").save(tmp_path / "model.lock.json")
    before = file.read_bytes()
    with pytest.raises(BadInput, match="written over"): bom(file, file)
    assert file.read_bytes() == before
    assert bom(file, tmp_path / "model.cdx.json")


def test_a_lock_is_not_written_over_the_weights(tmp_path, capsys):
    from fsdl_devinfra.cli import main
    weights = tmp_path / "model" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"\2\0\0\0\0\0\0\0{}")
    for options in (["-o", weights], ["-o", tmp_path / "l.json", "--bom", weights]):
        assert main(["hub", "lock", str(weights.parent), *map(str, options)]) == 2
        assert "written over" in capsys.readouterr().err and weights.read_bytes() == b"\2\0\0\0\0\0\0\0{}"
    assert main(["hub", "lock", str(weights.parent), "-o", str(tmp_path / "l.json")]) == 0
