"Any weight, anywhere: a change of one weight is blamed on the operator that reads it."
from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from fsdl_devinfra.parity.checking import check
from fsdl_devinfra.parity.exporting import export_capture
from fsdl_devinfra.parity.graph import load_graph
from fsdl_devinfra.parity.inputs import example_inputs
from test_parity_zoo import ZOO


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet", "lstm", "vit", "digits"])
def test_changed_weights_are_blamed_on_their_readers(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    module, inputs = ZOO[name]()
    inputs = example_inputs(module) if inputs is None else inputs
    _, captured = export_capture(module, inputs, tmp_path / "good.onnx")
    rng = np.random.default_rng(0)
    graph = load_graph(tmp_path / "good.onnx")
    weights = [t.name for t in graph.proto.graph.initializer if t.data_type == 1 and np.prod(t.dims) >= 8 and len(set(graph.consumers.get(t.name, []))) == 1]
    found = missed = 0
    for weight in rng.permutation(weights)[:4]:
        proto = onnx.load(tmp_path / "good.onnx")
        tensor = next(t for t in proto.graph.initializer if t.name == weight)
        values = numpy_helper.to_array(tensor).copy()
        values += np.float32(0.3) * (values.std() + 0.1) * rng.normal(size=values.shape).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(values, weight))
        onnx.save(proto, tmp_path / "bad.onnx")
        report = check(module, tmp_path / "bad.onnx", inputs, captured=captured)
        if report.verdict == "pass":  # a weight that this input does not reach, e.g. an unused row
            missed += 1
            continue
        reader = graph.consumers[weight][0]
        expected = [graph.nodes[i].name for i in graph.units()[graph.origins[reader].fx]]
        assert report.first_divergence is not None, (weight, report.notes)
        assert report.first_divergence.onnx_node in expected, (weight, report.first_divergence, expected)
        assert "weight" in {c.kind for c in report.causes}, (weight, report.causes)
        found += 1
    assert found >= 2 and missed <= 2
