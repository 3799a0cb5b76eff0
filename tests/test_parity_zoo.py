"Small models of every kind: each is exported, and the file is the same function at the traced sizes and at others."
from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fsdl_devinfra.parity import Rule, check, example_inputs, export
from fsdl_devinfra.parity.inputs import with_sizes

warnings.filterwarnings("ignore")
Made = tuple[nn.Module, "dict[str, torch.Tensor] | None"]
SMALL: dict[str, Any] = {"vocab_size": 60, "max_position_embeddings": 32}


def bert() -> Made:
    from transformers import BertConfig, BertModel
    return BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, initializer_range=0.2, **SMALL)), None


def gpt2() -> Made:
    from transformers import GPT2Config, GPT2LMHeadModel
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=32, vocab_size=60, initializer_range=0.2, bos_token_id=0, eos_token_id=0)), None


def llama() -> Made:
    from transformers import LlamaConfig, LlamaForCausalLM
    return LlamaForCausalLM(LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, initializer_range=0.2, **SMALL)), None


def t5() -> Made:
    from transformers import T5Config, T5ForConditionalGeneration
    return T5ForConditionalGeneration(T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=60, decoder_start_token_id=0)), None


def mixtral() -> Made:
    from transformers import MixtralConfig, MixtralForCausalLM
    return MixtralForCausalLM(MixtralConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, num_local_experts=4,
                                            num_experts_per_tok=2, initializer_range=0.2, **SMALL)), None


def whisper() -> Made:
    from transformers import WhisperConfig, WhisperForConditionalGeneration
    return WhisperForConditionalGeneration(WhisperConfig(d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64,
                                                         decoder_ffn_dim=64, vocab_size=60, num_mel_bins=16, max_source_positions=20, max_target_positions=16, pad_token_id=0,
                                                         bos_token_id=1, eos_token_id=2, decoder_start_token_id=3, suppress_tokens=None, begin_suppress_tokens=None)), None


def vit() -> Made:
    from transformers import ViTConfig, ViTForImageClassification
    return ViTForImageClassification(ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=4, initializer_range=0.2)), None


def clip() -> Made:
    "Two inputs of different kinds."
    from transformers import CLIPConfig, CLIPModel
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 60, "max_position_embeddings": 16, "eos_token_id": 2, "bos_token_id": 1}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)), None


class ConvNet(nn.Module):
    "Convolutions with BatchNorm."
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Linear(16, 5)
        for m in self.body:
            if isinstance(m, nn.BatchNorm2d): m.running_mean.normal_(); m.running_var.uniform_(0.5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor: return self.head(self.body(x).mean((2, 3)))


class UNet(nn.Module):
    "Down and up again, with GroupNorm and a skip connection."
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(4, 8)
        self.down, self.norm2 = nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.GroupNorm(4, 16)
        self.last = nn.Conv2d(24, 3, 3, padding=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        a = nn.functional.silu(self.norm1(self.first(image)))
        b = nn.functional.silu(self.norm2(self.down(a)))
        return self.last(torch.cat([a, nn.functional.interpolate(b, scale_factor=2.0, mode="bilinear")], 1))


class Tagger(nn.Module):
    "Bidirectional LSTM."
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.head = nn.Embedding(50, 12), nn.LSTM(12, 10, num_layers=2, bidirectional=True, batch_first=True), nn.Linear(20, 7)

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]: return {"logits": self.head(self.lstm(self.embed(input_ids))[0])}


class Dropped(nn.Module):
    "Left in train mode on purpose: exporting must not keep the dropout."
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.5), nn.BatchNorm1d(16), nn.Linear(16, 4))
        self.train()

    def forward(self, x: torch.Tensor) -> torch.Tensor: return self.body(x)


class ManyOutputs(nn.Module):
    "Two inputs; a tuple in a dictionary, an integer and a boolean output."
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(4, 8)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> dict[str, Any]:
        x, y = self.a(left), self.b(right)
        return {"logits": x + y, "parts": (x.tanh(), y.sigmoid()), "label": (x + y).argmax(-1), "positive": (x + y).sum(-1) > 0}


