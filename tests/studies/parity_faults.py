"""Planted faults that nobody tuned for: how many pass, and is the operator named, with its cause?

python tests/studies/parity_faults.py --seed 1 --faults 300 --minutes 60

Every fault is one random change of one file: a weight, an attribute, an operator, a shape, a mask, a position, a
precision, or what a fusion gets wrong. A fault counts as visible where it makes an output of our own set of inputs
wrong by more than twice torch's own error, channel by channel, and more than twice the error of the healthy file.
"""
from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import parity_models as models

from fsdl_devinfra.parity.checking import check, feeds_of
from fsdl_devinfra.parity.graph import Graph, load_graph
from fsdl_devinfra.parity.inputs import with_sizes
from fsdl_devinfra.parity.original import as_arrays, reference, run_torch

warnings.filterwarnings("ignore")


@dataclass
class Fault:
    "One change of one file."
    kind: str  # weight, attribute, operator, shape, mask, position, precision, fusion
    what: str
    node: int  # index in the healthy file of the node that is wrong now; -1 where there is none
    causes: set[str]  # that are right


WEIGHT, SEMANTICS, SHAPE = {"weight"}, {"operator semantics"}, {"baked shape", "operator semantics"}


def floats(graph: Graph, least: int = 2) -> list[str]:
    "Weights that one node reads."
    return [t.name for t in graph.proto.graph.initializer if t.data_type == 1 and np.prod(t.dims) >= least and len(set(graph.consumers.get(t.name, []))) == 1]


def put(proto: Any, name: str, value: np.ndarray) -> None:
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), name))


def set_attribute(node: Any, name: str, value: Any) -> None:
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]; node.attribute.extend([*kept, helper.make_attribute(name, value)])


def weight(graph: Graph, proto: Any, rng: random.Random) -> Fault:
    "One value, one row, one channel or a scale."
    name = rng.choice(floats(graph))
    value, how = graph.array(name).copy(), rng.choice(["value", "row", "scale", "permuted", "zeroed"])
    size = float(value.std()) or 1.0
    flat, row = value.reshape(-1), rng.randrange(value.shape[0])
    if how == "value": flat[rng.randrange(flat.size)] += np.float32(rng.choice([0.03, 0.3, 1]) * size)
    if how == "row": value[row] += np.float32(0.1 * size)
    if how == "scale": value *= np.float32(rng.choice([0.5, 1.01, 1.1]))
    if how == "permuted": value = np.roll(value, 1, 0)
    if how == "zeroed": value[row] = 0
    put(proto, name, value)
    return Fault("weight", f"{name}: {how}", graph.consumers[name][0], WEIGHT)


#: attribute → other values
ATTRIBUTES: dict[tuple[str, str], list[Any]] = {
    ("LayerNormalization", "epsilon"): [1e-2, 0.3], ("BatchNormalization", "epsilon"): [1e-2, 0.3], ("Softmax", "axis"): [1, 0], ("Gelu", "approximate"): ["tanh"],
    ("LeakyRelu", "alpha"): [0.3], ("Elu", "alpha"): [0.5], ("Gemm", "alpha"): [0.5], ("Gemm", "beta"): [0.5], ("Conv", "group"): [1], ("ReduceMean", "axes"): [],
    ("SkipLayerNormalization", "epsilon"): [1e-2, 0.3], ("SimplifiedLayerNormalization", "epsilon"): [1e-2, 0.3], ("InstanceNormalization", "epsilon"): [0.3],
    ("LSTM", "direction"): [], ("Resize", "coordinate_transformation_mode"): ["asymmetric", "align_corners"], ("AveragePool", "count_include_pad"): [1],
    ("FusedMatMul", "alpha"): [0.5], ("CumSum", "exclusive"): [1], ("CumSum", "reverse"): [1], ("Conv", "pads"): []}


