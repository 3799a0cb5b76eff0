"Other models, other faults: what nobody had in mind when the check was written. Each fault must be seen, at its operator, with a cause of the right kind."
from __future__ import annotations

from collections.abc import Callable
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

SEMANTICS, WEIGHT, BAKED = "operator semantics", "weight", "baked shape"
Made = tuple[nn.Module, Path, Capture, dict[str, torch.Tensor]]


class Pooled(nn.Module):
    "Pooling that rounds up, a bounded activation, a resize and a folded norm."
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.pool, self.average, self.head = nn.MaxPool2d(3, 2, ceil_mode=True), nn.AvgPool2d(2, padding=1, count_include_pad=False), nn.Linear(6, 4)
        self.norm.running_mean.normal_(); self.norm.running_var.uniform_(0.5, 2)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = F.relu6(3 * self.norm(self.first(image)))
        x = x + F.interpolate(self.average(self.pool(self.second(x))), size=x.shape[2:], mode="bilinear", align_corners=False)
        return self.head(x.mean((2, 3)))


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Rotary(nn.Module):
    "Rotary positions, RMS norm, grouped heads, a gated perceptron; logits masked with a constant."
    def __init__(self) -> None:
        super().__init__()
        self.words, self.q, self.kv, self.out = nn.Embedding(37, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.scale, self.gate, self.up, self.down, self.head = nn.Parameter(torch.rand(16) + 0.5), nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 37)
        self.register_buffer("frequencies", 100.0 ** -(torch.arange(0, 4).float() / 4))

    def normed(self, x: torch.Tensor) -> torch.Tensor: return self.scale * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.words(input_ids)
        angles = torch.arange(input_ids.shape[1])[:, None] * self.frequencies
        cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
        h = self.normed(x)
        q = self.q(h).unflatten(-1, (2, 8)).transpose(1, 2)
        k, v = (t.unflatten(-1, (1, 8)).transpose(1, 2) for t in self.kv(h).chunk(2, -1))
        future = torch.ones(input_ids.shape[1], input_ids.shape[1]).triu(1)
        scores = turned(q, cos, sin) @ turned(k, cos, sin).transpose(-1, -2) * 8**-0.5 - 1e4 * future
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        x = x + self.down(F.silu(self.gate(self.normed(x))) * self.up(self.normed(x)))
        logits = self.head(self.normed(x))
        return {"logits": logits.masked_fill(torch.arange(37) < 2, -1e9), "best": logits[..., 2:].argmax(-1)}


class Recurrent(nn.Module):
    "A GRU and a bidirectional LSTM, one after the other."
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.lstm, self.head = nn.GRU(5, 6, batch_first=True), nn.LSTM(6, 4, bidirectional=True, batch_first=True), nn.Linear(8, 3)

    def forward(self, series: torch.Tensor) -> torch.Tensor: return self.head(self.lstm(self.gru(series)[0])[0])


class Counting(nn.Module):
    "Casts, integer arithmetic, sorting: bins of a signal, looked up in a table."
    def __init__(self) -> None: super().__init__(); self.table, self.edges = nn.Embedding(12, 6), nn.Parameter(torch.linspace(-2, 2, 11))

    def forward(self, signal: torch.Tensor) -> dict[str, torch.Tensor]:
        level = (signal * 2.4 + 6).clamp(0, 11).to(torch.int64)
        big = level * 3_000_000_000 // 7
        top = self.table(level).sum(1).topk(3).values
        return {"top": top, "running": signal.cumsum(1) / (1 + level), "key": big % 1_000_003, "over": (signal[..., None] > self.edges).sum(-1)}


class Volume(nn.Module):
    "Normalisation in three ways over a signal, a depthwise convolution and a pixel shuffle."
    def __init__(self) -> None:
        super().__init__()
        self.groups, self.single, self.layer = nn.GroupNorm(2, 8), nn.InstanceNorm1d(8, affine=True), nn.LayerNorm(8)
        self.deep, self.mix, self.act = nn.Conv1d(8, 8, 5, padding=4, dilation=2, groups=8), nn.Conv1d(8, 16, 1), nn.PReLU(8)

    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        x = self.act(self.deep(self.groups(wave)))
        x = x + self.layer(self.single(x).transpose(1, 2)).transpose(1, 2)
        return F.hardswish(F.glu(self.mix(x), 1)).roll(1, -1) - F.elu(wave)


