"Files for phones. A runtime that is made up runs everywhere; the real ones where they are installed, here or in LITERT_PYTHON and EXECUTORCH_PYTHON."
from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fsdl_devinfra.cli import main

FILES = Path(__file__).parent / "data" / "mobile"
NET = f"{FILES / 'net.py'}:Net"


def ran(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    status = main(["onnx", "check", *map(str, args), "--json"])
    return status, json.loads(capsys.readouterr().out)


#: in place of the interpreter: the module itself, one image at a time with its channels last; the file says what is wrong with it
MADE_UP = f"""
import os, signal, sys
import numpy as np, torch
sys.path.insert(0, {str(FILES)!r})
from net import Net
class Interpreter:
    def __init__(self, model_path, num_threads=None):
        self.how = open(model_path).read()
        if self.how == "crash at once": os.kill(os.getpid(), signal.SIGSEGV)
        if self.how == "no file": raise ValueError("Model provided has model identifier 'no f'")
        print("INFO: this must not fall among the messages"); os.write(1, b"nor this\\n")
        self.net, self.given = Net(0.05 if self.how == "wrong" else 0.0).eval(), {{}}
        scale = (1 / 32, 0) if self.how == "int8" else (0.0, 0)
        port = lambda name, index, shape, kind=np.float32, scale=(0.0, 0): {{"name": name, "index": index, "shape": np.array(shape), "shape_signature": np.array(shape), "dtype": kind, "quantization": scale}}
        n = 2 if self.how == "two" else 1
        self.inputs = [port("in0", 0, [n, 8, 8, 3], np.int8 if self.how == "int8" else np.float32, scale), port("in1", 1, [n, 4])]
        self.outputs = [port("out0", 2, [1, 5]), port("out1", 3, [1, 4])]
    def allocate_tensors(self): pass
    def get_signature_list(self): return {{}}
    def get_input_details(self): return self.inputs
    def get_output_details(self): return self.outputs
    def get_tensor_details(self): return self.inputs + self.outputs
    def get_tensor(self, index): return self.given[index] if index > 1 else np.zeros(self.inputs[index]["shape"])
    def set_tensor(self, index, value): self.given[index] = value
    def invoke(self):
        if self.how == "crash": os.kill(os.getpid(), signal.SIGSEGV)
        image = torch.from_numpy(self.given[0].astype(np.float32) / (32 if self.how == "int8" else 1)).permute(0, 3, 1, 2)
        with torch.no_grad(): self.given[2], self.given[3] = (v.numpy() for v in self.net(image, torch.from_numpy(self.given[1])))
"""


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "there" / "ai_edge_litert").mkdir(parents=True)
    (tmp_path / "there" / "ai_edge_litert" / "__init__.py").write_text("")
    (tmp_path / "there" / "ai_edge_litert" / "interpreter.py").write_text(MADE_UP)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path / "there"), os.environ.get("PYTHONPATH")])))
    return tmp_path


def file_of(folder: Path, how: str) -> Path:
    (folder / "m.tflite").write_text(how)
    return folder / "m.tflite"


