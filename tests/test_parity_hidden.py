"Faults that the outputs hardly show, and faults in files whose nodes do not say where they came from."
from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import parity_models as models
import pytest
import torch
from onnx import helper
from torch import nn
from torch.nn import functional as F

from fsdl_devinfra.parity.checking import ParityReport, check
from fsdl_devinfra.parity.exporting import export_capture


class Quiet(nn.Module):
    "A branch that adds little to the output, behind a large one."
    def __init__(self, share: float) -> None:
        super().__init__()
        self.up, self.act, self.down, self.main, self.share = nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12), nn.Linear(12, 12), share

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.main(x) + self.share * self.down(self.act(self.up(x)))


def approximated(proto: Any) -> None:
    "The GELU by tanh."
    node = next(n for n in proto.graph.node if n.op_type == "Gelu")
    del node.attribute[:]
    node.attribute.append(helper.make_attribute("approximate", "tanh"))


def through_half(proto: Any) -> None:
    "What the first layer gives goes through fp16."
    at = next(i for i, n in enumerate(proto.graph.node) if n.op_type == "Gelu")
    node = proto.graph.node[at]
    made = [helper.make_node("Cast", [node.input[0]], ["low"], to=10), helper.make_node("Cast", ["low"], ["back"], to=1)]
    node.input[0] = "back"
    nodes = [*proto.graph.node[:at], *made, *proto.graph.node[at:]]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def ratio_of(report: ParityReport) -> float: return max(o.ratio for c in report.cases for o in c.outputs)


@pytest.mark.parametrize(("change", "share", "op"), [(approximated, 0.007, "aten.gelu.default"), (through_half, 0.006, "aten.gelu.default")])
def test_a_fault_that_the_rest_hides(change: Any, share: float, op: str, tmp_path: Path) -> None:
    "The outputs are within eight times torch's own error. The healthy file beside it passes, and so does the wrong one where the rule is a tolerance."
    torch.manual_seed(0)
    net, x = Quiet(share).eval(), torch.randn(4, 12)
    file = tmp_path / "net.onnx"
    captured = export_capture(net, {"x": x}, file)[1]
    healthy = check(net, file, {"x": x}, captured=captured)
    assert healthy.verdict == "pass" and ratio_of(healthy) < 2, ratio_of(healthy)
    proto = onnx.load(file)
    change(proto)
    onnx.save(proto, file)
    report = check(net, file, {"x": x}, captured=captured)
    assert 2 < ratio_of(report) <= 8, ratio_of(report)
    assert report.verdict == "fail" and report.causes, str(report)
    assert report.first_divergence is not None and report.first_divergence.op == op
    assert "later operators hide that" in str([o.why for c in report.cases for o in c.outputs])


class Block(nn.Module):
    "Fused by ONNX Runtime into MatMul, BiasGelu and SkipLayerNormalization."
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(x + self.down(F.gelu(self.up(x)))))


@pytest.mark.parametrize(("at", "module"), [(0, "up"), (1, "down")])
def test_a_node_that_cannot_be_run_inside_a_fusion(at: int, module: str, tmp_path: Path) -> None:
    "The operands of a MatMul are exchanged: the layer is named, not the fused operator that ends the step."
    torch.manual_seed(0)
    net, x = Block().eval(), torch.randn(2, 5, 16)
    captured = export_capture(net, {"x": x}, tmp_path / "net.onnx")[1]
    file = models.optimised(tmp_path / "net.onnx", tmp_path / "fused.onnx")
    kinds = [n.op_type for n in onnx.load(file).graph.node]
    assert {"BiasGelu", "SkipLayerNormalization"} & set(kinds), kinds
    assert check(net, file, {"x": x}, captured=captured).verdict == "pass"
    proto = onnx.load(file)
    node = [n for n in proto.graph.node if n.op_type == "MatMul"][at]
    node.input[0], node.input[1] = node.input[1], node.input[0]
    onnx.save(proto, file)
    report = check(net, file, {"x": x}, captured=captured)
    assert report.verdict == "fail" and report.first_divergence is not None
    assert (report.first_divergence.op, report.first_divergence.module) == ("aten.linear.default", module), report.first_divergence


class Masked(nn.Module):
    "Attention with a mask that is negated on its way."
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        seen = attention_mask.bool()[:, None, :]
        scores = (q @ k.transpose(-1, -2)).masked_fill(~seen, -1e9)
        return self.out(scores.softmax(-1) @ v)


