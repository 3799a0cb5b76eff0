"`onnx export` and `onnx check` as a user or a script meets them: a process, its exit status and its JSON."
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from fsdl_devinfra.parity.graph import load_graph

KEYS = {"verdict", "cases", "first_divergence", "causes", "schema"}


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path: return tmp_path_factory.mktemp("command")


def ran(room: Path, *args: str, **environment: str) -> tuple[int, dict[str, Any], str]:
    "(exit status, the JSON document, standard error)"
    done = subprocess.run([sys.executable, "-c", "import sys; from fsdl_devinfra.cli import main; sys.exit(main())", "onnx", *args, "--json"], capture_output=True, text=True, timeout=600, cwd=room,
                          env=os.environ | {"XDG_CACHE_HOME": str(room / "cache"), "HF_HUB_OFFLINE": "1"} | environment)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def digits(room: Path) -> Path:
    status, document, _ = ran(room, "export", "-o", "digits")
    assert status == 0 and [p["name"] for p in document["outputs"]] == ["logits"]
    return room / "digits" / "model.onnx"


def changed(file: Path, name: str, change: Callable[[Any], Any]) -> tuple[Path, set[str]]:
    "A changed copy, and the nodes of the operator that was changed."
    proto = onnx.load(file)
    culprit = change(proto.graph)
    onnx.save(proto, file.with_name(name))
    graph = load_graph(file)
    fx = next((o.fx for n, o in zip(graph.nodes, graph.origins) if n.name == culprit and o is not None), "")
    return file.with_name(name), {graph.nodes[i].name for i in graph.units().get(fx, [])}


def test_zero_where_it_holds(room: Path, digits: Path) -> None:
    status, document, _ = ran(room, "check", "builtin:digits", str(digits))
    assert (status, document["verdict"], document["first_divergence"], document["causes"]) == (0, "pass", None, [])
    assert set(document) >= KEYS and [c["shapes"]["pixel_values"][0] for c in document["cases"]] == [2, 1, 3, 4]
    for case in document["cases"]:
        assert set(case) >= {"provider", "provider_used", "precision", "shapes", "verdict", "outputs"} and case["provider_used"] == "CPUExecutionProvider"
        assert all(set(o) >= {"name", "max_abs", "error", "reference_error", "ratio"} for o in case["outputs"])


def gelu(g: Any) -> str:
    node = next(n for n in g.node if n.op_type == "Gelu")
    node.attribute.append(helper.make_attribute("approximate", "tanh")) if not node.attribute else node.attribute[0].CopyFrom(helper.make_attribute("approximate", "tanh"))
    return node.name


def weight(g: Any) -> str:
    node = [n for n in g.node if n.op_type == "MatMul"][5]
    tensor = next(t for t in g.initializer if t.name in node.input)
    value = numpy_helper.to_array(tensor).copy(); value[3, 4] += 0.05
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return node.name


def not_a_number(g: Any) -> str:
    tensor = next(t for t in g.initializer if t.name == "head.bias")
    value = numpy_helper.to_array(tensor).copy(); value[7] = np.nan
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return next(n.name for n in g.node if "head.bias" in n.input)


@pytest.mark.parametrize(("plant", "kind"), [pytest.param(gelu, "operator semantics", id="gelu"), pytest.param(weight, "weight", marks=pytest.mark.slow, id="weight"), pytest.param(not_a_number, "weight", marks=pytest.mark.slow, id="nan")])
def test_one_where_it_fails(room: Path, digits: Path, plant: Callable[[Any], str], kind: str) -> None:
    file, culprits = changed(digits, f"{plant.__name__}.onnx", plant)
    status, document, _ = ran(room, "check", "builtin:digits", str(file), "-o", "report.html")
    assert (status, document["verdict"]) == (1, "fail")
    assert set(document["first_divergence"]) >= {"value", "onnx_node", "op", "module", "source", "isolated_error", "cumulative_error"}
    assert document["first_divergence"]["onnx_node"] in culprits, (document["first_divergence"], culprits)
    assert kind in {c["kind"] for c in document["causes"]}, document["causes"]
    assert "<svg" in (room / "report.html").read_text()


def test_two_where_it_cannot_be_checked(room: Path, digits: Path) -> None:
    status, document, _ = ran(room, "check", "builtin:digits", str(digits), "--provider", "cpu", "--provider", "cuda")
    assert (status, document["verdict"]) == (2, "not-run") and "CUDAExecutionProvider" in document["error"] and "fsdl-devinfra[onnx-gpu]" in document["hint"]
    assert [(c["verdict"], c["provider_used"]) for c in document["cases"][:2]] == [("pass", "CPUExecutionProvider"), ("not-run", None)]
    assert {c["kind"] for c in document["causes"]} == {"absent provider"}
    (room / "text.onnx").write_text("no model")
    for args, word in ((("check", "builtin:digits", "nowhere.onnx"), "there is no file"), (("check", "builtin:digits", "text.onnx"), "is not an ONNX file"), (("check", "./no-model", str(digits)), "no-model")):
        status, document, _ = ran(room, *args)
        assert status == 2 and set(document) >= {"error", "hint"} and word in document["error"], document