def test_one_image_at_a_time_with_channels_last(made_up: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, document = ran(capsys, NET, file_of(made_up, "right"))
    assert (status, document["verdict"], document["coverage"]["batches"]) == (0, "pass", [1, 2]), document
    notes = document["cases"][0]["notes"]
    assert any("one by one" in n for n in notes) and any("channels last" in n for n in notes) and document["cases"][0]["provider_used"].startswith("LiteRT")
    assert ran(capsys, NET, file_of(made_up, "wrong"))[0] == 1


def test_a_file_for_two_samples(made_up: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    "One sample alone, which nobody gave, made it `not-run`. With Python's safe path the first folder of PYTHONPATH is not the working folder."
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    status, document = ran(capsys, NET, file_of(made_up, "two"))
    assert (status, document["verdict"], document["coverage"]["batches"]) == (0, "pass", [2]), document
    assert "the file takes the number of samples of the example only" in document["cases"][0]["notes"]


def test_a_quantised_input_is_fed_and_said(made_up: Path, capsys: pytest.CaptureFixture[str]) -> None:
    "Thirty-seconds survive the scale of the file: nothing is lost, so it passes; others do not."
    image = np.random.default_rng(0).integers(-64, 64, (2, 3, 8, 8)).astype(np.float32) / 32
    for name, values, wanted in (("exact", image, 0), ("rounded", image + 0.01, 1)):
        np.savez(made_up / f"{name}.npz", image=values.astype(np.float32), scale=np.ones((2, 4), np.float32))
        status, document = ran(capsys, NET, file_of(made_up, "int8"), "--inputs", made_up / f"{name}.npz")
        assert status == wanted and any("holds int8: it was reduced on purpose" in n for n in document["cases"][0]["notes"]), document


@pytest.mark.parametrize(("how", "status", "told"), [("crash at once", 2, "ended by signal 11"), ("no file", 2, "cannot be loaded"), ("crash", 1, "ended by signal 11")])
def test_a_runtime_that_dies_is_a_sentence(made_up: Path, how: str, status: int, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    got, document = ran(capsys, NET, file_of(made_up, how))
    assert got == status and told in (document.get("error") or document["cases"][0]["notes"][0]), document


def test_inputs_of_another_size_are_no_fault(made_up: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(made_up / "large.npz", image=np.ones((1, 3, 16, 16), np.float32), scale=np.ones((1, 4), np.float32))
    status, document = ran(capsys, NET, file_of(made_up, "right"), "--inputs", made_up / "large.npz")
    assert (status, document["verdict"]) == (2, "not-run") and "--inputs of the sizes" in document["hint"]


@pytest.mark.skipif(sys.platform == "win32", reason="programs of Unix")
@pytest.mark.parametrize(("python", "told"), [("echo", "echo ended with status 0 before it opened"), ("false", "false ended with status 1 before it opened")])
def test_what_is_no_python_with_numpy_is_a_sentence(python: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, document = ran(capsys, NET, FILES / "net.tflite", "--python", python)
    assert status == 2 and told in document["error"] and "numpy" in document["hint"], document


@pytest.mark.parametrize(("name", "hint"), [("net.tflite", "fsdl-devinfra[litert]"), ("net.pte", "pip install executorch")])
def test_without_the_runtime_exit_2_and_what_to_install(name: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("ai_edge_litert", "tflite_runtime", "tensorflow", "executorch"): (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('{package} is not here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    status, document = ran(capsys, NET, FILES / name)
    assert status == 2 and name in document["error"] and hint in document["hint"]


def test_options_that_say_nothing_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for args, told in (((NET, FILES / "net.tflite", "--as", "int8"), "--as does not go with"), ((NET, FILES / "net.pte", "--provider", "cpu"), "--provider does not go with"), ((NET, "m.onnx", "--python", "python"), "--python does not go with .onnx")):
        status, document = ran(capsys, *args)
        assert status == 2 and told in document["error"], document


def interpreter(module: str, variable: str) -> str:
    if named := os.environ.get(variable): return named
    if importlib.util.find_spec(module) is None: pytest.skip(f"{module} is not installed, and {variable} names no interpreter that has it")
    return sys.executable


@pytest.mark.parametrize(("kind", "module", "variable"), [("tflite", "ai_edge_litert", "LITERT_PYTHON"), ("pte", "executorch", "EXECUTORCH_PYTHON")])
def test_real_files(kind: str, module: str, variable: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    python = interpreter(module, variable)
    for net in (NET, NET.replace(":Net", ":Bare")):  # the second has no example inputs: the file says what it takes
        status, document = ran(capsys, net, FILES / f"net.{kind}", "--python", python)
        assert (status, document["verdict"]) == (0, "pass") and "--python" in document["command"], document
    status, document = ran(capsys, NET, FILES / f"wrong.{kind}", "--python", python)
    assert status == 1 and [o["verdict"] for o in document["cases"][0]["outputs"]] == ["fail", "pass"]  # the second output is before the weight
    (tmp_path / f"cut.{kind}").write_bytes((FILES / f"net.{kind}").read_bytes()[:1000])
    status, document = ran(capsys, NET, tmp_path / f"cut.{kind}", "--python", python)
    assert status == 2 and "Traceback" not in document["error"], document


def test_a_file_whose_batch_is_free(capsys: pytest.CaptureFixture[str]) -> None:
    status, document = ran(capsys, NET, FILES / "net-free.pte", "--python", interpreter("executorch", "EXECUTORCH_PYTHON"))
    assert status == 0 and not any("one by one" in n for n in document["cases"][0]["notes"])


def test_a_file_in_int8_is_said_to_be_reduced(capsys: pytest.CaptureFixture[str]) -> None:
    status, document = ran(capsys, NET, FILES / "net-int8.tflite", "--python", interpreter("ai_edge_litert", "LITERT_PYTHON"))
    assert status == 1 and any("reduced on purpose" in n for n in document["cases"][0]["notes"])
