"""Every form of MODEL reaches a report; what cannot be checked of it is `not-run`, with the reason."""
from __future__ import annotations

import json
import shutil

import pytest

from fsdl_devinfra.core.errors import BadInput
from fsdl_devinfra.preflight import located, preflight

NET = """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.out = torch.nn.Embedding(11, 6), torch.nn.Linear(6, 3)
    def forward(self, tokens): return self.out(self.table(tokens).mean(1))
"""


def verdicts(report): return {s.name: s.verdict for s in report.steps}


def test_a_class_of_a_file_is_traced_exported_and_compared(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    report = preflight(f"{tmp_path}/net.py:Net", output=tmp_path / "out", quiet=True)
    assert report.status == 2 and [n for n, v in verdicts(report).items() if v != "pass"] == ["lock"]
    assert "no weight files to lock" in report.steps[1].summary
    assert "covered:" in report.steps[5].summary  # what parity tried is said


def test_a_configuration_alone_says_what_fits_and_that_there_is_nothing_to_load(tmp_path, digits):
    (digits / "model.safetensors").unlink()
    report = preflight(digits, output=tmp_path / "out", quiet=True)
    found = verdicts(report)
    assert found["memory"] == found["environment"] == "pass" and found["load"] == found["export"] == found["parity"] == "not-run"
    assert "only a configuration" in report.steps[2].summary


def test_a_folder_of_the_cache_is_its_current_snapshot(tmp_path, digits):
    cached = tmp_path / "models--org--digits"
    shutil.copytree(digits, cached / "snapshots" / "b")
    shutil.copytree(digits, cached / "snapshots" / "a")
    with pytest.raises(BadInput, match="2 current snapshots"): located(cached)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("b")
    assert located(cached) == str(cached / "snapshots" / "b")


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.1-8B", "https://huggingface.co/meta-llama/Llama-3.1-8B", "llama-3.1-8b"])
def test_without_a_network_a_popular_model_still_gets_memory_and_serving(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    report = preflight(name, gpu="h100", output=tmp_path / "out", quiet=True, serve="vllm")
    found = verdicts(report)
    assert (found["inspect"], found["memory"], found["serving"]) == ("not-run", "fail", "pass")
    assert [s.summary for s in report.steps if s.name in ("load", "export", "parity")] == ["inspect did not pass.", "load did not pass.", "load did not pass."]


def test_the_environment_step_tells_what_env_check_found(tmp_path, digits, monkeypatch):
    """A fault of the machine is told; it fails the step only where the machine has a GPU."""
    from fsdl_devinfra.core import device_table
    from fsdl_devinfra.env import node
    report = preflight(digits, output=tmp_path / "out", quiet=True)
    assert "env check passed" in report.steps[-1].summary and json.loads((tmp_path / "out/report.json").read_text())["node"]["verdict"] == "pass"
    monkeypatch.setattr(node, "check_disk", lambda folder=".": node.Finding("disk", "failed", "2 MiB free", "Free some space"))
    told = preflight(digits, output=tmp_path / "out", quiet=True).steps[-1]
    assert told.verdict == "pass" and "env check failed: disk: 2 MiB free" in told.summary
    monkeypatch.setattr(device_table, "local_devices", lambda: [("NVIDIA L4", 24 << 30)])
    assert preflight(digits, output=tmp_path / "out", quiet=True).steps[-1].verdict == "fail"


def test_an_unknown_engine_is_refused_before_any_work(tmp_path):
    with pytest.raises(BadInput, match="vlm"): preflight(serve="vlm", output=tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("gpu, gpus, verdict", [("h100", 8, "pass"), ("t4", 8, "fail"), ("b200", 8, "pass")])
def test_memory_of_a_preflight_leaves_checkpointing_open(gpu, gpus, verdict, tmp_path):
    """80 layers of 4,096 tokens want it on an H100; a T4 has too little even so, and a B200 enough without."""
    config = dict(model_type="llama", hidden_size=4096, num_hidden_layers=80, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336, vocab_size=32000, max_position_embeddings=4096)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    step = next(s for s in preflight(tmp_path / "model", gpu=gpu, gpus=gpus, output=tmp_path / "out", quiet=True).steps if s.name == "memory")
    assert step.verdict == verdict and ("which was not said" in step.summary) == (gpu == "h100"), step.summary


def test_a_gguf_model_is_sent_to_the_commands_that_read_it(tmp_path, digits):
    (tmp_path / "m").mkdir()
    (tmp_path / "m/model.gguf").write_bytes(b"GGUF")
    for name in (tmp_path / "m/model.gguf", tmp_path / "m"):
        with pytest.raises(BadInput) as caught: preflight(name, output=tmp_path / "out", quiet=True)
        assert f"hub lock {name}" in str(caught.value) and "--serve llama.cpp" in str(caught.value)
    (digits / "model.gguf").write_bytes(b"GGUF")  # beside a config.json it is a copy, and the folder is checked
    assert preflight(digits, output=tmp_path / "out", quiet=True).steps[3].verdict == "pass"
