"ONNX Runtime Web: in a real browser where there is one, else in node; skipped where neither or the npm package is here."
from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper

from fsdl_devinfra.cli import main
from fsdl_devinfra.core.errors import CheckError
from fsdl_devinfra.parity import check, export
from fsdl_devinfra.parity.browser import WebSession, find_browser, web_package

BUILT = Path(__file__).parents[1] / "build" / "node_modules" / "onnxruntime-web"  # `make web`


def ran(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    status = main(["onnx", "check", "builtin:digits", *args, "--json"])
    return status, json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("web")
    assert main(["onnx", "export", "-o", str(folder)]) == 0
    return folder / "model.onnx"


@pytest.fixture(scope="module")
def wrong(file: Path) -> Path:
    "One weight of one layer is changed."
    proto = onnx.load(file)
    node = [n for n in proto.graph.node if n.op_type == "MatMul"][5]
    tensor = next(t for t in proto.graph.initializer if t.name in node.input)
    value = numpy_helper.to_array(tensor).copy(); value[3, 4] += 0.05
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    onnx.save(proto, file.with_name("wrong.onnx"))
    return file.with_name("wrong.onnx")


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Path:
    if BUILT.is_dir() and not os.environ.get("ONNXRUNTIME_WEB"): monkeypatch.setenv("ONNXRUNTIME_WEB", str(BUILT))
    try: return web_package()
    except CheckError as e: pytest.skip(str(e))


@pytest.fixture
def chromium(package: Path) -> str:
    return find_browser() or pytest.skip("no Chromium: on Debian, apt install chromium")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    "A folder that looks like the npm package, and a browser that does nothing but live."
    (tmp_path / "npm" / "dist").mkdir(parents=True)
    (tmp_path / "npm" / "dist" / "ort.wasm.min.mjs").write_text("")
    program = tmp_path / "browser"
    program.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nsleep 300\n"); program.chmod(0o755)
    monkeypatch.setenv("ONNXRUNTIME_WEB", str(tmp_path / "npm")); monkeypatch.setenv("CHROME_PATH", str(program))
    return tmp_path


def test_a_healthy_file_in_a_browser(file: Path, chromium: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, document = ran(capsys, str(file), "--provider", "web", "--latency", "5")
    assert (status, document["verdict"]) == (0, "pass"), document
    used = {c["provider_used"] for c in document["cases"]}
    assert len(used) == 1 and used.pop().startswith(f"onnxruntime-web {json.loads((web_package() / 'package.json').read_text())['version']} wasm in Chrome")
    assert document["coverage"]["batches"] == [1, 2, 3, 4] and document["latency"][1]["p50_seconds"] > 0


def test_a_changed_weight_fails_in_a_browser_and_is_found(wrong: Path, chromium: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, document = ran(capsys, str(wrong), "--provider", "web")
    assert (status, document["verdict"], {c["verdict"] for c in document["cases"]}) == (1, "fail", {"fail"})
    assert document["first_divergence"]["op"] == "aten.linear.default" and "weight" in {c["kind"] for c in document["causes"]}


OFF = """
import * as real from "./real.mjs";
export const {Tensor, env} = real;
const create = async (...how) => {
  const s = await real.InferenceSession.create(...how);
  const run = async feeds => { const got = await s.run(feeds); got.logits.data[3] += 0.01; return got; };
  return {inputNames: s.inputNames, outputNames: s.outputNames, inputMetadata: s.inputMetadata, run};
};
export const InferenceSession = {create};
"""


@pytest.mark.slow
def test_a_fault_that_only_the_browser_has(file: Path, chromium: str, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    "A runtime that adds 0.01 to one value: the file is right on the CPU, and wrong there."
    (tmp_path / "dist").mkdir()
    for part in (package / "dist").glob("ort-wasm*"): (tmp_path / "dist" / part.name).symlink_to(part)
    shutil.copy(package / "dist" / "ort.wasm.min.mjs", tmp_path / "dist" / "real.mjs")
    (tmp_path / "dist" / "ort.wasm.min.mjs").write_text(OFF)
    monkeypatch.setenv("ONNXRUNTIME_WEB", str(tmp_path))
    status, document = ran(capsys, str(file), "--provider", "cpu", "--provider", "web")
    verdicts = {(c["provider"], c["verdict"]) for c in document["cases"]}
    assert status == 1 and {("cpu", "pass"), ("web", "fail")} <= verdicts and ("cpu", "fail") not in verdicts


@pytest.mark.slow
def test_node_where_there_is_no_browser_says_so(file: Path, wrong: Path, package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which("node") is None: pytest.skip("node is not installed")
    monkeypatch.setenv("CHROME_PATH", "no-browser")
    status, document = ran(capsys, str(file), "--provider", "web")
    assert status == 0 and all(c["provider_used"].endswith("not a browser") for c in document["cases"])
    assert any("not by a browser" in note for note in document["cases"][0]["notes"])
    assert ran(capsys, str(wrong), "--provider", "web")[0] == 1
    status, document = ran(capsys, str(file), "--provider", "web-webgpu")
    assert status == 2 and "node has no WebGPU" in document["error"]


@pytest.mark.slow
def test_webgpu_runs_or_says_why_not(file: Path, wrong: Path, chromium: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, document = ran(capsys, str(file), "--provider", "web-webgpu")
    if status == 2:
        assert "offers no WebGPU adapter" in document["error"] and "--provider web" in document["hint"]
        return
    assert status == 0 and all(" webgpu " in c["provider_used"] for c in document["cases"]), document
    assert ran(capsys, str(wrong), "--provider", "web-webgpu")[0] == 1


@pytest.mark.slow
def test_weights_beside_the_file(tmp_path: Path, package: Path) -> None:
    if not (find_browser() or shutil.which("node")): pytest.skip("neither a browser nor node is here")
    net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8)).eval()
    made = export(net, {"input": torch.randn(2, 64)}, tmp_path / "m.onnx", external_over=1000)
    assert sorted(made.files) == ["m.onnx", "m.onnx.data"]
    assert check(net, tmp_path / "m.onnx", {"input": torch.randn(3, 64)}, ["web"]).verdict == "pass"
    with torch.no_grad(): net[2].weight[0, 0] += 0.01
    assert check(net, tmp_path / "m.onnx", {"input": torch.randn(3, 64)}, ["web"]).verdict == "fail"


def test_without_the_package_exit_2_and_what_to_install(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("ONNXRUNTIME_WEB", raising=False); monkeypatch.chdir(tmp_path)
    status, document = ran(capsys, str(file), "--provider", "web")
    assert (status, document["verdict"]) == (2, "not-run") and "npm install onnxruntime-web" in document["hint"]


def test_without_browser_and_node_exit_2_and_what_to_install(file: Path, fake: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CHROME_PATH", "no-browser"); monkeypatch.setenv("PATH", str(fake / "npm"))
    status, document = ran(capsys, str(file), "--provider", "web")
    assert (status, document["verdict"]) == (2, "not-run") and "no Chromium or Chrome" in document["error"] and "apt install chromium" in document["hint"]


def lives(pid: int) -> bool:
    try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError: return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_an_interruption_ends_the_browser_and_removes_its_profile(file: Path, fake: Path) -> None:
    (fake / "tmp").mkdir()
    line = [sys.executable, "-c", "import sys; from fsdl_devinfra.cli import main; sys.exit(main())", "onnx", "check", "builtin:digits", str(file), "--provider", "web"]
    done = subprocess.Popen(line, env=os.environ | {"TMPDIR": str(fake / "tmp")}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while not ((fake / "pid").is_file() and (fake / "pid").read_text().strip()):
        assert time.monotonic() < end and done.poll() is None, done.stderr
        time.sleep(0.1)
    pid = int((fake / "pid").read_text())
    assert lives(pid) and list((fake / "tmp").glob("onnxruntime-web-*"))
    done.send_signal(signal.SIGINT)
    assert done.wait(60) == 130 and "Traceback" not in done.stderr.read()
    assert not lives(pid) and not list((fake / "tmp").glob("onnxruntime-web-*"))


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("way", ["leaves", "stays"])
def test_a_program_that_leaves_a_browser_behind(way: str, fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "A script may start a browser and leave: the browser lived on."
    (fake / "browser").write_text(f"#!/bin/sh\nsleep 300 &\necho $! > {fake}/pid\n{'exit 0' if way == 'leaves' else 'wait'}\n")
    monkeypatch.setattr("fsdl_devinfra.parity.browser.START", 2.0)
    with pytest.raises(CheckError, match="ended with status 0" if way == "leaves" else "gave no answer in 2 s"): WebSession(b"")
    assert not lives(int((fake / "pid").read_text()))


@pytest.mark.parametrize("lost", ["ort.wasm.min.mjs", "browser"])
def test_nothing_stays_where_a_session_does_not_start(lost: str, fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "A package without its runtime, or a program that is none: the server and the profile stayed."
    if lost == "browser": (fake / "browser").write_bytes(b"\x7fELF")
    else: (fake / "npm" / "dist" / lost).rename(fake / "npm" / "dist" / "ort.other.mjs")
    monkeypatch.setattr("tempfile.tempdir", str(fake))
    with pytest.raises(CheckError, match="does not start" if lost == "browser" else "this onnxruntime-web has no"): WebSession(b"")
    assert not list(fake.glob("onnxruntime-web-*")) and "onnxruntime-web" not in {t.name for t in threading.enumerate()}
