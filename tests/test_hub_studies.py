"""Fixed samples of the studies: faults in combination, and a zoo of architectures. Each study has a control that must fail."""
from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest


def study(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "studies" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("seed", [*range(11), 100_119])  # the last one counted a part of a model in the cache as the whole
def test_faults_in_combination(seed):
    trial, found, _ = study("hub_faults").run(seed)
    assert found is None, (trial, found)


def test_the_study_of_faults_sees_wrong_bytes(tmp_path):
    """The judges themselves: a wrong file that became visible, a success without a file, a traceback."""
    faults = study("hub_faults")
    trial = faults.Trial(0, "pull", ["org/m"])
    (tmp_path / "a").write_bytes(b"wrong")
    assert faults.wrong_files(tmp_path, {"a": b"right"}, {}) == ["a"] and faults.wrong_files(tmp_path, {"a": b"wrong"}, {}) == []
    assert faults.wrong_success(trial, "", tmp_path, {"a": b"right"}, tmp_path) and not faults.wrong_success(trial, "", tmp_path, {"a": b"wrong"}, tmp_path)
    assert faults.complaint(2, "", "Traceback (most recent call last)", False) and faults.complaint(3, "", "x", False) and faults.complaint(2, "{}{}", "", True)
    assert faults.complaint(2, json.dumps({"error": "one sentence", "hint": "do this"}), "", True) is None


ZOO = ["llama", "gptj", "bert", "t5", "whisper", "clip", "mamba", "videoprism", "qwen3_moe", "deberta-v2", "wav2vec2", "gemma3_text", "granite_speech5_ctc"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_a_zoo_of_architectures(name):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    zoo = study("hub_zoo")
    # a random configuration may be one that the library refuses to build: the first that it builds is judged
    seed = next(seed for seed in range(3, 40) if not zoo.judged(name, seed, "float32", None).startswith("not built"))
    said = {(dtype, asked): zoo.judged(name, seed, dtype, asked) for dtype, asked in (("float32", None), ("bfloat16", None), ("float16", None), ("float32", "bfloat16"))}
    assert set(said.values()) == {"equal"}, said


def test_the_study_of_the_zoo_sees_one_bit(tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    zoo = study("hub_zoo")
    def module(value: float = 1.0, table: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        made = torch.nn.Linear(1, 1, bias=False)
        made.weight = torch.nn.Parameter(torch.tensor([[value]], dtype=dtype))
        made.register_buffer("table", torch.tensor([table]), persistent=False)
        return made
    assert zoo.differences(module(), module()) == []
    for other in module(1 + 2**-23), module(table=1 + 2**-23), module(dtype=torch.bfloat16): assert zoo.differences(module(), other)
