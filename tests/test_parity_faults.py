"Planted faults: each must be found at the right node, with the right cause."
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from fsdl_devinfra.parity.checking import ParityReport, check
from fsdl_devinfra.parity.exporting import Capture, export_capture
from fsdl_devinfra.parity.graph import load_graph


class SelfAttention(nn.Module):
    "One head group with an additive mask from a padding mask."
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    "Pre-norm transformer layer."
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention, self.norm1, self.norm2 = SelfAttention(width, heads), nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.up, self.act, self.down, self.drop = nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.Dropout(0.3)

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        x = x + self.drop(self.attention(self.norm1(x), bias))
        return x + self.down(self.act(self.up(self.norm2(x))))


class Encoder(nn.Module):
    "Two outputs, causal and padding mask, three layers."
    def __init__(self, width: int = 24, heads: int = 3, depth: int = 3, vocabulary: int = 40):
        super().__init__()
        self.embed, self.layers = nn.Embedding(vocabulary, width), nn.ModuleList(Layer(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, vocabulary)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        length = input_ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        allowed = causal[None, None] & attention_mask[:, None, None, :].bool()
        bias = torch.zeros(allowed.shape).masked_fill(~allowed, -1e4)
        x = self.embed(input_ids) * 4
        for layer in self.layers: x = layer(x, bias)
        x = self.norm(x)
        return {"logits": self.head(x), "pooled": x[:, 0].tanh()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path, Capture, dict[str, torch.Tensor]]:
    torch.manual_seed(3)
    model = Encoder().eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.05 * torch.randn_like(p))
    mask = torch.ones(3, 6, dtype=torch.int64); mask[1, 4:] = 0; mask[2, 3:] = 0
    inputs = {"input_ids": torch.randint(0, 40, (3, 6)), "attention_mask": mask}
    path = tmp_path_factory.mktemp("encoder") / "model.onnx"
    _, captured = export_capture(model, inputs, path)
    return model, path, captured, inputs


def planted(made: Any, tmp_path: Path, change: Callable[[Any], str | None], **how: Any) -> tuple[ParityReport, list[str], Any]:
    "Change a copy of the file; returns the report, the nodes of the culprit's operator, and the changed graph."
    model, path, captured, inputs = made
    proto = onnx.load(path)
    culprit = change(proto.graph)
    onnx.save(proto, tmp_path / "bad.onnx")
    report = check(model, tmp_path / "bad.onnx", how.pop("inputs", inputs), captured=captured, **how)
    graph = load_graph(path)
    fx = next((o.fx for n, o in zip(graph.nodes, graph.origins) if n.name == culprit and o is not None), None)
    return report, [graph.nodes[i].name for i in graph.units().get(fx, [])], proto.graph


def nodes(graph: Any, op: str) -> list[Any]: return [n for n in graph.node if n.op_type == op]


def of_module(graph: Any, module: str, op: str) -> Any:
    return next(n for n in graph.node if n.op_type == op and any(p.key.endswith("name_scopes") and f"'{module}'" in p.value for p in n.metadata_props))


def constant(graph: Any, name: str) -> Any: return next(t for t in graph.initializer if t.name == name)


def edit(tensor: Any, change: Callable[[np.ndarray], np.ndarray]) -> None:
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(change(numpy_helper.to_array(tensor).copy())), tensor.name))


def set_attribute(node: Any, name: str, value: Any) -> None:
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]; node.attribute.extend([*kept, helper.make_attribute(name, value)])


def insert_before(graph: Any, node: Any, position: int, made: Any) -> None:
    "Put a node between an input of `node` and `node`."
    where = next(i for i, n in enumerate(graph.node) if n is node or n.name == node.name)
    graph.node.insert(where, made)
    graph.node[where + 1].input[position] = made.output[0]


def weight(graph: Any) -> str:
    node = of_module(graph, "layers.1.up", "MatMul")
    def bump(a: np.ndarray) -> np.ndarray: a[2, 3] += 0.02; return a
    edit(constant(graph, next(v for v in node.input if v in {t.name for t in graph.initializer})), bump)
    return node.name


def bias(graph: Any) -> str:
    def bump(a: np.ndarray) -> np.ndarray: a[5] -= 1e-3; return a
    edit(constant(graph, "layers.2.down.bias"), bump)
    return of_module(graph, "layers.2.down", "Add").name


def gelu(graph: Any) -> str:
    node = nodes(graph, "Gelu")[1]
    set_attribute(node, "approximate", "tanh")
    return node.name


def epsilon(graph: Any) -> str:
    node = nodes(graph, "LayerNormalization")[3]
    set_attribute(node, "epsilon", 1e-3)
    return node.name


def softmax_axis(graph: Any) -> str:
    node = nodes(graph, "Softmax")[1]
    set_attribute(node, "axis", 2)
    return node.name