def attribute(graph: Graph, proto: Any, rng: random.Random) -> Fault | None:
    options = [(i, key, v) for i, n in enumerate(graph.nodes) for (op, key), values in ATTRIBUTES.items() if n.op_type == op for v in values]
    options += [(i, "perm", None) for i, n in enumerate(graph.nodes) if n.op_type == "Transpose"]
    if not options: return None
    i, key, value = rng.choice(options)
    node = proto.graph.node[i]
    if key == "perm":
        perm = next(list(a.ints) for a in node.attribute if a.name == "perm")
        value = [*perm[:-2], perm[-1], perm[-2]]
    set_attribute(node, key, value)
    return Fault("attribute", f"{node.op_type}.{key} = {value}", i, SEMANTICS | ({"baked shape"} if key == "perm" else set()))


SWAPS = {"Relu": ["Sigmoid", "Softplus"], "Tanh": ["Erf", "Softsign"], "Erf": ["Tanh"], "Sigmoid": ["HardSigmoid"], "Gelu": ["Relu"], "Add": ["Sub"], "Sub": ["Add"],
         "Mul": ["Add"], "Div": ["Mul"], "Sqrt": ["Abs"], "Softmax": ["LogSoftmax"], "Less": ["LessOrEqual"], "LessOrEqual": ["Less"], "Greater": ["GreaterOrEqual"],
         "GreaterOrEqual": ["Greater"], "Sin": ["Cos"], "Cos": ["Sin"], "ReduceMean": ["ReduceMax", "ReduceSum"], "ReduceSum": ["ReduceMean"], "Neg": ["Identity"], "Exp": ["Softplus"],
         "GlobalAveragePool": ["GlobalMaxPool"], "MaxPool": ["AveragePool"], "Pow": [], "And": ["Or"], "Reciprocal": ["Neg"], "Max": ["Min"], "Min": ["Max"]}


def operator(graph: Graph, proto: Any, rng: random.Random) -> Fault | None:
    options = [(i, other) for i, n in enumerate(graph.nodes) for other in SWAPS.get(n.op_type, []) if n.domain in ("", "ai.onnx")]
    if not options: return None
    i, other = rng.choice(options)
    node = proto.graph.node[i]
    what = f"{node.op_type} → {other}"
    node.op_type = other
    if other == "AveragePool":
        kept = [a for a in node.attribute if a.name in ("kernel_shape", "pads", "strides", "auto_pad", "ceil_mode")]
        del node.attribute[:]; node.attribute.extend(kept)
    return Fault("operator", what, i, SEMANTICS | SHAPE)


def operands(graph: Graph, proto: Any, rng: random.Random) -> Fault | None:
    "The operands of something that does not commute, or one wire from elsewhere."
    options = [i for i, n in enumerate(graph.nodes) if n.op_type in ("Sub", "Div", "MatMul", "Less", "Greater", "Concat") and len(n.input) == 2]
    if not options: return None
    i = rng.choice(options)
    node = proto.graph.node[i]
    node.input[0], node.input[1] = node.input[1], node.input[0]
    return Fault("operator", f"{node.op_type} with its operands exchanged", i, SEMANTICS | SHAPE)


def shape(graph: Graph, proto: Any, rng: random.Random, sizes: Mapping[str, Any]) -> Fault | None:
    "A size that was computed becomes a constant."
    options = [i for i, n in enumerate(graph.nodes) if n.op_type == "Shape" and n.input[0] in sizes]
    if not options: return None
    i = rng.choice(options)
    node = proto.graph.node[i]
    bounds = {a.name: a.i for a in node.attribute}
    value = np.array(sizes[node.input[0]], np.int64)[bounds.get("start", 0):bounds.get("end")]
    proto.graph.node[i].CopyFrom(helper.make_node("Constant", [], list(node.output), name=node.name, value=numpy_helper.from_array(value, "")))
    for p in graph.nodes[i].metadata_props: proto.graph.node[i].metadata_props.append(p)
    return Fault("shape", f"the shape of {node.output[0]} is fixed at {value.tolist()}", i, SHAPE)