class Blend(nn.Module):
    "Two inputs of one shape, which a file can confuse, and three outputs of one shape, which it can confuse as well."
    output_names = ["sum", "product", "gap"]

    def __init__(self) -> None: super().__init__(); self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> dict[str, torch.Tensor]:
        x, y = self.a(left).tanh(), self.b(right).sigmoid()
        return {"sum": x + y, "product": x * y, "gap": x - y}


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, torch.Tensor]]]] = {
    "pooled": lambda: (Pooled(), {"image": torch.randn(2, 3, 24, 28)}), "rotary": lambda: (Rotary(), {"input_ids": torch.randint(0, 30, (2, 7))}),
    "recurrent": lambda: (Recurrent(), {"series": torch.randn(2, 9, 5)}), "counting": lambda: (Counting(), {"signal": torch.randn(2, 8)}),
    "volume": lambda: (Volume(), {"wave": torch.randn(2, 8, 15)}), "blend": lambda: (Blend(), {"left": torch.randn(3, 6), "right": torch.randn(3, 6)})}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    done: dict[str, Made] = {}

    def get(name: str) -> Made:
        if name not in done:
            torch.manual_seed(5)
            module, inputs = MODELS[name]()
            path = tmp_path_factory.mktemp(name) / "model.onnx"
            done[name] = (module.eval(), path, export_capture(module, inputs, path)[1], inputs)
        return done[name]
    return get


def nodes(g: Any, *ops: str) -> list[Any]:
    found = [n for n in g.node if n.op_type in ops]
    assert found, (ops, sorted({n.op_type for n in g.node}))
    return found


def of(g: Any, start: str, op: str = "") -> Any:
    "The node of a traced operator."
    return next(n for n in g.node if (not op or n.op_type == op) and any(p.key.endswith("fx_node") and p.value.startswith(f"%{start}") for p in n.metadata_props))


def weights(g: Any) -> dict[str, Any]: return {t.name: t for t in g.initializer}


def set_attribute(node: Any, **values: Any) -> Any:
    for name, value in values.items():
        kept = [a for a in node.attribute if a.name != name]
        del node.attribute[:]; node.attribute.extend([*kept, helper.make_attribute(name, value)] if value is not None else kept)
    return node


def change(g: Any, node: Any, position: int, how: Callable[[np.ndarray], np.ndarray]) -> Any:
    "Another constant for one reader."
    value = numpy_helper.to_array(weights(g)[node.input[position]])
    g.initializer.append(numpy_helper.from_array(np.ascontiguousarray(how(value.copy())).astype(value.dtype), f"planted::{node.name}"))
    node.input[position] = f"planted::{node.name}"
    return node


def constant(g: Any, node: Any) -> int: return next(i for i, v in enumerate(node.input) if v in weights(g))


def before(g: Any, node: Any, position: int, op: str, *more: Any, **attributes: Any) -> Any:
    "Put a node before an input."
    extra = []
    for i, value in enumerate(more): g.initializer.append(numpy_helper.from_array(np.asarray(value), f"more::{i}")); extra.append(f"more::{i}")
    where = next(i for i, n in enumerate(g.node) if n.name == node.name)
    g.node.insert(where, helper.make_node(op, [node.input[position], *extra], ["put::before"], name="put", **attributes))
    g.node[where + 1].input[position] = "put::before"
    return g.node[where + 1]


def at(index: tuple[int, ...], value: float) -> Callable[[np.ndarray], np.ndarray]:
    def how(a: np.ndarray) -> np.ndarray: a[index] = value; return a
    return how


def as_op(node: Any, op: str, keep: int | None = None, **attributes: Any) -> Any:
    node.op_type = op
    if keep is not None: del node.input[keep:]
    del node.attribute[:]
    return set_attribute(node, **attributes)


def swapped(node: Any, i: int = 0, j: int = 1) -> Any: node.input[i], node.input[j] = node.input[j], node.input[i]; return node


def in_bf16(g: Any) -> Any:
    "Weights that went through bfloat16 on the way."
    import ml_dtypes
    for t in g.initializer:
        if t.data_type == TensorProto.FLOAT: t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(t).astype(ml_dtypes.bfloat16).astype(np.float32), t.name))


def narrow(g: Any) -> Any:
    "The product computed in int32, as converters for small devices do."
    node = nodes(g, "Mul")[0] if any(v in weights(g) for v in nodes(g, "Mul")[0].input) else nodes(g, "Mul")[1]
    where = next(i for i, n in enumerate(g.node) if n.name == node.name)
    made = []
    for i in range(2):
        made.append(helper.make_node("Cast", [node.input[i]], [f"narrow{i}"], name=f"narrow{i}", to=TensorProto.INT32))
        node.input[i] = f"narrow{i}"
    name = node.output[0]
    g.node[where].output[0] = "narrow"
    g.node.insert(where + 1, helper.make_node("Cast", ["narrow"], [name], name="wide", to=TensorProto.INT64))
    for n in reversed(made): g.node.insert(where, n)
    return node


