"A fault that lives only at padded positions fails; what torch itself leaves open there does not."
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fsdl_devinfra.parity.checking import check
from test_parity_reach import like, saved


class Reader(nn.Module):
    "Attention under a mask that is written down in two ways, and states at every position."
    planted, averaging = "", False

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix, self.out = nn.Embedding(50, 16), nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.words(ids)
        q, k, v = (t[:, None] for t in self.mix(x).chunk(3, -1))
        allowed = (mask[:, None, None, :] > 0).expand(-1, 1, ids.shape[1], -1)
        if self.averaging: mixed = (q @ k.transpose(-1, -2) / 4).masked_fill(~allowed, torch.finfo(torch.float32).min).softmax(-1) @ v
        else: mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        x, hidden = x + self.out(mixed[:, 0]), (mask == 0)[..., None].to(x.dtype)
        if self.planted == "hidden": x = x + 0.01 * hidden
        if self.planted == "empty samples": x = x + 0.01 * hidden.amin(1, keepdim=True)
        if self.planted == "zeroed": x = x * (1 - hidden)
        return x


def twin(model: Reader, **how: object) -> Reader:
    made = like(Reader, model)
    for name, value in how.items(): setattr(made, name, value)
    return made


IDS = torch.arange(24).reshape(3, 8)
PADDED = torch.tensor([[1] * 8, [0] * 3 + [1] * 5, [1] * 5 + [0] * 3])
FREE = {"ids": [0, 1], "mask": [0, 1]}


@pytest.fixture(scope="module")
def model() -> Reader:
    torch.manual_seed(0)
    return Reader().eval()


@pytest.mark.parametrize(("how", "verdict"), [({}, "pass"), ({"averaging": True}, "pass"), ({"planted": "hidden"}, "fail"), ({"planted": "zeroed"}, "fail"),
                                              ({"planted": "empty samples"}, "fail"), ({"planted": "empty samples", "averaging": True}, "fail")])
def test_padded_positions_are_judged(model: Reader, how: dict[str, object], verdict: str, tmp_path: Path) -> None:
    inputs = {"ids": IDS, "mask": PADDED}
    report = check(model, saved(twin(model, **how), inputs, tmp_path / "m.onnx", FREE), inputs, explain=False)
    assert report.verdict == verdict, str(report)
    notes = " ".join(n for c in report.cases for n in c.notes)
    assert ("where every key is masked, the file's attention gives an average" in notes) == (how == {"averaging": True}), notes
    if verdict == "pass":
        assert {"left", "right", "none", "full"} <= set(report.coverage["paddings"])
        assert {"zeros", "repeated", "ordinary"} <= set(report.coverage["values"])


class Clamped(nn.Module):
    "Right on ordinary values and wrong on large ones."
    most = 1e9
    def __init__(self) -> None: super().__init__(); self.lin = nn.Linear(6, 6)
    def forward(self, x: torch.Tensor) -> torch.Tensor: return self.lin(x).clamp(-self.most, self.most)


class Tight(Clamped): most = 20.0


class Guarded(Clamped):
    "Right everywhere but where all is zero."
    def forward(self, x: torch.Tensor) -> torch.Tensor: return super().forward(x) + 0.1 * (x.abs().amax(1, keepdim=True) == 0)


@pytest.mark.parametrize(("kind", "verdict"), [(Clamped, "pass"), (Tight, "fail"), (Guarded, "fail")])
def test_values_outside_the_ordinary(kind: type[nn.Module], verdict: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = Clamped().eval(), {"x": torch.randn(2, 6)}
    report = check(model, saved(like(kind, model), inputs, tmp_path / "m.onnx", {"x": [0]}), inputs, explain=False)
    assert report.verdict == verdict, str(report)
    if verdict == "pass": assert set(report.coverage["values"]) == {"zeros", "large", "repeated", "ordinary"}


def test_a_fixed_batch_is_said_to_be_uncovered(tmp_path: Path) -> None:
    model, inputs = Clamped().eval(), {"x": torch.randn(2, 6)}
    report = check(model, saved(model, inputs, tmp_path / "m.onnx", {}), inputs)
    assert report.verdict == "pass" and report.coverage["values"] == ["ordinary"]
    assert report.coverage["not_covered"] == ["batches other than 2", "zeros, large and repeated values"]