def operator_swapped(graph: Any) -> str:
    node = nodes(graph, "Tanh")[0]
    node.op_type = "Erf"
    return node.name


def transposed_mask(graph: Any) -> str:
    node = next(n for n in graph.node if n.op_type == "Add" and nodes(graph, "Softmax")[1].input[0] == n.output[0])
    position = next(i for i, v in enumerate(node.input) if not v.startswith(("mul", "val")))
    insert_before(graph, node, position, helper.make_node("Transpose", [node.input[position]], ["turned"], name="turned", perm=[0, 1, 3, 2]))
    return node.name


def sub_for_add(graph: Any) -> str:
    node = next(n for n in graph.node if n.op_type == "Add" and n.name.startswith("node_add") and "layers.1" in str([p.value for p in n.metadata_props if p.key.endswith("name_scopes")]))
    node.op_type = "Sub"
    return node.name


def nan_in_weight(graph: Any) -> str:
    def poison(a: np.ndarray) -> np.ndarray: a[7] = np.nan; return a
    edit(constant(graph, "head.bias"), poison)
    return of_module(graph, "head", "Add").name


def scale(graph: Any) -> str:
    node = of_module(graph, "layers.0.attention", "Mul")
    name = next(v for v in node.input if v in {t.name for t in graph.initializer})
    graph.initializer.append(numpy_helper.from_array(np.float32(0.5), "half"))
    node.input[list(node.input).index(name)] = "half"
    return node.name


FAULTS = [(weight, "weight", "layers.1.up"), (bias, "weight", "layers.2.down"), (gelu, "operator semantics", "layers.1.act"),
          (epsilon, "operator semantics", "layers.1.norm2"), (softmax_axis, "operator semantics", "layers.1.attention"),
          (operator_swapped, "operator semantics", ""), (transposed_mask, "operator semantics", "layers.1.attention"), (sub_for_add, "operator semantics", "layers.1.attention"),
          (nan_in_weight, "weight", "head"), (scale, "operator semantics", "layers.0.attention")]


QUICK = {weight, gelu, transposed_mask, nan_in_weight}


@pytest.mark.parametrize(("fault", "kind", "module"), [pytest.param(*f, id=f[0].__name__, marks=[] if f[0] in QUICK else pytest.mark.slow) for f in FAULTS])
def test_fault_is_found_at_its_node(made: Any, tmp_path: Path, fault: Any, kind: str, module: str) -> None:
    report, culprits, _ = planted(made, tmp_path, fault)
    assert report.verdict == "fail"
    assert report.first_divergence is not None, report.notes
    assert report.first_divergence.onnx_node in culprits, (report.first_divergence, culprits)
    assert report.first_divergence.module == module
    assert report.first_divergence.source.startswith("test_parity_faults.py:") or "torch/" in report.first_divergence.source
    assert kind in {c.kind for c in report.causes}, report.causes
    assert report.first_divergence.isolated_error > 1e-7
    assert report.localization is not None and {v.node for v in report.localization.suspects} <= set(culprits)  # later operators only pass the error on


def test_healthy_file_passes_and_blames_nobody(made: Any, tmp_path: Path) -> None:
    report, _, _ = planted(made, tmp_path, lambda graph: None)
    assert (report.verdict, report.first_divergence, report.causes) == ("pass", None, [])


def test_missing_output(made: Any, tmp_path: Path) -> None:
    def drop(graph: Any) -> str:
        kept = [o for o in graph.output if o.name != "pooled"]
        name = next(n.name for n in graph.node if "pooled" in n.output)
        del graph.output[:]; graph.output.extend(kept)
        return name
    report, culprits, _ = planted(made, tmp_path, drop)
    assert report.verdict == "fail"
    assert [o.verdict for o in report.cases[0].outputs] == ["pass", "fail"]
    assert report.causes[0].kind == "missing output" and "pooled" in report.causes[0].evidence
    assert report.first_divergence.onnx_node in culprits


def test_baked_sequence_length(made: Any, tmp_path: Path) -> None:
    "A reshape holds the traced length: right at the traced size, wrong at another."
    def bake(graph: Any) -> str:
        node = [n for n in graph.node if n.op_type == "Reshape" and n.name.startswith("node__unsafe_view")][1]
        graph.initializer.append(numpy_helper.from_array(np.array([3, 6, 24], np.int64), "baked"))
        node.input[1] = "baked"
        return node.name
    _, _, _, inputs = made
    other = {k: torch.cat([v, v[:, :2]], 1) for k, v in inputs.items()}
    assert planted(made, tmp_path, bake, widen=False)[0].verdict == "pass"
    assert planted(made, tmp_path, bake, explain=False)[0].verdict == "fail"  # an example is compared at other sizes too
    report, culprits, _ = planted(made, tmp_path, bake, inputs=other)
    assert report.verdict == "fail"
    assert report.first_divergence.onnx_node in culprits, report
    assert "baked shape" in {c.kind for c in report.causes}, report.causes