FAULTS: list[tuple[str, str, Callable[[Any], Any], set[str]]] = [
    ("pooled", "max_pool_rounds_down", lambda g: set_attribute(nodes(g, "MaxPool")[0], ceil_mode=0), {SEMANTICS}),
    ("pooled", "padding_counts", lambda g: set_attribute(nodes(g, "AveragePool")[0], count_include_pad=1), {SEMANTICS}),
    ("pooled", "max_for_average", lambda g: as_op(nodes(g, "AveragePool")[0], "MaxPool", kernel_shape=[2, 2], strides=[2, 2], pads=[1, 1, 1, 1]), {SEMANTICS}),
    ("pooled", "clip_at_five", lambda g: change(g, nodes(g, "Clip")[0], 2, lambda a: a - 1), {SEMANTICS}),
    ("pooled", "align_corners", lambda g: set_attribute(nodes(g, "Resize")[0], coordinate_transformation_mode="align_corners"), {SEMANTICS}),
    ("pooled", "nearest", lambda g: set_attribute(nodes(g, "Resize")[0], mode="nearest"), {SEMANTICS}),
    ("pooled", "one_channel_of_a_folded_norm", lambda g: change(g, nodes(g, "Conv")[0], 2, lambda a: a * np.where(np.arange(6) == 2, 1.01, 1)), {WEIGHT}),
    ("pooled", "dilated", lambda g: set_attribute(nodes(g, "Conv")[1], dilations=[2, 2], pads=[2, 2, 2, 2]), {SEMANTICS}),
    ("pooled", "median_of_axes", lambda g: as_op(nodes(g, "ReduceMean")[0], "ReduceMax", keepdims=0), {SEMANTICS}),
    ("rotary", "other_half", lambda g: swapped(next(n for n in nodes(g, "Concat") if any(v in m.output for m in nodes(g, "Neg") for v in n.input))), {SEMANTICS}),
    ("rotary", "no_sign", lambda g: as_op(nodes(g, "Neg")[0], "Identity"), {SEMANTICS}),
    ("rotary", "other_base", lambda g: change(g, next(n for n in g.node if "frequencies" in n.input), 1, lambda a: a * 1.01), {WEIGHT}),
    ("rotary", "other_epsilon", lambda g: change(g, of(g, "add", "Add"), 1, lambda a: a * 100), {SEMANTICS}),
    ("rotary", "softmax_axis", lambda g: set_attribute(nodes(g, "Softmax")[0], axis=-2), {SEMANTICS}),
    ("rotary", "root_forgotten", lambda g: (lambda n: change(g, n, constant(g, n), lambda a: a * a))(next(n for n in nodes(g, "Mul") if any(v in weights(g) and abs(float(numpy_helper.to_array(weights(g)[v]).reshape(-1)[0]) - 8**-0.5) < 1e-6 for v in n.input))), {SEMANTICS, WEIGHT}),
    ("rotary", "no_residual", lambda g: as_op([n for n in nodes(g, "Add") if not set(n.input) & set(weights(g))][-1], "Identity", 1), {SEMANTICS}),
    ("rotary", "hard_gate", lambda g: as_op(nodes(g, "Sigmoid")[0], "HardSigmoid"), {SEMANTICS}),
    ("rotary", "one_thousandth", lambda g: change(g, of(g, "linear", "MatMul"), 1, lambda a: a * 1.001), {WEIGHT}),
    ("rotary", "row_nobody_asks_for", lambda g: change(g, nodes(g, "Gather")[0], 0, at((35, 3), 2.0)), {WEIGHT}),
    ("rotary", "wrong_row", lambda g: before(g, nodes(g, "Gather")[0], 1, "Add", np.int64(1)), {SEMANTICS}),
    ("rotary", "infinity_in_one_place", lambda g: change(g, of(g, "linear_5", "MatMul"), 1, at((3, 4), np.inf)), {WEIGHT}),
    ("recurrent", "gates_in_torch_order", lambda g: change(g, nodes(g, "LSTM")[0], 1, lambda a: a[:, [*range(4), *range(8, 12), *range(4, 8), *range(12, 16)]]), {WEIGHT}),
    ("recurrent", "backward_first", lambda g: change(g, nodes(g, "LSTM")[0], 2, lambda a: a[::-1]), {WEIGHT}),
    ("recurrent", "other_gru", lambda g: set_attribute(nodes(g, "GRU")[0], linear_before_reset=0), {SEMANTICS}),
    ("recurrent", "other_gru_direction", lambda g: set_attribute(nodes(g, "GRU")[0], direction="reverse"), {SEMANTICS}),
    ("counting", "rounds", lambda g: before(g, next(n for n in nodes(g, "Cast") if any(a.name == "to" and a.i == 7 for a in n.attribute)), 0, "Round"), {SEMANTICS}),
    ("counting", "thirty_two_bits", narrow, {SEMANTICS}),
    ("counting", "exclusive", lambda g: set_attribute(nodes(g, "CumSum")[0], exclusive=1), {SEMANTICS}),
    ("counting", "smallest", lambda g: set_attribute(nodes(g, "TopK")[0], largest=0), {SEMANTICS}),
    ("counting", "at_least", lambda g: as_op(nodes(g, "Greater")[0], "LessOrEqual"), {SEMANTICS}),
    ("volume", "prelu_of_one_channel", lambda g: change(g, nodes(g, "PRelu")[0], 1, lambda a: a.reshape(a.shape) * np.where(np.arange(8).reshape(a.shape) == 5, 2, 1)), {WEIGHT}),
    ("volume", "layer_norm_epsilon", lambda g: set_attribute(nodes(g, "LayerNormalization")[0], epsilon=1e-3), {SEMANTICS}),
    ("volume", "undilated", lambda g: set_attribute(of(g, "conv", "Conv") if any(n.name == "node_conv1d" for n in g.node) is None else nodes(g, "Conv")[0], dilations=[1], pads=[2, 2]), {SEMANTICS}),
    ("volume", "elu_alpha", lambda g: set_attribute(nodes(g, "Elu")[0], alpha=0.9), {SEMANTICS}),
    ("blend", "left_for_right", lambda g: swapped(nodes(g, "Sub")[0]), {SEMANTICS}),
    ("blend", "wrong_input", lambda g: (lambda n: (n.input.__setitem__(0, "left"), n)[1])(next(n for n in nodes(g, "MatMul", "Gemm") if "right" in n.input)), {SEMANTICS})]
