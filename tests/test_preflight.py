"""`fsdl-devinfra preflight` as a user meets it: one process, its files, its exit status and its sentences."""
from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

STEPS = ["inspect", "lock", "load", "memory", "export", "parity", "environment"]
FILES = ["env.json", "model.lock.json", "model.onnx", "report.html", "report.json"]


def flip(path: Path, offset: int = -5000) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """One whole run on the embedded model, shared by the tests that only look."""
    out = tmp_path_factory.mktemp("run") / "deep" / "report"
    done = subprocess.run([sys.executable, "-m", "fsdl_devinfra", "preflight", "--json", "-o", out], capture_output=True, text=True, timeout=240)
    return out, done


def test_whole_way(finished):
    out, done = finished
    document = json.loads(done.stdout)  # one JSON document and nothing else
    assert done.returncode == 0 and document["verdict"] == "pass", done.stderr
    assert [s["name"] for s in document["steps"]] == STEPS
    assert all(set(s) >= {"name", "verdict", "seconds", "result"} for s in document["steps"])
    assert sorted(p.name for p in out.iterdir()) == FILES
    for step in STEPS: assert re.search(rf"pass\s+{step}\b", done.stderr), f"no verdict line for {step}"


def test_report_is_self_contained(finished):
    html = (finished[0] / "report.html").read_text()
    assert html.count("<svg") >= 2  # memory bars and the parity plot
    assert not re.search(r"<script|<link|<img|@import|url\(|src=", html)


def test_report_shows_what_failed(tmp_path):
    "A model that is too large for the GPU: the page has the bars and what would make it fit, not only the sentence."
    from fsdl_devinfra.core.charts import Chart
    from fsdl_devinfra.preflight import PreflightContext, report_html, run_step, PreflightReport
    from fsdl_devinfra.core.device_table import find_device
    from fsdl_devinfra.memory import Architecture, estimate
    device = find_device("t4")
    f = estimate(Architecture.from_numbers(32, 4096, 32, 32000), device=device)
    assert f.fits == "no" and isinstance(f.chart(), Chart)
    run = PreflightContext("m<b>", tmp_path, tmp_path, [device], quiet=True)
    run_step(run, "memory", lambda run: (False, f.verdict(), f))
    page = report_html(PreflightReport("m<b>", device.to_dict(), 1, run.steps), run.found)
    assert "<svg" in page and "memory" not in run.made and "<b>" not in page.split("</head>")[1]


def test_parity_is_on_every_held_out_image(finished):
    parity = json.loads((finished[0] / "report.json").read_text())["steps"][5]["result"]
    output = parity["cases"][0]["outputs"][0]
    assert parity["cases"][0]["provider_used"] == "CPUExecutionProvider"
    assert parity["cases"][0]["shapes"]["pixel_values"] == [360, 1, 8, 8]
    assert output["top1"] == 1.0 and 0 < output["max_abs"] < 1e-3


def test_text_output_leads_with_the_verdict(cli, tmp_path, digits):
    ran = cli("preflight", digits, "-o", tmp_path / "out")
    assert ran.status == 0 and ran.out.startswith("pass: ")


def test_flipped_byte_against_an_earlier_run(cli, tmp_path, digits):
    assert cli("preflight", digits, "-o", tmp_path / "out").status == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    flip(digits / "model.safetensors")
    ran = cli("preflight", digits, "-o", tmp_path / "out", "--json")
    steps = {s["name"]: s for s in ran.json["steps"]}
    assert ran.status == 1 and steps["lock"]["verdict"] == "fail"
    assert "model.safetensors" in steps["lock"]["summary"]
    assert {steps[n]["verdict"] for n in ("load", "memory", "export", "parity")} == {"not-run"}
    assert (tmp_path / "out" / "model.lock.json").read_bytes() == before["model.lock.json"]  # the lock is not taken back
    assert "Traceback" not in ran.err


def test_flipped_byte_against_a_given_lock(cli, tmp_path, digits):
    assert cli("hub", "lock", digits, "-o", tmp_path / "my.lock.json").status == 0
    flip(digits / "model.safetensors", -1)
    ran = cli("preflight", digits, "--lock", tmp_path / "my.lock.json", "-o", tmp_path / "out")
    assert ran.status == 1 and "my.lock.json" in ran.out and "Traceback" not in ran.err