class Mixer(nn.Module):
    "einsum, cumsum, where, gather and a residual: operators that attention models leave out."
    def __init__(self) -> None:
        super().__init__()
        self.w, self.norm = nn.Parameter(torch.randn(8, 8)), nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.einsum("bsd,de->bse", self.norm(x), self.w)
        return torch.where(y > 0, y, 0.1 * y).cumsum(1) + x.flip(1)


class Gated(nn.Module):
    "RMS norm in float32, rotary-like mixing, SwiGLU; computes in its own precision otherwise."
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.gate, self.up, self.down = nn.Parameter(torch.rand(12)), nn.Linear(12, 24, bias=False), nn.Linear(12, 24, bias=False), nn.Linear(24, 12, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.float32)
        h = self.scale * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


ZOO: dict[str, Callable[[], Made]] = {
    "bert": bert, "gpt2": gpt2, "llama": llama, "t5": t5, "mixtral": mixtral, "whisper": whisper, "vit": vit, "clip": clip,
    "convnet": lambda: (ConvNet(), {"x": torch.randn(2, 3, 12, 12)}), "unet": lambda: (UNet(), {"image": torch.randn(2, 3, 16, 16)}),
    "lstm": lambda: (Tagger(), {"input_ids": torch.randint(0, 50, (2, 7))}), "dropout": lambda: (Dropped(), {"x": torch.randn(4, 8)}),
    "many": lambda: (ManyOutputs(), {"left": torch.randn(3, 6), "right": torch.randn(3, 4)}), "mixer": lambda: (Mixer(), {"x": torch.randn(2, 5, 8)}),
    "gated": lambda: (Gated(), {"x": torch.randn(2, 5, 12)})}


def digits() -> Made:
    from fsdl_devinfra.hub.digits import DigitsViT
    return DigitsViT(), None


ZOO["digits"] = digits
FAST = {"lstm", "many", "digits"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in ZOO])
def test_zoo(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    module, inputs = ZOO[name]()
    inputs = example_inputs(module) if inputs is None else inputs
    before = module.training
    made = export(module, inputs, tmp_path / "model.onnx")
    assert module.training == before
    dims = {p.name: {i: d for i, d in enumerate(p.shape) if isinstance(d, str)} for p in made.inputs}
    assert all(axes.get(0) == "batch" for axes in dims.values()), made.inputs
    sizes = {d for axes in dims.values() for d in axes.values()}
    others = [with_sizes(inputs, dims, {d: 1 for d in sizes if d == "batch"}), with_sizes(inputs, dims, {d: 5 for d in sizes if d in ("batch", "sequence")})]
    report = check(module, made.path, [inputs, *others])
    assert report.verdict == "pass", str(report)
    assert len(report.cases) == 3 and all(c.provider_used == "CPUExecutionProvider" and c.share == 1.0 for c in report.cases)
    assert max(o.ratio for c in report.cases for o in c.outputs) <= Rule().factor


def test_zoo_is_large_enough() -> None:
    assert len(ZOO) >= 14


@pytest.mark.slow
def test_the_matrix_stands_ready(tmp_path: Path) -> None:
    "The script that a machine with a GPU runs, on this one: what is not here is not-run, never a pass, and a model that cannot be made is named."
    import json
    import subprocess
    import sys
    script = Path(__file__).parent / "benchmarks" / "bench_parity_matrix.py"
    done = subprocess.run([sys.executable, str(script), "--model=many", "--model=nowhere", "--provider=cpu", "--provider=cuda", "--precision=fp32", "--precision=bf16", "-o", str(tmp_path / "matrix.json")],
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "matrix.json").read_text())
    assert found["machine"]["versions"]["torch"] == torch.__version__ and "gpu" in found["machine"]
    cases = {(c["provider"], c["precision"], c["tf32"]): c["verdict"] for c in found["cases"]}
    assert cases[("cpu", "fp32", False)] == "pass" and cases[("cpu", "bf16", False)] == "not-run"  # ONNX Runtime has no bf16 kernels on the CPU
    if found["machine"]["gpu"] is None: assert cases[("cuda", "fp32", False)] == "not-run"
    assert {k.split(" ")[0] for k in found["skipped"]} == {"nowhere"}
    assert str(tmp_path) not in (tmp_path / "matrix.json").read_text()