QUICK = {"row_nobody_asks_for", "left_for_right", "wrong_input"}


@pytest.mark.parametrize(("name", "fault", "plant", "kinds"), [pytest.param(*f, id=f"{f[0]}-{f[1]}", marks=[] if f[1] in QUICK else pytest.mark.slow) for f in FAULTS])
def test_unexpected_fault(made: Callable[[str], Made], tmp_path: Path, name: str, fault: str, plant: Callable[[Any], Any], kinds: set[str]) -> None:
    module, path, captured, inputs = made(name)
    proto = onnx.load(path)
    culprit = plant(proto.graph)
    if fault == "row_nobody_asks_for":  # under its own name, as a changed file has it
        table = next(t for t in proto.graph.initializer if t.name.startswith("planted::"))
        old = next(t for t in proto.graph.initializer if t.name == "words.weight")
        table.name = old.name; culprit.input[0] = old.name; proto.graph.initializer.remove(old)
    onnx.save(proto, tmp_path / "bad.onnx")
    report = check(module, tmp_path / "bad.onnx", inputs, captured=captured)
    assert (report.verdict, report.status) == ("fail", 1), str(report)
    graph = load_graph(path)
    fx = next(o.fx for n, o in zip(graph.nodes, graph.origins) if n.name == culprit.name and o is not None)
    assert report.first_divergence is not None, str(report)
    assert report.first_divergence.onnx_node in {graph.nodes[i].name for i in graph.units()[fx]}, (report.first_divergence, fx)
    assert kinds & {c.kind for c in report.causes}, report.causes


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "rotary" else pytest.mark.slow) for n in MODELS])
def test_no_fault_where_there_is_none(made: Callable[[str], Made], tmp_path: Path, name: str) -> None:
    "Also with outputs in another order, and through the reference evaluator."
    module, path, captured, inputs = made(name)
    proto = onnx.load(path)
    outputs = list(proto.graph.output)[::-1]
    del proto.graph.output[:]; proto.graph.output.extend(outputs)
    onnx.save(proto, tmp_path / "turned.onnx")
    # torch's exporter bakes the length of the series into recurrent layers: at its own shape that file is right
    widen = name != "recurrent"
    for file in (path, tmp_path / "turned.onnx"):
        report = check(module, file, inputs, captured=captured, widen=widen)
        assert (report.verdict, report.first_divergence, report.causes) == ("pass", None, []), str(report)
    if not widen: assert "baked shape" in {c.kind for c in check(module, path, inputs, captured=captured).causes}