@pytest.mark.slow
def test_fixed_input_size(made: Any, tmp_path: Path) -> None:
    def fix(graph: Any) -> None:
        for i in graph.input: i.type.tensor_type.shape.dim[1].dim_value = 6
    report, _, _ = planted(made, tmp_path, fix, inputs={k: torch.cat([v, v[:, :2]], 1) for k, v in made[3].items()})
    assert report.verdict == "fail" and report.causes[0].kind == "baked shape" and "fixed at 6" in report.causes[0].evidence


@pytest.mark.slow
def test_dropout_in_training_mode(made: Any, tmp_path: Path) -> None:
    def wake(graph: Any) -> str:
        node = of_module(graph, "layers.1.down", "Add")
        graph.initializer.extend([numpy_helper.from_array(np.float32(0.5), "rate"), numpy_helper.from_array(np.array(True), "on")])
        where = next(i for i, n in enumerate(graph.node) if n.name == node.name)
        name = node.output[0]
        graph.node[where].output[0] = f"{name}_before"
        graph.node.insert(where + 1, helper.make_node("Dropout", [f"{name}_before", "rate", "on"], [name], name="awake"))
        return node.name
    report, culprits, _ = planted(made, tmp_path, wake)
    assert report.verdict == "fail" and report.first_divergence.onnx_node in culprits
    assert "train mode" in {c.kind for c in report.causes}


def test_absent_provider_is_not_run(made: Any) -> None:
    model, path, _, inputs = made
    report = check(model, path, inputs, providers=["cpu", "cuda", "tensorrt"], widen=False)
    assert report.verdict == "not-run" and report.status == 2
    assert [(c.verdict, c.provider_used) for c in report.cases] == [("pass", "CPUExecutionProvider"), ("not-run", None), ("not-run", None)]
    assert {c.kind for c in report.causes} == {"absent provider"}


@pytest.mark.slow
def test_module_changed_after_export(made: Any) -> None:
    import copy
    model, path, _, inputs = made
    changed = copy.deepcopy(model)
    with torch.no_grad(): changed.layers[1].attention.out.weight[0, 0] += 0.05
    report = check(changed, path, inputs)
    assert report.verdict == "fail" and report.first_divergence.module == "layers.1.attention.out" and report.causes[0].kind == "weight"


@pytest.mark.slow
def test_wrong_metadata_free_file(made: Any, tmp_path: Path) -> None:
    "A file whose notes were stripped (an optimiser does that) is still located, by the names of its values."
    def strip(graph: Any) -> str:
        name = gelu(graph)
        for n in graph.node: del n.metadata_props[:]
        return name
    report, culprits, _ = planted(made, tmp_path, strip)
    assert report.verdict == "fail" and report.first_divergence.onnx_node in culprits
    assert report.first_divergence.module == "layers.1.act"


class Loud(nn.Module):
    "Activations of 10⁵ between modest ends: fine in fp32, infinite in fp16"
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        return self.second(h * 3e5 / (1 + (h * 3e5).abs()))


def test_fp16_overflow(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Loud(), torch.randn(4, 3, 8)
    _, captured = export_capture(model, {"x": x}, tmp_path / "loud.onnx")
    assert check(model, tmp_path / "loud.onnx", {"x": x}).verdict == "pass"
    report = check(model, tmp_path / "loud.onnx", {"x": x}, precisions=["fp16"], captured=captured)
    assert report.verdict == "fail" and report.causes[0].kind == "fp16 overflow", report
    assert report.first_divergence.op.startswith("aten.mul"), report.first_divergence
    assert "no evidence about fp16 on a GPU" in " ".join(report.cases[0].notes)


@pytest.mark.slow
def test_batch_norm_in_training_mode(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3), nn.Flatten(), nn.Linear(6 * 36, 4))
    with torch.no_grad(): model[1].running_mean.normal_(); model[1].running_var.uniform_(0.5, 2)
    x = torch.randn(4, 3, 8, 8)
    _, captured = export_capture(model, {"input": x}, tmp_path / "cnn.onnx")
    proto = onnx.load(tmp_path / "cnn.onnx")
    norm = next(n for n in proto.graph.node if n.op_type == "BatchNormalization")
    set_attribute(norm, "training_mode", 1)
    norm.output.extend(["running_mean_out", "running_var_out"])
    onnx.save(proto, tmp_path / "bad.onnx")
    report = check(model, tmp_path / "bad.onnx", {"input": x}, captured=captured)
    assert report.verdict == "fail" and "train mode" in {c.kind for c in report.causes}
    assert report.first_divergence.module == "1"
