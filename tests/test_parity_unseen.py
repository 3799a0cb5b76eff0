"Models and faults that no other test knows: where the blame belongs, what is no fault, and what cannot be run at all."
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn import functional as F

from fsdl_devinfra.parity.checking import check
from fsdl_devinfra.parity.exporting import Capture, export_capture
from fsdl_devinfra.parity.graph import load_graph
from fsdl_devinfra.parity.inputs import call

SEMANTICS, WEIGHT, BAKED = "operator semantics", "weight", "baked shape"


class Decoder(nn.Module):
    "Transposed convolutions, two kinds of slopes, a norm with statistics; two outputs."
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(1, 6, 3, 2, 1), nn.ConvTranspose2d(6, 4, 3, 2, 1, output_padding=1)
        self.norm, self.last = nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1)
        self.norm.running_mean.normal_(); self.norm.running_var.uniform_(0.3, 3)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        code = F.leaky_relu(F.elu(self.down(image), 0.8), 0.2)
        return {"picture": self.last(self.norm(self.up(code)).relu()).sigmoid(), "code": code}


class StateSpace(nn.Module):
    "A diagonal state space: decays by a cumulative sum, a causal convolution, a gate."
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.enter, self.step, self.leave = nn.Linear(4, 2 * width), nn.Linear(width, width), nn.Linear(width, 4)
        self.mix = nn.Conv1d(width, width, 4, groups=width, padding=3)
        self.rate = nn.Parameter(torch.rand(width))

    def forward(self, series: torch.Tensor) -> torch.Tensor:
        length = series.shape[1]
        u, gate = self.enter(series).chunk(2, -1)
        u = F.silu(self.mix(u.transpose(1, 2))[..., :length].transpose(1, 2))
        step = F.softplus(self.step(u))
        passed = (-step * self.rate.exp()).cumsum(1)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)[None, :, :, None]
        decay = (passed[:, :, None] - passed[:, None]).masked_fill(future, -1e9).exp()
        return self.leave(torch.einsum("btsd,bsd->btd", decay, step * u) * F.silu(gate))


class Pool(nn.Module):
    "A masked mean, whose count has a size of one; the largest three; a share."
    def __init__(self) -> None: super().__init__(); self.words, self.head = nn.Embedding(20, 8), nn.Linear(8, 8)

    def forward(self, input_ids: torch.Tensor, keep: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.words(input_ids).masked_fill(~keep[..., None], 0.0)
        mean = x.sum(1) / keep.sum(-1, keepdim=True).clamp(min=1)
        best = self.head(mean).topk(3)
        return {"value": best.values, "place": best.indices, "share": keep.sum(-1) / keep.shape[-1]}


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, torch.Tensor]]]] = {
    "decoder": lambda: (Decoder(), {"image": torch.randn(2, 1, 16, 20)}),
    "state": lambda: (StateSpace(), {"series": torch.randn(2, 9, 4)}),
    "pool": lambda: (Pool(), {"input_ids": torch.randint(0, 20, (3, 7)), "keep": torch.rand(3, 7) > 0.3})}