def test_a_mask_in_the_logits_hides_nothing(made: Callable[[str], Made], tmp_path: Path) -> None:
    "Two logits are -1e9; an error of a thousandth in the others is 1e-12 of that."
    module, path, captured, inputs = made("rotary")
    proto = onnx.load(path)
    node = of(proto.graph, "linear_6", "Add")
    change(proto.graph, node, constant(proto.graph, node), lambda a: a + 1e-3 * (np.arange(37) == 9))
    onnx.save(proto, tmp_path / "bad.onnx")
    report = check(module, tmp_path / "bad.onnx", inputs, captured=captured)
    assert report.verdict == "fail" and report.first_divergence.module == "head", str(report)


@pytest.mark.slow
def test_weights_that_went_through_bfloat16(made: Callable[[str], Made], tmp_path: Path) -> None:
    for name in ("rotary", "recurrent", "pooled"):
        module, path, captured, inputs = made(name)
        proto = onnx.load(path)
        in_bf16(proto.graph)
        onnx.save(proto, tmp_path / "bad.onnx")
        report = check(module, tmp_path / "bad.onnx", inputs, captured=captured)
        assert report.verdict == "fail" and report.first_divergence is not None and WEIGHT in {c.kind for c in report.causes}, str(report)


def test_batch_of_one_alone(tmp_path: Path) -> None:
    "Right for every batch but one: seen because derived inputs come in other sizes too."
    class Net(nn.Module):
        def __init__(self) -> None: super().__init__(); self.fc = nn.Linear(4, 3)
        def forward(self, x: torch.Tensor) -> torch.Tensor: return self.fc(x).tanh()
        def example_inputs(self, batch: int) -> dict[str, torch.Tensor]: return {"x": torch.ones(batch, 4) * torch.arange(1, 5) / 4}

    torch.manual_seed(0)
    net = Net().eval()
    _, captured = export_capture(net, None, tmp_path / "good.onnx")
    report = check(net, tmp_path / "good.onnx")
    assert report.verdict == "pass" and [c.shapes["x"][0] for c in report.cases] == [2, 1, 3, 4]
    proto = onnx.load(tmp_path / "good.onnx")
    g = proto.graph
    node = nodes(g, "Tanh")[0]
    for name, value in (("one", np.int64([1])), ("half", np.float32(0.5)), ("whole", np.float32(1))): g.initializer.append(numpy_helper.from_array(value, name))
    for i, n in enumerate([helper.make_node("Shape", ["x"], ["size"], name="s0", start=0, end=1), helper.make_node("Equal", ["size", "one"], ["alone"], name="s1"),
                           helper.make_node("Where", ["alone", "half", "whole"], ["factor"], name="s2"), helper.make_node("Mul", [node.input[0], "factor"], ["scaled"], name="s3")]): g.node.insert(len(g.node) - 1, n)
    g.node[-1].input[0] = "scaled"
    onnx.save(proto, tmp_path / "bad.onnx")
    report = check(net, tmp_path / "bad.onnx", captured=captured)
    assert report.verdict == "fail" and [c.verdict for c in report.cases] == ["pass", "fail", "pass", "pass"]
    assert report.first_divergence.op.startswith("aten.tanh") or "linear" in report.first_divergence.op, report.first_divergence


@pytest.mark.slow
def test_a_quantised_file_is_not_the_same_function(made: Callable[[str], Made], tmp_path: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    module, path, captured, inputs = made("pooled")

    class Once(CalibrationDataReader):
        def __init__(self) -> None: self.left = [{k: v.numpy() for k, v in inputs.items()}]
        def get_next(self) -> Any: return self.left.pop() if self.left else None

    quantize_static(str(path), str(tmp_path / "qdq.onnx"), Once(), quant_format=QuantFormat.QDQ)
    report = check(module, tmp_path / "qdq.onnx", inputs, captured=captured)
    assert report.verdict == "fail" and report.first_divergence is not None and report.causes, str(report)


def test_a_node_that_the_runtime_refuses(made: Callable[[str], Made], tmp_path: Path) -> None:
    "Not loadable is not the same function either, and the node is known."
    module, path, captured, inputs = made("rotary")
    proto = onnx.load(path)
    node = before(proto.graph, nodes(proto.graph, "Gather")[0], 1, "Cast", to=TensorProto.INT8)
    onnx.save(proto, tmp_path / "bad.onnx")
    report = check(module, tmp_path / "bad.onnx", inputs, captured=captured)
    assert report.verdict == "fail" and report.first_divergence.onnx_node == node.name, str(report)