def test_the_embedded_model_ships_with_a_lock_that_holds(cli):
    from fsdl_devinfra.hub import ModelLock, builtin_folder, verify
    assert verify(ModelLock.load(builtin_folder().with_suffix(".lock.json")), builtin_folder(), full=True).ok


def test_missing_config(cli, tmp_path, digits):
    (digits / "config.json").unlink()
    ran = cli("preflight", digits, "-o", tmp_path / "out")
    assert ran.status == 2 and "config.json is missing" in ran.sentence() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", ["[1, 2]", "{not json", '{"architectures": ["NoSuchModel"]}', "{}"])
def test_unusable_config(cli, tmp_path, digits, config):
    (digits / "config.json").write_text(config)
    ran = cli("preflight", digits, "-o", tmp_path / "out", "--json")
    assert ran.status == 2 and "Traceback" not in ran.err
    document = ran.json
    assert document.get("error") or {s["verdict"] for s in document["steps"]} >= {"not-run"}


def test_unknown_gpu_names_the_close_ones(cli, tmp_path):
    ran = cli("preflight", "--gpu", "h1000", "-o", tmp_path / "out")
    assert ran.status == 2 and "H100-SXM-80GB" in ran.sentence() and not (tmp_path / "out").exists()
    assert cli("preflight", "--gpu", "h1000", "--json").json.keys() == {"error", "hint"}


def test_no_such_model(cli, tmp_path):
    ran = cli("preflight", tmp_path / "nothing", "-o", tmp_path / "out")
    assert ran.status == 2 and "nothing" in ran.sentence()


def test_unwritable_output_is_found_before_any_work(cli, tmp_path):
    (tmp_path / "file").write_text("in the way")
    start = time.monotonic()
    ran = cli("preflight", "-o", tmp_path / "file" / "out")
    assert ran.status == 2 and "cannot write to" in ran.sentence() and "inspect" not in ran.err
    assert time.monotonic() - start < 5


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_output(cli, tmp_path):
    (tmp_path / "ro").mkdir(mode=0o500)
    assert cli("preflight", "-o", tmp_path / "ro").status == 2


def test_a_full_disk_is_one_sentence(cli, tmp_path):
    if not Path("/dev/full").exists(): pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "fsdl_devinfra", "hub", "inspect", "--json"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_no_room_for_the_report(tmp_path, digits):
    """A limit on file sizes stands for the full disk: the ONNX file does not fit, and nothing is left behind."""
    out = tmp_path / "out"
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); from fsdl_devinfra.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", limited, "preflight", digits, "-o", out], capture_output=True, text=True, timeout=240)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "File too large" in done.stderr + done.stdout
    assert not (out / "model.onnx").exists() and not list(out.glob(".*"))


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_leaves_nothing_half_written(tmp_path, digits, stop):
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-m", "fsdl_devinfra", "preflight", str(digits), "-o", str(out)],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:  # in the middle of the work
        if "… load" in line: break
    process.send_signal(stop)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err
    assert not out.exists() or not list(out.iterdir())


def test_without_the_extras_the_rest_still_runs(tmp_path, digits):
    """torch and ONNX hidden as if they were not installed: four steps run, three say what to install."""
    block = tmp_path / "block"
    for name in ("torch", "onnx", "onnxruntime", "onnxscript"):
        (block / name).mkdir(parents=True)
        (block / name / "__init__.py").write_text(f"raise ModuleNotFoundError(\"No module named '{name}'\", name='{name}')\n")
    done = subprocess.run([sys.executable, "-m", "fsdl_devinfra", "preflight", digits, "-o", tmp_path / "out", "--json"],
                          env=os.environ | {"PYTHONPATH": str(block)}, capture_output=True, text=True, timeout=120)
    steps = {s["name"]: s for s in json.loads(done.stdout)["steps"]}
    assert done.returncode == 2, done.stderr
    assert json.loads(done.stdout)["hint"] == "pip install 'fsdl-devinfra[torch]'" and "torch is needed" in json.loads(done.stdout)["error"]
    assert {n for n, s in steps.items() if s["verdict"] == "pass"} == {"inspect", "lock", "memory", "environment"}
    for name in ("load", "export", "parity"):
        assert steps[name]["verdict"] == "not-run" and "pip install 'fsdl-devinfra[" in steps[name]["summary"], steps[name]
    shutil.rmtree(block)