def test_an_inverted_mask_is_not_taken_for_its_negation(tmp_path: Path) -> None:
    "The inverted mask equals what the module makes of the right one a step later."
    torch.manual_seed(0)
    net, mask = Masked().eval(), torch.ones(2, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    inputs = {"x": torch.randn(2, 6, 8), "attention_mask": mask}
    file = models.torchscript(net, inputs, tmp_path / "net.onnx")
    assert check(net, file, inputs).verdict == "pass"
    proto = onnx.load(file)
    reader = next(n for n in proto.graph.node if "attention_mask" in n.input)
    one = helper.make_node("Constant", [], ["one"], value=onnx.helper.make_tensor("one", 7, [], [1]))
    reader.input[list(reader.input).index("attention_mask")] = "inverse"
    nodes = [one, helper.make_node("Sub", ["one", "attention_mask"], ["inverse"]), *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    onnx.save(proto, file)
    report = check(net, file, inputs)
    assert report.verdict == "fail" and report.first_divergence is not None
    assert report.first_divergence.op in ("aten._to_copy.default", "aten.unsqueeze.default"), report.first_divergence  # not the masked sum behind the negation


class Positions(nn.Module):
    "A table of positions, read by a range as long as the input."
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.head = nn.Embedding(20, 8), nn.Parameter(torch.randn(32, 8)), nn.Linear(8, 3)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.words(input_ids) + self.places[torch.arange(input_ids.shape[1])])


def test_a_fixed_size_is_the_fault_and_not_who_reads_it(tmp_path: Path) -> None:
    "A size that the file should compute is a constant: the range that reads it is as in a fresh export."
    torch.manual_seed(0)
    net, inputs = Positions().eval(), {"input_ids": torch.randint(0, 20, (2, 6))}
    file = tmp_path / "net.onnx"
    captured = export_capture(net, inputs, file)[1]
    assert check(net, file, inputs, captured=captured).verdict == "pass"
    proto = onnx.load(file)
    shape = next(n for n in proto.graph.node if n.op_type == "Shape")
    fixed = helper.make_node("Constant", [], list(shape.output), name=shape.name, value=onnx.helper.make_tensor("", 7, [1], [6]))
    fixed.metadata_props.extend(shape.metadata_props)
    shape.CopyFrom(fixed)
    onnx.save(proto, file)
    report = check(net, file, inputs, captured=captured)
    assert report.verdict == "fail" and report.first_divergence is not None
    assert report.first_divergence.op == "aten.sym_size.int", report.first_divergence


def size_fixed(proto: Any) -> None:
    "The size of the mask is a constant."
    node = next(n for n in proto.graph.node if n.op_type == "Shape" and n.output[0] == "val_63")
    node.CopyFrom(helper.make_node("Constant", [], list(node.output), name=node.name, value=onnx.helper.make_tensor("", 7, [4], [2, 1, 1, 8])))


def turned(proto: Any) -> None:
    "The keys are in another order of axes, as long as they are wide."
    node = next(n for n in proto.graph.node if n.output[0] == "transpose_4")
    perm = next(a for a in node.attribute if a.name == "perm").ints
    perm[-2], perm[-1] = perm[-1], perm[-2]


def mask_inverted(proto: Any) -> None:
    readers = [n for n in proto.graph.node if "attention_mask" in n.input and n.op_type != "Shape"]
    made = [helper.make_node("Shape", ["attention_mask"], ["mask_size"]),
            helper.make_node("ConstantOfShape", ["mask_size"], ["mask_ones"], value=onnx.helper.make_tensor("", 7, [1], [1])),
            helper.make_node("Sub", ["mask_ones", "attention_mask"], ["mask_inverse"])]
    for node in readers: node.input[list(node.input).index("attention_mask")] = "mask_inverse"
    nodes = [*made, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


@pytest.mark.parametrize(("change", "op", "kind"), [(size_fixed, "aten.index.Tensor", "baked shape"), (turned, "aten.transpose.int", "operator semantics"),
                                                    (mask_inverted, "aten.view.default", "operator semantics")])
def test_a_file_that_the_runtime_wrote_is_compared_with_the_same_made_again(change: Any, op: str, kind: str, tmp_path: Path) -> None:
    "Each of these was blamed on who reads the value: no value of torch equals what the optimised file holds there."
    made = models.build("gpt2", tmp_path, ("dynamo", "optimised"))
    proto = onnx.load(made.files["optimised"])
    change(proto)
    onnx.save(proto, tmp_path / "bad.onnx")
    report = check(made.module, tmp_path / "bad.onnx", made.inputs, captured=made.captured)
    assert report.verdict == "fail" and report.first_divergence is not None
    assert (report.first_divergence.op, report.causes[0].kind) == (op, kind), (report.first_divergence, report.causes)
    assert any("the culprit is sure" in n for n in report.notes), report.notes
