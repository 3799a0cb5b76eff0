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


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration
    return T5ForConditionalGeneration(T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=60, decoder_start_token_id=0, initializer_factor=3.0))


def whisper() -> Any:
    from transformers import WhisperConfig, WhisperForConditionalGeneration
    return WhisperForConditionalGeneration(WhisperConfig(d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=60,
                                                         num_mel_bins=16, max_source_positions=20, max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
                                                         suppress_tokens=None, begin_suppress_tokens=None, init_std=0.3))


@pytest.mark.parametrize("make", [t5, whisper], ids=["t5", "whisper"])
def test_encoder_and_decoder(make: Any, tmp_path: Path) -> None:
    "The encoder once, then token for token; prompts of one, two and three tokens; and a fault in the cross-attention's cache alone."
    from fsdl_devinfra.parity.generation import compare_generation, decoder_prompt, export_generation, generation_check
    torch.manual_seed(0)
    model = make().eval()
    made = export_generation(model, tmp_path)
    assert made.components == {"encoder": "encoder.onnx", "prefill": "prefill.onnx", "decode": "decode.onnx"}
    for length in (1, 2, 3):
        report = compare_generation(model, tmp_path, decoder_prompt(model, length), steps=10)
        assert (report.verdict, report.same_tokens, len(report.steps)) == ("pass", 10, 10), report
    whole = generation_check(model, tmp_path, steps=40)  # Whisper ends after 16 positions
    assert whole.verdict == "pass" and whole.status == 0 and len(whole.cases[0].outputs) == (14 if make is whisper else 40)
    assert model.config.use_cache  # as it was
    proto = onnx.load(tmp_path / "decode.onnx")
    softmax = [n for n in proto.graph.node if n.op_type == "Softmax"][-1]
    if softmax.attribute: softmax.attribute[0].i = -2  # [batch, heads, 1, length]: every weight becomes one
    else: softmax.attribute.append(onnx.helper.make_attribute("axis", -2))
    onnx.save(proto, tmp_path / "decode.onnx")
    bad = compare_generation(model, tmp_path, steps=10)
    assert bad.verdict == "fail" and bad.steps[0].verdict == "pass" and bad.steps[1].verdict == "fail"
    (tmp_path / "encoder.onnx").unlink()
    with pytest.raises(ValueError, match="there is no encoder.onnx"): compare_generation(model, tmp_path)
