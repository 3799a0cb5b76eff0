"Files that were reduced on purpose: good and absurd calibrations, the tools of ONNX Runtime, and faults beside the rounding."
from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnxruntime.quantization import QuantFormat
from torch import nn

from fsdl_devinfra.cli import main
from fsdl_devinfra.hub.digits import held_out
from fsdl_devinfra.parity.graph import load_graph
from fsdl_devinfra.parity.reduced import ReducedReport, check_reduced, parse_budget, reduction_hint

IMAGES, LABELS = (t.numpy() for t in held_out())


def static(source: Path, target: Path, data: np.ndarray, name: str = "pixel_values", **how: Any) -> Path:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None: self.left: Iterator[Any] = iter([{name: b} for b in np.array_split(data, 4)])
        def get_next(self) -> Any: return next(self.left, None)

    quantize_static(source, target, Reader(), **how)
    return target


def dynamic(source: Path, target: Path) -> Path:
    from onnxruntime.quantization import quantize_dynamic
    quantize_dynamic(source, target)
    return target


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reduced")
    assert main(["onnx", "export", "-o", str(folder)]) == 0
    np.savez(folder / "x.npz", pixel_values=IMAGES[:120], labels=LABELS[:120])
    return folder


def ran(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    status = main(["onnx", "check", *args, "--json"])
    return status, json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def good(room: Path) -> Path: return static(room / "model.onnx", room / "good.onnx", IMAGES[120:240])


def test_a_good_calibration_passes(room: Path, good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, document = ran(capsys, "builtin:digits", str(good), "--as", "int8", "--inputs", str(room / "x.npz"))
    output = document["cases"][0]["outputs"][0]
    assert (status, document["verdict"], document["causes"], document["proposal"]) == (0, "pass", [], None)
    assert output["sqnr_db"] > 25 and output["top1"] > 0.97 and output["kl"] < 0.01
    assert len(document["layers"]) > 30 and all(x["module"] or x["op"] for x in document["layers"]) and len(document["weights"]) > 10


@pytest.mark.parametrize("data", [pytest.param(IMAGES[120:240] * 0.02, id="narrow"),
                                  pytest.param(IMAGES[120:240] * np.float32(50), id="wide", marks=pytest.mark.slow),
                                  pytest.param(np.random.default_rng(0).normal(size=(120, 1, 8, 8)).astype(np.float32) * 5, id="noise", marks=pytest.mark.slow)])
def test_an_absurd_calibration_fails_and_is_named(room: Path, data: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    bad = static(room / "model.onnx", room / "bad.onnx", data)
    status, document = ran(capsys, "builtin:digits", str(bad), "--as", "int8", "--inputs", str(room / "x.npz"))
    assert (status, document["verdict"], document["causes"][0]["kind"]) == (1, "fail", "calibration"), document["causes"]
    assert document["proposal"]["again_db"] > document["cases"][0]["outputs"][0]["sqnr_db"] + 6 and document["proposal"]["within_budget"]
    assert document["ranges"] and document["first_divergence"]["onnx_node"]


def test_a_fault_beside_the_rounding_is_no_calibration(room: Path, good: Path) -> None:
    "One layer's weights are lost in the conversion: the layer is named, and the same tool does better."
    proto = onnx.load(good)
    tensor = next(t for t in proto.graph.initializer if t.name.endswith("_quantized") and list(t.dims) == [128, 64])
    tensor.CopyFrom(numpy_helper.from_array(np.roll(numpy_helper.to_array(tensor), 1, 0), tensor.name))
    onnx.save(proto, room / "rolled.onnx")
    from fsdl_devinfra.hub import load
    report = check_reduced(load("builtin:digits"), room / "rolled.onnx", "int8", {"pixel_values": IMAGES[:64]})
    assert report.verdict == "fail" and report.first_divergence is not None and "mlp" in report.first_divergence.module
    assert [c.kind for c in report.causes] == ["conversion"] and not report.ranges
    assert report.to_dict() == ReducedReport.from_dict(report.to_dict()).to_dict()


@pytest.mark.slow
def test_every_tool_of_the_runtime(room: Path) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType
    from onnxruntime.transformers.float16 import convert_float_to_float16

    from fsdl_devinfra.hub import load
    model = room / "model.onnx"
    onnx.save(convert_float_to_float16(onnx.load(model), keep_io_types=True), room / "half.onnx")
    # unsigned activations times signed weights of eight bits saturate on processors without VNNI: seven bits are the same everywhere
    unsigned = {"activation_type": QuantType.QUInt8, "reduce_range": True}
    files = {static(model, room / "a.onnx", IMAGES[120:], per_channel=True, **unsigned): "int8",
             static(model, room / "b.onnx", IMAGES[120:], quant_format=QuantFormat.QOperator, **unsigned): "int8",
             dynamic(model, room / "c.onnx"): "int8", room / "half.onnx": "fp16"}
    for file, kind in files.items():
        report = check_reduced(load("builtin:digits"), file, kind, {"pixel_values": IMAGES[:64]})
        assert report.verdict == "pass" and len(report.layers) > 10, (file.name, report.said)
        assert all(x.cumulative_db is None or x.cumulative_db > 15 for x in report.layers), file.name


@pytest.mark.slow
def test_the_other_converter_to_fp16(room: Path) -> None:
    converter = pytest.importorskip("onnxconverter_common.float16", reason="pip install onnxconverter-common")
    onnx.save(converter.convert_float_to_float16(onnx.load(room / "model.onnx")), room / "half2.onnx")
    assert check_reduced(room / "model.onnx", room / "half2.onnx", "fp16", {"pixel_values": IMAGES[:64]}).verdict == "pass"


class Wide(nn.Module):
    "A network with one layer whose weights need more than eight bits, and names of another exporter."
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.middle, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8 * 64, 48), nn.Linear(48, 10)
        with torch.no_grad(): self.middle.weight[:, 3] *= 100

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.head(self.middle(self.conv(pixel_values).relu().flatten(1)).relu())


def test_layers_to_keep_are_measured_in_a_file_of_another_exporter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Wide().eval(), torch.rand(64, 1, 8, 8)
    torch.onnx.export(net, (x[:2],), tmp_path / "old.onnx", dynamo=False, input_names=["pixel_values"], dynamic_axes={"pixel_values": {0: "n"}})
    file = static(tmp_path / "old.onnx", tmp_path / "int8.onnx", x.numpy())
    report = check_reduced(net, file, "int8", {"pixel_values": x}, budget=parse_budget("int8", "sqnr=35"), mixed=tmp_path / "mixed.onnx")
    assert report.verdict == "fail" and report.proposal is not None and report.proposal.keep_fp32, report
    before, after = report.proposal.again_db, report.proposal.mixed_db
    assert before is not None and after is not None and after > before + 6 and 0 < report.proposal.growth < 4
    found = check_reduced(net, tmp_path / "mixed.onnx", "int8", {"pixel_values": x}).cases[0].outputs[0].sqnr_db
    assert found is not None and abs(found - after) < 0.5


def test_a_hint_only_where_a_file_was_reduced(room: Path, good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, document = ran(capsys, "builtin:digits", str(good))
    assert status == 1 and any("--as int8" in n for n in document["notes"])
    assert reduction_hint(load_graph(room / "model.onnx")) == ""
    assert not any("--as" in n for n in ran(capsys, "builtin:digits", str(room / "model.onnx"))[1]["notes"])


@pytest.mark.parametrize(("args", "word"), [(("--budget", "sqnr=3"), "--budget speaks of"), (("--as", "int8", "--budget", "snr=3"), "--budget cannot be"),
                                            (("--as", "int8", "--shapes", "batch=1"), "do not go together"), (("--threads", "2"), "--threads speaks of"),
                                            (("--as", "int8", "--reduce", "x.onnx"), "looks for a fault"), (("--reduce", "x.txt"), "no ONNX file")])
def test_two_with_a_sentence(room: Path, args: tuple[str, ...], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, document = ran(capsys, "builtin:digits", str(room / "model.onnx"), *args)
    assert status == 2 and word in document["error"] and document["hint"], document


def test_a_metric_of_ones_own(room: Path, good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (room / "metric.py").write_text("def accuracy(o, i): return (o['logits'].argmax(-1) == i['labels']).mean()\n"
                                    "def sunk(o, i): return -abs(o['logits']).sum()\n")
    common = ("builtin:digits", str(good), "--as", "int8", "--inputs", str(room / "x.npz"))
    status, document = ran(capsys, *common, "--metric", f"{room / 'metric.py'}:accuracy")
    assert status == 0 and document["metric"]["model"] > 0.95 and abs(document["metric"]["file"] - document["metric"]["model"]) <= 0.01
    status, document = ran(capsys, *common, "--metric", f"{room / 'metric.py'}:accuracy", "--budget", "metric=-1")
    assert status == 1 and any("your metric falls" in n for n in document["notes"])


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"huge": lambda x: x * 1e7}


def test_overflow_in_fp16_is_seen_on_the_cpu_too(room: Path) -> None:
    "ONNX Runtime computes fp16 in fp32 on the CPU and would hide it."
    from onnxruntime.transformers.float16 import convert_float_to_float16
    torch.manual_seed(0)
    net, x = Wide().eval(), torch.rand(8, 1, 8, 8)
    torch.onnx.export(net, (x,), room / "net.onnx", dynamo=False, input_names=["pixel_values"], dynamic_axes={"pixel_values": {0: "n"}})
    onnx.save(convert_float_to_float16(onnx.load(room / "net.onnx"), keep_io_types=True), room / "net16.onnx")
    assert check_reduced(net, room / "net16.onnx", "fp16", {"pixel_values": x}).verdict == "pass"
    report = check_reduced(net, room / "net16.onnx", "fp16", {"pixel_values": CHANGES["huge"](x.numpy()).astype(np.float32)})
    assert report.verdict == "fail" and "overflow" in {c.kind for c in report.causes}


class Three(nn.Module):
    "Three layers, so that a fault in the second one is neither the first nor the last operator."
    def __init__(self) -> None: super().__init__(); self.first, self.second, self.third = nn.Linear(24, 32), nn.Linear(32, 32), nn.Linear(32, 6)
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor: return self.third(self.second(self.first(pixel_values).relu()).relu())


def made_by(how: str, source: Path, target: Path, data: np.ndarray) -> Path:
    "QDQ and QOperator with static ranges, or dynamic; in seven bits, because processors without VNNI saturate with eight."
    from onnxruntime.quantization import QuantFormat, quantize_dynamic
    if how != "dynamic": return static(source, target, data, quant_format=QuantFormat[how], reduce_range=True)
    quantize_dynamic(source, target, reduce_range=True)
    return target


def moved_weight(file: Path, target: Path, like: str) -> Path:
    "The integers of one weight, moved along by a row."
    proto = onnx.load(file)
    shape = (32, 32)
    tensor = next(t for t in proto.graph.initializer if tuple(t.dims) == shape and t.data_type in (2, 3))
    value = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(np.roll(value, 1, 0 if like == "rows" else 1), tensor.name))
    onnx.save(proto, target)
    return target


@pytest.mark.parametrize("how", ["QDQ", "QOperator", "dynamic"])
def test_the_layer_of_a_quantised_file_is_located(how: str, tmp_path: Path) -> None:
    from fsdl_devinfra.parity.exporting import export
    torch.manual_seed(0)
    model, x = Three().eval(), torch.randn(64, 24)
    source = export(model, {"pixel_values": x[:2]}, tmp_path / "float.onnx").path
    healthy = made_by(how, source, tmp_path / "int8.onnx", x.numpy())
    report = check_reduced(model, healthy, "int8", {"pixel_values": x})
    assert report.verdict == "pass" and report.first_divergence is None, str(report)
    assert [x.module for x in report.layers if x.alone_db is not None][:2] == ["first", "second"]
    report = check_reduced(model, moved_weight(healthy, tmp_path / "bad.onnx", "rows"), "int8", {"pixel_values": x})
    assert report.verdict == "fail" and report.first_divergence is not None, str(report)
    assert report.first_divergence.module == "second", str(report)


@pytest.mark.parametrize("where", ["first", "second", "third"])
def test_the_layer_of_a_file_with_convolutions_that_hold_their_relu_is_located(where: str, tmp_path: Path) -> None:
    "In the QOperator form a convolution's integers are already clipped by the ReLU behind it. Its channels are turned round in one layer."
    from fsdl_devinfra.parity.exporting import export
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 6))
    x = torch.randn(48, 1, 8, 8)
    source = export(model.eval(), {"input": x[:2]}, tmp_path / "float.onnx").path
    healthy = static(source, tmp_path / "int8.onnx", x.numpy(), quant_format=QuantFormat.QOperator, reduce_range=True, name="input")
    report = check_reduced(model, healthy, "int8", {"input": x})
    assert report.verdict == "pass" and report.first_divergence is None, str(report)
    module = {"first": "0", "second": "2", "third": "4"}[where]
    proto = onnx.load(healthy)
    tensor = next(t for t in proto.graph.initializer if t.name == f"{module}.weight_quantized")
    tensor.CopyFrom(numpy_helper.from_array(np.roll(numpy_helper.to_array(tensor), 1, 0), tensor.name))
    onnx.save(proto, tmp_path / "bad.onnx")
    report = check_reduced(model, tmp_path / "bad.onnx", "int8", {"input": x})
    assert report.verdict == "fail" and report.first_divergence is not None, str(report)
    assert report.first_divergence.module == module, str(report)


def saturating(file: Path, x: np.ndarray, limit: int = 32767) -> np.ndarray:
    "What a QDQ file of `Three` gives where pairs of products of unsigned by signed bytes are kept in 16 bits (vpmaddubsw), or up to `limit`."
    graph = load_graph(file)
    made = {n.output[0]: n for n in graph.nodes}
    def floats(value: str) -> np.ndarray:
        node = made.get(value)
        if node is None: return x if value in graph.inputs else graph.array(value)
        if node.op_type == "DequantizeLinear":
            scale, zero = (graph.array(v).astype(np.float32) for v in node.input[1:3])
            return (integers(node.input[0]).astype(np.float32) - zero) * scale
        if node.op_type == "Relu": return np.maximum(floats(node.input[0]), 0)
        assert node.op_type == "Gemm", node.op_type
        b_last = any(t.name == "transB" and t.i for t in node.attribute)
        if any(v not in made or made[v].op_type != "DequantizeLinear" for v in node.input[:2]):
            x1, w1 = floats(node.input[0]), floats(node.input[1])
            return x1 @ (w1.T if b_last else w1) + floats(node.input[2])
        left, right = (made[v] for v in node.input[:2])
        a, b = (integers(n.input[0]).astype(np.int64) for n in (left, right))
        scales, zeros = ([graph.array(n.input[k]).astype(np.float64) for n in (left, right)] for k in (1, 2))
        b = b.T if b_last else b
        pairs = [np.clip(a[:, k:k + 2] @ b[k:k + 2], -limit - 1, limit) for k in range(0, a.shape[1], 2)] if not zeros[1].any() else [a @ b]
        summed = np.sum(pairs, 0) - zeros[0] * b.sum(0) - zeros[1] * a.sum(1, keepdims=True) + a.shape[1] * zeros[0] * zeros[1]
        return (summed * scales[0] * scales[1] + floats(node.input[2])).astype(np.float32)
    def integers(value: str) -> np.ndarray:
        if value in graph.initializers: return graph.array(value)
        node = made[value]
        scale, zero = (graph.array(v) for v in node.input[1:3])
        limits = np.iinfo(zero.dtype)
        return np.clip(np.rint(floats(node.input[0]) / scale) + zero, limits.min, limits.max).astype(zero.dtype)
    return floats(graph.outputs[0])


OLD = {"flags": ["avx", "avx2", "fma", "sse4_1"]}


@pytest.mark.parametrize(("how", "kinds"), [("saturates", {"saturation"}), ("new processor", set()), ("bad weight", {"conversion"})])
def test_saturation_without_vnni_is_named(how: str, kinds: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Bright images, weights of both signs, eight bits. Healthy beside it: the same file where VNNI is, and a file that is wrong on every processor."
    from onnxruntime.quantization import QuantType

    from fsdl_devinfra.parity import reduced
    from fsdl_devinfra.parity.backends import Backend, onnx_backend
    from fsdl_devinfra.parity.causes import EXACT_BYTES
    from fsdl_devinfra.parity.exporting import export
    torch.manual_seed(0)
    model, x = Three().eval(), 1 + 0.2 * torch.rand(64, 24)
    with torch.no_grad(): model.first.weight.copy_(torch.sign(torch.randn(32, 24)) * 0.2 + 0.01 * torch.randn(32, 24))
    source = export(model, {"pixel_values": x[:2]}, tmp_path / "float.onnx").path
    file = static(source, tmp_path / "int8.onnx", x.numpy(), activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)
    if how == "bad weight": file = moved_weight(file, tmp_path / "bad.onnx", "rows")
    old = how != "new processor"
    has_vnni = not set(EXACT_BYTES).isdisjoint(reduced.cpu()["flags"])
    def backend(data: bytes, *args: Any, **more: Any) -> Backend:
        if not old and has_vnni: return onnx_backend(data, *args, **more)
        (tmp_path / "here.onnx").write_bytes(data)
        limit = 32767 if old else 1 << 40  # this processor may itself be an old one
        return Backend("cpu", "CPUExecutionProvider", lambda feeds: {"output": saturating(tmp_path / "here.onnx", feeds["pixel_values"], limit)}, 1.0, [])
    monkeypatch.setattr(reduced, "onnx_backend", backend)
    monkeypatch.setattr(reduced, "cpu", lambda: OLD if old else {"flags": [*OLD["flags"], "avx512_vnni"]})
    report = check_reduced(model, file, "int8", {"pixel_values": x})
    assert report.verdict == ("fail" if kinds else "pass"), str(report)
    assert {c.kind for c in report.causes} == kinds, report.causes
    if "saturation" in kinds: assert "no VNNI" in report.causes[0].evidence and "reduce_range" in report.causes[0].evidence


@pytest.mark.parametrize("how", ["QDQ", "QOperator", "dynamic"])
def test_unsigned_weights_are_the_same_function(how: str, tmp_path: Path) -> None:
    "In each form, on this processor; with zero points that are moved the other way the outputs differ."
    from onnxruntime.quantization import QuantType

    from fsdl_devinfra.parity.causes import unsigned_weights
    from fsdl_devinfra.parity.exporting import export
    from fsdl_devinfra.parity.localization import run_graph
    torch.manual_seed(0)
    x = torch.randn(64, 24)
    source = export(Three().eval(), {"pixel_values": x[:2]}, tmp_path / "float.onnx").path
    unsigned = {"quant_format": QuantFormat.QOperator, "activation_type": QuantType.QUInt8, "reduce_range": True}
    file = static(source, tmp_path / "int8.onnx", x.numpy(), **unsigned) if how == "QOperator" else made_by(how, source, tmp_path / "int8.onnx", x.numpy())
    graph = load_graph(file)
    exact, count = unsigned_weights(graph)
    feeds = {"pixel_values": x.numpy()}
    want, got = (run_graph(g, feeds, level="all")["output"] for g in (graph, exact))
    assert count == 3 and np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
    zero = next(t for t in exact.proto.graph.initializer if t.name.endswith("::unsigned_zero"))
    zero.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(zero) - np.uint8(2), zero.name))
    assert np.abs(run_graph(exact, feeds, level="all")["output"] - want).max() > 0.01 * np.abs(want).max()


def test_a_file_that_was_not_reduced_is_not_judged_by_a_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    "A weight of a float file is off by 0.1 %: 60 dB, far within what int8 may lose."
    from fsdl_devinfra.parity.exporting import export
    torch.manual_seed(0)
    model, x = Three().eval(), torch.randn(64, 24)
    with torch.no_grad(): kept = model.second.weight.clone(); model.second.weight.mul_(1.001)
    file = export(model, {"pixel_values": x[:2]}, tmp_path / "float.onnx").path
    with torch.no_grad(): model.second.weight.copy_(kept)
    report = check_reduced(model, file, "int8", {"pixel_values": x})
    assert (report.verdict, report.status, report.causes[0].kind) == ("not-run", 2, "not reduced")
    assert "was not reduced" in str(report).splitlines()[0] and "check it without --as" in str(report)