def test_another_model_than_the_embedded_one(cli, tmp_path, digits):
    """A model of the same class with other sizes and weights, from a folder without held-out images."""
    import torch
    from fsdl_devinfra.hub.digits import DigitsViT
    torch.manual_seed(1)
    model = DigitsViT(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48)
    folder = tmp_path / "other"
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["DigitsViT"], "model_type": "digits-vit"}
    (folder / "config.json").write_text(json.dumps(config))
    ran = cli("preflight", folder, "-o", tmp_path / "out", "--json")
    assert ran.status == 0, ran.err
    assert ran.json["steps"][0]["result"]["tensors"]["parameters"] == sum(p.numel() for p in model.parameters())


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    """A folder that a loopback Hub serves: the embedded model as `org/digits`."""
    shelf = tmp_path_factory.mktemp("shelf")
    shutil.copytree(Path(__file__).parents[1] / "fsdl_devinfra" / "models" / "digits", shelf / "org" / "digits")
    return shelf


def test_a_model_on_a_hub(cli, tmp_path, shelf):
    """Locked, fetched with its hashes checked, and then the same way as a folder; the second run holds it to the lock."""
    from fsdl_devinfra.hub.server import LoopbackHub
    with LoopbackHub(shelf) as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
        first = cli("preflight", "org/digits", "-o", tmp_path / "out", "--json", env=env)
        assert first.status == 0, first.err
        lock = json.loads((tmp_path / "out" / "model.lock.json").read_text())
        assert lock["repo"] == "org/digits" and len(lock["commit"]) == 40
        again = cli("preflight", "org/digits", "-o", tmp_path / "out", "--json", env=env)
        assert again.status == 0 and "match model.lock.json" in again.json["steps"][1]["summary"]
        blob = next(p for p in (tmp_path / "hf").rglob("blobs/*") if p.stat().st_size > 100_000)
        os.chmod(blob, 0o644); flip(blob)
        rotten = cli("preflight", "org/digits", "-o", tmp_path / "out", "--json", env=env)
        assert rotten.status in (0, 1), rotten.err  # repaired from the Hub, or refused: never used as it is
        assert rotten.status == 1 or verified(tmp_path)


def verified(tmp_path: Path) -> bool:
    import hashlib
    lock = json.loads((tmp_path / "out" / "model.lock.json").read_text())
    snapshot = next((tmp_path / "hf").rglob(f"snapshots/{lock['commit']}"))
    return all(hashlib.sha256((snapshot / f["path"]).read_bytes()).hexdigest() == f["sha256"] for f in lock["files"])


def test_an_unreachable_hub_is_one_sentence(cli, tmp_path):
    ran = cli("preflight", "org/nothing", "-o", tmp_path / "out", env={"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"})
    assert ran.status == 2 and "127.0.0.1:9" in ran.out + ran.err and "Traceback" not in ran.err


def test_a_parity_step_that_could_not_run_is_exit_2_with_a_report(tmp_path, monkeypatch):
    import fsdl_devinfra.parity
    from fsdl_devinfra.parity import Case, ParityReport
    from fsdl_devinfra.preflight import preflight
    reason = "CPUExecutionProvider has no kernel for Foo"
    report = ParityReport("not-run", [Case("cpu", None, "fp32", {}, "not-run", notes=[reason])])
    monkeypatch.setattr(fsdl_devinfra.parity, "check", lambda *_, **__: report)
    done = preflight("builtin:digits", output=tmp_path / "out", quiet=True)
    parity = next(s for s in done.steps if s.name == "parity")
    assert (done.verdict, done.status) == ("not-run", 2)
    assert (parity.verdict, reason in parity.summary) == ("not-run", True)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["verdict"] == "not-run"
    assert reason in (tmp_path / "out" / "report.html").read_text()