def mask(graph: Graph, proto: Any, rng: random.Random) -> Fault | None:
    "The mask is left out, inverted, or its constant is too small."
    if "attention_mask" not in graph.inputs: return None
    how = rng.choice(["ignored", "inverted", "weak"])
    if how == "weak":
        def low(name: str) -> bool: return graph.is_constant(name) and graph.array(name).size == 1 and graph.array(name).dtype.kind == "f" and float(graph.array(name).reshape(-1)[0]) < -1e4
        options = [(i, k) for i, n in enumerate(graph.nodes) for k, v in enumerate(n.input) if v and low(v)]
        if not options: return None
        i, k = rng.choice(options)
        old = graph.array(graph.nodes[i].input[k])
        proto.graph.initializer.append(numpy_helper.from_array(np.full_like(old, -1.0), "planted_mask"))
        proto.graph.node[i].input[k] = "planted_mask"
        return Fault("mask", "a mask constant of -1", i, SEMANTICS | WEIGHT)
    readers = graph.consumers["attention_mask"]
    made = [helper.make_node("Shape", ["attention_mask"], ["planted_shape"]), helper.make_node("ConstantOfShape", ["planted_shape"], ["planted_ones"],
            value=numpy_helper.from_array(np.array([1], np.int64))), helper.make_node("Sub", ["planted_ones", "attention_mask"], ["planted_inverse"])]
    new = "planted_ones" if how == "ignored" else "planted_inverse"
    for i in readers:
        for k, v in enumerate(proto.graph.node[i].input):
            if v == "attention_mask": proto.graph.node[i].input[k] = new
    nodes = [*made, *proto.graph.node]
    del proto.graph.node[:]; proto.graph.node.extend(nodes)
    first = next((i for i in readers if graph.nodes[i].op_type != "Shape"), readers[0])
    return Fault("mask", f"the mask is {how}", first, SEMANTICS | SHAPE)