@pytest.mark.slow
def test_a_fixed_size_is_a_failure_where_the_module_is_free(room: Path, digits: Path) -> None:
    "`--shapes` speaks of the module's dimensions too: a file that has baked one in fails, it is not excused."
    def fix(g: Any) -> str:
        g.input[0].type.tensor_type.shape.dim[0].dim_value = 2
        return ""
    file, _ = changed(digits, "fixed.onnx", fix)
    assert ran(room, "check", "builtin:digits", str(file))[0] == 0  # at its own size it is right
    status, document, _ = ran(room, "check", "builtin:digits", str(file), "--shapes", "batch=2,5")
    assert status == 1 and [c["verdict"] for c in document["cases"]] == ["pass", "fail"] and {c["kind"] for c in document["causes"]} == {"baked shape"}
    status, document, _ = ran(room, "check", "builtin:digits", str(file), "--shapes", "depth=2")
    assert status == 2 and "no free dimension depth" in document["error"]


@pytest.mark.slow
def test_the_reference_is_kept_and_never_trusted_blindly(room: Path, digits: Path) -> None:
    kept = room / "cache" / "fsdl-devinfra" / "parity"
    for f in kept.glob("*") if kept.exists() else (): f.unlink()
    assert ran(room, "check", "builtin:digits", str(digits), "--no-cache")[0] == 0 and not (kept.exists() and list(kept.iterdir()))
    first = ran(room, "check", "builtin:digits", str(digits))[1]
    files = sorted(kept.iterdir())
    assert len(files) == 4  # a set of inputs each
    for f in files: f.write_bytes(f.read_bytes()[:100])
    assert ran(room, "check", "builtin:digits", str(digits))[1]["cases"] == first["cases"]
    assert sorted(kept.iterdir()) == files and all(f.stat().st_size > 100 for f in files)


def test_the_file_names_no_folder_of_the_machine(digits: Path) -> None:
    "Nor does the report's blame suffer: it still names file and line."
    data = digits.read_bytes()
    here = {str(Path(__file__).resolve().parents[1]), str(Path(torch.__file__).parent), str(Path.home()), str(digits.parent)}
    assert not [p for p in here if p.encode() in data]
    graph = load_graph(digits)
    traces = [p.value for n in graph.nodes for p in n.metadata_props if p.key.endswith("stack_trace")]
    assert traces and not re.search(r'File "(/|[A-Za-z]:|[^"]*\.\.)', "".join(traces))
    assert "fsdl_devinfra/hub/digits.py" in {o.source.split(":")[0] for o in graph.origins if o is not None and o.source}


@pytest.mark.slow
def test_the_same_export_is_the_same_file(room: Path, digits: Path) -> None:
    assert ran(room, "export", "-o", "again")[0] == 0
    assert (room / "again" / "model.onnx").read_bytes() == digits.read_bytes()


TIMM = '''"Stands in for timm: what the loader and the exporter use of it."
from torch import nn
class Stand(nn.Module):
    default_cfg = {"input_size": (3, 16, 16)}
    def __init__(self, num_classes):
        super().__init__()
        self.conv_stem, self.bn1, self.classifier = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.Linear(8, num_classes)
    def forward(self, x): return self.classifier(self.bn1(self.conv_stem(x)).relu().mean((2, 3)))
def is_model(name): return name == "stand_in"
def create_model(name, pretrained=False, num_classes=1000, **kwargs):
    assert name == "stand_in" and not pretrained
    return Stand(num_classes)
'''


@pytest.fixture(scope="module")
def timm_folder(room: Path) -> Path:
    from safetensors.torch import save_file
    (room / "lib").mkdir(); (room / "timm-model").mkdir()
    (room / "lib" / "timm.py").write_text(TIMM)
    namespace: dict[str, Any] = {"__name__": "timm"}
    exec(TIMM, namespace)
    torch.manual_seed(0)
    save_file(namespace["Stand"](4).state_dict(), room / "timm-model" / "model.safetensors")
    (room / "timm-model" / "config.json").write_text(json.dumps({"architecture": "stand_in", "num_classes": 4, "pretrained_cfg": {}}))
    return room / "timm-model"


@pytest.mark.slow
def test_timm_is_imported_where_a_model_is_one(room: Path, timm_folder: Path) -> None:
    "With a stand-in: timm itself is not among the development requirements."
    path = os.pathsep.join(p for p in (str(room / "lib"), os.environ.get("PYTHONPATH", "")) if p)
    status, document, _ = ran(room, "export", str(timm_folder), "-o", "timm-out", PYTHONPATH=path)
    assert status == 0 and [(p["name"], p["shape"][:2]) for p in document["inputs"]] == [("x", ["batch", 3])], document
    assert ran(room, "check", str(timm_folder), "timm-out", PYTHONPATH=path)[0] == 0


@pytest.mark.slow
def test_without_timm_a_sentence(room: Path, timm_folder: Path) -> None:
    (room / "none").mkdir()
    (room / "none" / "timm.py").write_text("raise ModuleNotFoundError(\"No module named 'timm'\", name='timm')")
    status, document, _ = ran(room, "export", str(timm_folder), "-o", "timm-none", PYTHONPATH=str(room / "none"))
    assert status == 2 and "timm" in document["error"] and document["hint"], document
