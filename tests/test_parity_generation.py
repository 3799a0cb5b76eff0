"Greedy generation with a key/value cache, token for token."
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    from transformers import LlamaConfig, LlamaForCausalLM

    from fsdl_devinfra.parity.generation import export_generation
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, vocab_size=60,
                                         max_position_embeddings=64, initializer_range=0.3)).eval()
    folder = tmp_path_factory.mktemp("generation")
    made = export_generation(model, folder, lock={"repo": "me/llama", "commit": None})
    assert made.components == {"prefill": "prefill.onnx", "decode": "decode.onnx"}
    return model, folder


def test_same_tokens(llama: tuple[Any, Path]) -> None:
    from fsdl_devinfra.parity.generation import compare_generation
    model, folder = llama
    report = compare_generation(model, folder, steps=12)
    assert (report.verdict, report.same_tokens, report.first_divergent_step) == ("pass", 12, None)
    assert len(report.steps) == 12 and max(s.ratio for s in report.steps) < 8
    other = compare_generation(model, folder, prompt=torch.randint(3, 60, (1, 3)), steps=5)
    assert other.verdict == "pass"


def test_fault_in_decode_alone_is_seen(llama: tuple[Any, Path], tmp_path: Path) -> None:
    from fsdl_devinfra.parity.generation import compare_generation
    model, folder = llama
    for name in ("prefill", "decode"): onnx.save(onnx.load(folder / f"{name}.onnx"), tmp_path / f"{name}.onnx")
    proto = onnx.load(tmp_path / "decode.onnx")
    head = max((t for t in proto.graph.initializer if t.data_type == 1 and len(t.dims) == 2), key=lambda t: np.prod(t.dims))
    a = numpy_helper.to_array(head).copy(); a[:] = a[::-1]
    head.CopyFrom(numpy_helper.from_array(a, head.name))
    onnx.save(proto, tmp_path / "decode.onnx")
    report = compare_generation(model, tmp_path, steps=8)
    assert report.verdict == "fail"
    assert report.steps[0].verdict == "pass"  # the prefill is right
    assert any(s.verdict == "fail" for s in report.steps[1:])