def position(graph: Graph, proto: Any, rng: random.Random) -> Fault | None:
    "A table of positions whose last rows are another's, or an index that is clipped."
    gathers = [i for i, n in enumerate(graph.nodes) if n.op_type == "Gather" and n.input[0] in graph.initializers and len(graph.initializers[n.input[0]].dims) == 2
               and graph.initializers[n.input[0]].data_type == 1]
    if not gathers: return None
    i = rng.choice(gathers)
    name, index = graph.nodes[i].input[0], graph.nodes[i].input[1]
    rows = graph.initializers[name].dims[0]
    if rng.random() < 0.5:
        value = graph.array(name).copy()
        half = rows // 2
        value[half:] = np.roll(value[half:], 1, 0)
        put(proto, name, value)
        return Fault("position", f"{name}: the second half of the rows is moved by one", i, WEIGHT)
    proto.graph.initializer.append(numpy_helper.from_array(np.array(rows // 2, np.int64), "planted_most"))
    kind = None if graph.is_constant(index) else "cast"
    made = [helper.make_node("Cast", [index], ["planted_index"], to=7), helper.make_node("Min", ["planted_index", "planted_most"], ["planted_clipped"])]
    proto.graph.node[i].input[1] = "planted_clipped"
    nodes = [*proto.graph.node[:i], *made, *proto.graph.node[i:]]
    del proto.graph.node[:]; proto.graph.node.extend(nodes)
    return Fault("position", f"indices into {name} end at {rows // 2}", i, SEMANTICS | ({"weight"} if kind is None else set()) | SHAPE)


def precision(graph: Graph, proto: Any, rng: random.Random) -> Fault | None:
    "A weight or a value goes through a type that is too narrow."
    if rng.random() < 0.5:
        name, how = rng.choice(floats(graph)), rng.choice(["fp16", "bf16", "int8"])
        value = graph.array(name)
        if how == "fp16": narrow = value.astype(np.float16).astype(np.float32)
        elif how == "bf16": narrow = (value.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        else:
            step = float(np.abs(value).max()) / 127 or 1.0
            narrow = (np.rint(value / step) * step).astype(np.float32)
        put(proto, name, narrow)
        return Fault("precision", f"{name} rounded to {how}", graph.consumers[name][0], WEIGHT)
    inner = [i for i, n in enumerate(graph.nodes) if n.op_type in ("MatMul", "Gemm", "Add", "Mul", "Conv", "LayerNormalization", "Softmax") and n.output[0] not in graph.outputs]
    if not inner: return None
    i = rng.choice(inner)
    value, kind = graph.nodes[i].output[0], rng.choice([10, 16])
    proto.graph.node[i].output[0] = value + "_wide"
    made = [helper.make_node("Cast", [value + "_wide"], [value + "_low"], to=kind), helper.make_node("Cast", [value + "_low"], [value], to=1)]
    nodes = [*proto.graph.node[:i + 1], *made, *proto.graph.node[i + 1:]]
    del proto.graph.node[:]; proto.graph.node.extend(nodes)
    return Fault("precision", f"{value} goes through type {kind}", i, SEMANTICS)


def fusion(graph: Graph, proto: Any, rng: random.Random) -> Fault | None:
    "What a fusion forgets: a bias or a residual sum, or a scale."
    options = [i for i, n in enumerate(graph.nodes) if n.op_type in ("Add", "Mul") and n.output[0] not in graph.outputs and len(n.input) == 2]
    if not options: return None
    i = rng.choice(options)
    node = proto.graph.node[i]
    kept = next((v for v in node.input if not graph.is_constant(v)), node.input[0])
    if rng.random() < 0.5: kept = rng.choice(list(node.input))
    what = f"{node.op_type} {node.output[0]} keeps {kept} alone"
    op = node.op_type
    del node.input[:]; node.input.append(kept)
    node.op_type = "Identity"
    del node.attribute[:]
    return Fault("fusion", what, i, SEMANTICS | SHAPE | ({"weight"} if op == "Mul" else set()))


KINDS: tuple[Callable[..., Fault | None], ...] = (weight, attribute, operator, operands, shape, mask, position, precision, fusion)


# ---- what a fault does, measured without the rule that is under test

def own_inputs(made: models.Made, graph: Graph, seed: int) -> list[dict[str, torch.Tensor]]:
    "Other values, sizes and paddings than the check's own."
    generator = torch.Generator().manual_seed(seed + 1000)
    dims = {k: {i: d for i, d in enumerate(v) if isinstance(d, str) and re.fullmatch(r"[A-Za-z_]\w*", d)} for k, v in graph.sizes().items() if k in made.inputs}
    most = 24 if any("sequence" in d for v in dims.values() for d in v.values()) else 0
    points = []
    for length in (0, 5, most):
        sizes = {d: 2 for v in dims.values() for a, d in v.items() if a == 0} | ({d: length for v in dims.values() for d in v.values() if "sequence" in d} if length else {})
        point = with_sizes(made.inputs, dims, sizes)
        for k, v in point.items():
            if "mask" in k:
                point[k] = torch.ones_like(v)
                if v.shape[1] > 2: point[k][0, :v.shape[1] // 3] = 0; point[k][-1, -(v.shape[1] // 3):] = 0
            elif v.is_floating_point(): point[k] = v.roll(1, -1) + 0.3 * torch.randn(v.shape, generator=generator)
            else: point[k] = torch.randint(3, int(v.max()) + 1 if int(v.max()) > 3 else 60, v.shape, generator=generator)
        points.append(point)
    return points


def run_file(data: bytes, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray] | None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        wanted = {i.name for i in session.get_inputs()}
        return dict(zip([o.name for o in session.get_outputs()], session.run(None, {k: v for k, v in feeds.items() if k in wanted})))
    except Exception: return None


def exceeds(got: Mapping[str, np.ndarray], healthy: Mapping[str, np.ndarray], own: Mapping[str, np.ndarray], truth: Mapping[str, np.ndarray]) -> float:
    "How many times twice torch's error, and the healthy file's, the worst channel is wrong by; above 1 a fault is visible."
    worst = 0.0
    for name, there in zip(truth, got):
        mine = got[name if name in got else there]
        right = healthy[name if name in healthy else there]
        if mine.shape != truth[name].shape: return float("inf")
        if truth[name].dtype.kind in "biu": continue
        t = truth[name].astype(np.float64)
        if (np.isfinite(mine) != np.isfinite(right)).any(): return float("inf")
        apart = [np.nan_to_num(np.abs(np.nan_to_num(a.astype(np.float64)) - np.nan_to_num(t))) for a in (mine, own[name], right)]
        for axis in range(t.ndim):
            others = tuple(a for a in range(t.ndim) if a != axis)
            a, b, c = (x.max(axis=others) for x in apart)
            floor = 2.0**-23 * np.abs(np.nan_to_num(t)).max(axis=others)
            worst = max(worst, float((a / (2 * np.maximum(np.maximum(b, c), np.maximum(floor, 1e-30)))).max()))
    return worst


def visible(made: models.Made, data: bytes, healthy: bytes, points: list[dict[str, torch.Tensor]], known: list[Any]) -> float:
    "The worst of all our inputs."
    worst = 0.0
    for point, (feeds, right, own, truth) in zip(points, known):
        got = run_file(data, feeds)
        worst = max(worst, float("inf") if got is None else exceeds(got, right, own, truth))
    return worst


def prepared(made: models.Made, file: Path, seed: int) -> tuple[list[dict[str, torch.Tensor]], list[Any]]:
    graph = load_graph(file)
    points, known = [], []
    for point in own_inputs(made, graph, seed):
        try: truth, own = as_arrays(reference(made.module, point)), as_arrays(run_torch(made.module, point))
        except Exception: continue
        feeds = feeds_of(graph, point, "fp32")
        right = run_file(file.read_bytes(), feeds)
        if right is None: continue
        points.append(point); known.append((feeds, right, own, truth))
    return points, known


# ---- whether the operator is right

#: torch operators that a kind of node may come from, where nothing else tells
FROM = {"MatMul": "matmul|linear|bmm|attention|addmm|mm|einsum", "Gemm": "linear|addmm|mm", "Add": "add|linear|addmm|layer_norm|attention|masked|arange|norm|embed|gelu|slice|conv|sub",
        "Softmax": "softmax|attention", "LayerNormalization": "layer_norm", "SkipLayerNormalization": "layer_norm|add|linear"}


def expected(made: models.Made, graph: Graph, fault: Fault) -> tuple[str, set[str]]:
    "(how it is known, the names of the traced operator or the module path) of the node that was changed."
    node = graph.nodes[fault.node]
    origin = graph.origins[fault.node]
    if origin is not None: return "operator", {origin.fx}
    scope = re.match(r"/model/(.*)/[A-Z]\w*$", node.name)
    if node.name.startswith("/model/"): return "module", {scope[1].replace("/", ".") if scope else ""}
    clean = load_graph(made.files["dynamo"]) if "dynamo" in made.files else load_graph(made.captured.model)
    units = {v: o.fx for n, o in zip(clean.nodes, clean.origins) if o is not None for v in n.output}
    found = {units[v] for v in node.output if v in units}
    return ("operator", found) if found else ("unknown", set())


def is_right(made: models.Made, graph: Graph, fault: Fault, report: Any) -> bool | None:
    "Whether the report names the operator that was changed; None where nobody can tell which it was."
    how, names = expected(made, graph, fault)
    if how == "unknown": return None
    where = report.first_divergence
    if where is None: return False
    clean = load_graph(made.captured.model)
    told = {o.fx for n, o in zip(clean.nodes, clean.origins) if o is not None and (n.name == where.onnx_node or where.value in n.output)}
    told |= {o.fx for n, o in zip(graph.nodes, graph.origins) if o is not None and (n.name == where.onnx_node or where.value in n.output)}
    if where.onnx_node == graph.nodes[fault.node].name or where.value in graph.nodes[fault.node].output: return True
    if how == "operator": return bool(told & names)
    scope, op = next(iter(names)), graph.nodes[fault.node].op_type
    return scope == where.module and (op not in FROM or bool(re.search(FROM[op], where.op)))


@dataclass
class Row:
    model: str
    exporter: str
    kind: str
    what: str
    size: float  # times twice torch's error
    verdict: str
    right_operator: bool | None
    right_cause: bool
    told: str
    causes: list[str]
    seconds: float


def plant(made: models.Made, exporter: str, kind: Callable[..., Fault | None], rng: random.Random) -> tuple[Fault, Any, Graph] | None:
    file = made.files[exporter]
    graph = load_graph(file)
    proto = onnx.load(file)
    if kind is not shape: fault = kind(graph, proto, rng)
    else:
        asked = sorted({n.input[0] for n in graph.nodes if n.op_type == "Shape"} - set(graph.initializers))
        more = onnx.load(file)
        have = {o.name for o in more.graph.output}
        more.graph.output.extend(onnx.ValueInfoProto(name=v) for v in asked if v not in have and v not in graph.inputs)
        feeds = feeds_of(graph, made.inputs, "fp32")
        values = (run_file(more.SerializeToString(), feeds) or {}) | feeds
        fault = shape(graph, proto, rng, {v: values[v].shape for v in asked if v in values})
    return None if fault is None else (fault, proto, graph)


def one(made: models.Made, exporter: str, known: tuple[Any, Any], rng: random.Random, folder: Path) -> Row | None:
    kind = rng.choice(KINDS)
    planted = plant(made, exporter, kind, rng)
    if planted is None: return None
    fault, proto, graph = planted
    data = proto.SerializeToString()
    size = visible(made, data, made.files[exporter].read_bytes(), *known)
    bad = folder / "bad.onnx"
    bad.write_bytes(data)
    started = time.time()
    report = check(made.module, bad, made.inputs, captured=made.captured)
    where = report.first_divergence
    kinds = {c.kind for c in report.causes}
    return Row(made.name, exporter, fault.kind, fault.what, size, report.verdict, is_right(made, graph, fault, report) if report.verdict == "fail" else None,
               bool(kinds & fault.causes), f"{where.op} in {where.module}: {where.onnx_node}" if where else "", [f"{c.kind}: {c.evidence[:160]}" for c in report.causes],
               round(time.time() - started, 1))


def study(seed: int, count: int, names: tuple[str, ...], say: Callable[[Row], None] = lambda row: None, minutes: float = float("inf")) -> list[Row]:
    "Faults on all models in turn, in random order, until the count or the time is reached."
    rng, rows, end = random.Random(seed), [], time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as folder:
        for i, name in enumerate(rng.sample(names, len(names))):
            if time.monotonic() > end: break
            made = models.build(name, Path(folder), seed=seed)
            known = {exporter: prepared(made, file, seed) for exporter, file in made.files.items()}
            wanted = count * (i + 1) // len(names) - count * i // len(names)
            for _ in range(20 * wanted):
                if wanted <= 0 or time.monotonic() > end: break
                exporter = rng.choice(list(made.files))
                row = one(made, exporter, known[exporter], rng, Path(folder))
                if row is None: continue
                rows.append(row); say(row)
                wanted -= 1
    return rows


def figures(rows: list[Row]) -> dict[str, Any]:
    seen = [r for r in rows if r.size > 1]
    failed = [r for r in seen if r.verdict == "fail"]
    told = [r for r in failed if r.right_operator is not None]
    found: dict[str, Any] = {"faults": len(rows), "visible": len(seen), "false passes": len(seen) - len(failed), "operator": f"{sum(r.right_operator for r in told)}/{len(told)}",
                             "cause": f"{sum(r.right_cause for r in failed)}/{len(failed)}"}
    for group in ("exporter", "kind"):
        counts = Counter(getattr(r, group) for r in told)
        right = Counter(getattr(r, group) for r in told if r.right_operator)
        causes = Counter(getattr(r, group) for r in failed if r.right_cause)
        found[group] = {k: f"operator {right[k]}/{n}, cause {causes[k]}/{sum(getattr(r, group) == k for r in failed)}" for k, n in sorted(counts.items())}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=300)
    parser.add_argument("--models", default=",".join(models.NAMES))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no new fault is planted after this time")
    parser.add_argument("--json", type=Path, help="write every row here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    so_far: list[Row] = []
    def say(row: Row) -> None:
        so_far.append(row)
        running = {k: v for k, v in figures(so_far).items() if k not in ("exporter", "kind")}
        print(f"{row.model} {row.exporter} {row.kind}: {row.verdict} in {row.seconds} s; {running}", flush=True)
        wrong = row.size > 1 and (row.verdict != "fail" or row.right_operator is False or not row.right_cause)
        if wrong: print(json.dumps(asdict(row)), flush=True)
    rows = study(args.seed, args.faults, tuple(args.models.split(",")), say, args.minutes)
    print(json.dumps({"seed": args.seed, **figures(rows)}, indent=1))
    if args.json: args.json.write_text(json.dumps([asdict(r) for r in rows], indent=1))


if __name__ == "__main__": main()