Made = tuple[nn.Module, Path, Capture, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    done: dict[str, Made] = {}

    def get(name: str) -> Made:
        if name not in done:
            torch.manual_seed(3)
            module, inputs = MODELS[name]()
            path = tmp_path_factory.mktemp(name) / "model.onnx"
            done[name] = (module.eval(), path, export_capture(module, inputs, path)[1], inputs)
        return done[name]
    return get


def first(g: Any, op: str, number: int = 0) -> Any: return [n for n in g.node if n.op_type == op][number]


def with_attribute(node: Any, **values: Any) -> Any:
    kept = [a for a in node.attribute if a.name not in values]
    del node.attribute[:]; node.attribute.extend([*kept, *(helper.make_attribute(k, v) for k, v in values.items())])
    return node


def reread(g: Any, node: Any, position: int, value: Any) -> Any:
    "Another constant for one reader."
    g.initializer.append(numpy_helper.from_array(value, "planted"))
    node.input[position] = "planted"
    return node


def constant(g: Any, node: Any) -> int: return next(i for i, v in enumerate(node.input) if v in {t.name for t in g.initializer})


def value(g: Any, node: Any) -> np.ndarray: return numpy_helper.to_array(next(t for t in g.initializer if t.name in node.input))


def infinite(g: Any, node: Any) -> Any: return reread(g, node, 1, np.where(np.arange(4) == 2, np.inf, value(g, node)).astype(np.float32))


def through(g: Any, node: Any, kind: int) -> Any:
    "A value that goes through a narrower type on its way."
    where = next(i for i, n in enumerate(g.node) if n.name == node.name)
    name = node.output[0]
    g.node[where].output[0] = "wide"
    g.node.insert(where + 1, helper.make_node("Cast", ["wide"], ["narrow"], name="down", to=kind))
    g.node.insert(where + 2, helper.make_node("Cast", ["narrow"], [name], name="back", to=TensorProto.FLOAT))
    return g.node[where]



def identity(node: Any) -> Any:
    node.op_type = "Identity"
    del node.attribute[:], node.input[1:]
    return node


FAULTS: list[tuple[str, str, Callable[[Any], Any], set[str]]] = [
    ("pool", "count_without_its_axis", lambda g: with_attribute(first(g, "ReduceSum", 1), keepdims=0), {SEMANTICS}),
    ("pool", "smallest", lambda g: with_attribute(first(g, "TopK"), largest=0), {SEMANTICS}),
    ("decoder", "slope", lambda g: with_attribute(first(g, "LeakyRelu"), alpha=0.25), {SEMANTICS}),
    ("decoder", "elu", lambda g: with_attribute(first(g, "Elu"), alpha=0.7), {SEMANTICS}),
    ("decoder", "other_corner", lambda g: with_attribute(first(g, "ConvTranspose"), pads=[0, 0, 2, 2]), {SEMANTICS}),
    ("decoder", "half_in_one_place", lambda g: through(g, first(g, "ConvTranspose"), TensorProto.FLOAT16), {SEMANTICS}),
    ("decoder", "no_sigmoid", lambda g: identity(first(g, "Sigmoid")), {SEMANTICS}),
    ("state", "mask_of_minus_one", lambda g: (lambda n: reread(g, n, constant(g, n), np.float32(-1.0)))(first(g, "Where", 1)), {SEMANTICS, WEIGHT}),
    ("state", "reverse_sum", lambda g: with_attribute(first(g, "CumSum"), reverse=1), {SEMANTICS}),
    ("state", "brain_float_in_one_place", lambda g: through(g, first(g, "CumSum"), TensorProto.BFLOAT16), {SEMANTICS}),
    ("state", "not_causal", lambda g: with_attribute(first(g, "Conv"), pads=[2, 4]), {SEMANTICS}),
    ("state", "infinite_tap", lambda g: infinite(g, first(g, "Conv")), {WEIGHT})]
QUICK = {"count_without_its_axis", "slope", "reverse_sum"}


PARAMETERS = [pytest.param(*f, id=f"{f[0]}-{f[1]}", marks=[] if f[1] in QUICK else pytest.mark.slow) for f in FAULTS]


@pytest.mark.parametrize(("name", "fault", "plant", "kinds"), PARAMETERS)
def test_unseen_fault(made: Callable[[str], Made], tmp_path: Path, name: str, fault: str, plant: Callable[[Any], Any], kinds: set[str]) -> None:
    module, path, captured, inputs = made(name)
    proto = onnx.load(path)
    culprit = plant(proto.graph).name
    onnx.save(proto, tmp_path / "bad.onnx")
    report = check(module, tmp_path / "bad.onnx", inputs, captured=captured)
    assert (report.verdict, report.status) == ("fail", 1), str(report)
    graph = load_graph(path)
    fx = next(o.fx for n, o in zip(graph.nodes, graph.origins) if n.name == culprit and o is not None)
    assert report.first_divergence is not None, str(report)
    assert report.first_divergence.onnx_node in {"down", "back", *(graph.nodes[i].name for i in graph.units()[fx])}, (report.first_divergence, fx)
    assert kinds & {c.kind for c in report.causes}, report.causes


@pytest.mark.parametrize("name", list(MODELS))
def test_unseen_model_passes(made: Callable[[str], Made], name: str) -> None:
    module, path, captured, inputs = made(name)
    report = check(module, path, inputs, captured=captured)
    assert (report.verdict, report.first_divergence, report.causes) == ("pass", None, []), str(report)


def test_opset_under_which_the_file_does_not_load(made: Callable[[str], Made], tmp_path: Path) -> None:
    module, path, captured, inputs = made("state")
    proto = onnx.load(path)
    for o in proto.opset_import: o.version = 11
    onnx.save(proto, tmp_path / "bad.onnx")
    report = check(module, tmp_path / "bad.onnx", inputs, captured=captured)
    assert report.verdict == "fail" and SEMANTICS in {c.kind for c in report.causes}, str(report)
    assert "declares opset 11" in report.causes[0].evidence


def test_inputs_of_another_model(made: Callable[[str], Made], tmp_path: Path) -> None:
    "One sentence, not a comparison of two files that have nothing to do with each other."
    module, _, captured, inputs = made("state")
    report = check(module, made("decoder")[1], inputs, captured=captured)
    assert report.verdict == "fail" and [c.kind for c in report.causes] == ["other inputs"], str(report)
    assert "asks for image" in report.causes[0].evidence


class Close(nn.Module):
    "Two sums over the same numbers in another order, compared; and a counter at its limit."
    def __init__(self) -> None: super().__init__(); self.weight = nn.Parameter(torch.randn(256))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        a, b = x @ self.weight, (x * self.weight).flip(-1).sum(-1)
        return {"larger": a > b, "label": torch.stack([a, b], -1).argmax(-1), "full": (x[:, :8] > 0).sum(-1) >= 4}


def test_a_tie_that_rounding_decides_is_no_fault(tmp_path: Path) -> None:
    "But a limit that is off by one is, although its output consists of decisions as well."
    torch.manual_seed(0)
    module, inputs = Close(), {"x": torch.randn(256, 256)}
    _, captured = export_capture(module, inputs, tmp_path / "good.onnx")
    report = check(module, tmp_path / "good.onnx", inputs, captured=captured)
    assert report.verdict == "pass", str(report)
    tied = [n for n in report.cases[0].notes if "where rounding decides" in n]
    assert tied and all("full" not in n for n in tied), report.cases[0].notes
    proto = onnx.load(tmp_path / "good.onnx")
    first(proto.graph, "GreaterOrEqual").op_type = "Greater"
    onnx.save(proto, tmp_path / "bad.onnx")
    report = check(module, tmp_path / "bad.onnx", inputs, captured=captured)
    assert report.verdict == "fail" and report.first_divergence.op.startswith("aten.ge"), str(report)
    assert [o.verdict for o in report.cases[0].outputs] == ["pass", "pass", "fail"] and SEMANTICS in {c.kind for c in report.causes}


@pytest.mark.slow
def test_float64(tmp_path: Path) -> None:
    "The error that a sum of 2,000 products may have is measured; an epsilon that ONNX can only hold as float32 is named as that."
    torch.manual_seed(0)
    plain, x = nn.Sequential(nn.Linear(2000, 16), nn.Tanh(), nn.Linear(16, 4)).double(), torch.randn(4, 2000, dtype=torch.float64)
    export_capture(plain, {"input": x}, tmp_path / "plain.onnx")
    assert check(plain, tmp_path / "plain.onnx", {"input": x}).verdict == "pass"
    normed = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).double()
    _, captured = export_capture(normed, {"input": x[:, :8]}, tmp_path / "normed.onnx")
    report = check(normed, tmp_path / "normed.onnx", {"input": x[:, :8]}, captured=captured)
    assert report.verdict == "fail" and [c.kind for c in report.causes] == ["float32 attribute"], str(report)


@dataclass
class Found:
    boxes: torch.Tensor
    score: torch.Tensor


class Detector(nn.Module):
    def __init__(self) -> None: super().__init__(); self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 1)
    def forward(self, x: torch.Tensor) -> Found: return Found(self.a(x), self.b(x).sigmoid().squeeze(-1))


def test_outputs_in_a_dataclass(tmp_path: Path) -> None:
    torch.utils._pytree.register_dataclass(Found)
    torch.manual_seed(0)
    module, inputs = Detector(), {"x": torch.randn(2, 5, 6)}
    assert list(call(module, inputs)) == ["boxes", "score"]
    export, captured = export_capture(module, inputs, tmp_path / "model.onnx")
    assert [p.name for p in export.outputs] == ["boxes", "score"]
    assert check(module, tmp_path / "model.onnx", inputs, captured=captured).verdict == "pass"
