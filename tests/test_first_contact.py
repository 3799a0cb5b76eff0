"""What a newcomer meets first: the shell without a network, Python in a real Jupyter kernel, names of models and GPUs."""
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fsdl_devinfra as fd
from fsdl_devinfra.core.device_table import devices, find_device
from fsdl_devinfra.core.errors import BadInput
from fsdl_devinfra.hub.popular import popular, popular_models

ROOT = Path(__file__).resolve().parents[1]


def shell(line: str, folder: Path, **variables: str) -> subprocess.CompletedProcess:
    """A line of bash in an empty home without a network: the Hub is a port where nobody listens."""
    environment = {**os.environ, "HOME": str(folder), "HF_HOME": str(folder / "hf"), "HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONPATH": str(ROOT), **variables}
    line = line.replace("fsdl-devinfra", f"{sys.executable} -m fsdl_devinfra")
    return subprocess.run(["bash", "-o", "pipefail", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name,parameters", [("llama-3.1-8b", 8_030_261_248), ("meta-llama/Llama-3.1-8B", 8_030_261_248), ("gpt2", 124_439_808),
                                             ("https://huggingface.co/Qwen/Qwen3-8B", 8_190_735_360), ("Mistral-7B", 7_241_732_096)])
def test_popular_names_are_answered_without_a_network(name, parameters, tmp_path):
    ran = shell(f"fsdl-devinfra memory {name} --json", tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["model"]["parameters"] == parameters


def test_the_table_is_large_and_every_row_has_a_source():
    assert len(popular_models()) >= 200
    assert all(m.source and m.as_of for m in popular_models())


def test_every_popular_model_is_counted():
    from fsdl_devinfra.memory import Architecture
    assert all(Architecture.from_config(m.config, name=m.repo).parameters > 10**6 for m in popular_models())


def test_sizes_in_names_are_the_sizes_counted():
    """`-7b` in a name is within a fifth of the count; a mixture's name tells experts (8x7B) or the active part (17B), and some names round down."""
    from fsdl_devinfra.memory import Architecture
    unlike, compared = [], 0
    for m in popular_models():
        said = re.search(r"(?<![\w.])(\d+(?:\.\d+)?)b(?![a-z])", m.repo.rpartition("/")[2].lower())
        if not said or re.search(r"\dx\d|-a\d|-\d+e\b|gemma-2b|gemma-2-2b|falcon3-1b", m.repo.lower()): continue
        compared += 1
        if not 0.8 < Architecture.from_config(m.config, name=m.repo).parameters / (float(said[1]) * 1e9) < 1.25: unlike.append(m.repo)
    assert compared > 150 and not unlike, unlike


def test_a_name_of_somebody_else_is_not_taken_for_a_popular_one():
    assert popular("someone/Llama-3.1-8B") is None and popular("Qwen/Qwen3-8B@v1") is None


def test_one_screen_for_a_model(tmp_path):
    ran = shell("fsdl-devinfra memory llama-3.1-8b", tmp_path, COLUMNS="60")
    assert ran.returncode == 0
    assert all(use in ran.stdout for use in ("inference", "QLoRA", "LoRA", "training", "RTX-4090-24GB", "tight"))
    document = json.loads(shell("fsdl-devinfra memory llama-3.1-8b --json", tmp_path).stdout)
    assert document["fits"] is None and {"use", "gpu", "fits", "peak_bytes"} <= set(document["overview"][0])


@pytest.mark.parametrize("line", [f"{command} {name}" for command in ("memory", "plan --gpu h100", "cost --gpu h100")
                                  for name in ("stable-diffusion-xl", "stabilityai/stable-diffusion-xl-base-1.0", "sdxl", "pipeline", "pipeline/unet")])
def test_a_diffusion_model_is_told_what_to_do_instead(line, tmp_path):
    (tmp_path / "pipeline/unet").mkdir(parents=True)
    (tmp_path / "pipeline/model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline", "_diffusers_version": "0.30.0"}')
    (tmp_path / "pipeline/unet/config.json").write_text('{"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.30.0"}')
    ran = shell(f"fsdl-devinfra {line}", tmp_path)
    assert ran.returncode == 2 and "diffusion model" in ran.stderr and "fsdl-devinfra dryrun" in ran.stderr and "Did you mean" not in ran.stderr


@pytest.mark.parametrize("name,near", [("lama-3.1-8b", "llama-3.1-8b"), ("qwen3-9b", "qwen3-8b"), ("mistral-8b", "mistral-7b"), ("nope", None), ("zzz-7b", None)])
def test_a_name_that_is_near_is_of_the_same_family(name, near, tmp_path):
    said = shell(f"fsdl-devinfra memory {name}", tmp_path).stderr
    assert f"Did you mean {near}" in said if near else "no popular model" in said and "Did you mean" not in said


@pytest.mark.parametrize("word,whole", [("inspect", ["hub inspect"]), ("verify", ["hub verify", "env verify"]), ("capture", ["env capture"])])
def test_a_command_without_its_group(word, whole, tmp_path):
    ran = shell(f"fsdl-devinfra {word} my-model", tmp_path)
    assert ran.returncode == 2 and ran.stderr.strip().endswith("Did you mean " + " or ".join(f"fsdl-devinfra {w}" for w in whole) + "?")


@pytest.mark.parametrize("line,says", [
    ("memory --seq-length 4096", "--seq-len"), ("memory --gpus 8", "--dp"), ("hub inspect --jsno", "--json"), ("memory --gradient-checkpointing", "--recompute"),
    ("launch plan.json --target slurm", "--to"), ("plan gpt2 --gpuu h100", "--gpu"), ("plan gpt2 --gpu h100 --bugdet 5", "--budget"), ("env capture --prob", "--probe"), ("onnx check a b --providers cpu", "--provider")])
def test_an_unknown_option_gets_the_nearest_of_its_command(line, says, tmp_path):
    ran = shell(f"fsdl-devinfra {line}", tmp_path)
    command = line.split(" -")[0].split(" gpt2")[0].split(" a b")[0].split(" plan.json")[0]
    assert ran.returncode == 2 and f"Did you mean {says}" in ran.stderr and f"{command} has no option" in ran.stderr


def test_known_options_are_not_touched(tmp_path):
    assert shell("fsdl-devinfra memory gpt2 --seq-len 512 --dp 2", tmp_path).returncode == 0


@pytest.mark.parametrize("line", ["version", "help", "help memory", "completion bash", "completion zsh"])
def test_words_people_try(line, tmp_path):
    ran = shell(f"fsdl-devinfra {line}", tmp_path)
    assert ran.returncode == 0 and ran.stdout and not ran.stderr


@pytest.mark.parametrize("line", ["completion bash | head -2", "--help | head -1", "memory llama-3.1-8b | head -1", "--print-completion zsh | head -1"])
def test_a_closed_pipe_is_silence(line, tmp_path):
    ran = shell(f"fsdl-devinfra {line}", tmp_path)
    assert ran.returncode == 0 and ran.stdout and not ran.stderr


def test_interrupted_is_130():
    code = "import signal, sys; from fsdl_devinfra.core.command import run; sys.exit(run(lambda: signal.raise_signal(signal.SIGINT)))"
    ran = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert ran.returncode == 130 and "interrupted" in ran.stderr and "Traceback" not in ran.stderr


@pytest.mark.parametrize("name", ["rtx 9999", "gaudi3", "h1000", "RTX 7090 Ti"])
def test_an_unknown_gpu_is_offered_no_figures(name):
    with pytest.raises(BadInput) as error: find_device(name)
    assert not re.search(r"(memory|bandwidth|bf16)=\d", error.value.hint) and "memory=GB" in error.value.hint


CARDS = """3060 3060ti 3070 3080 3090 3090ti 4060 4060ti 4070 4070-super 4070ti 4070-ti-super 4080 4080-super 4090 4090d 5060 5060ti 5070 5070ti 5080 5090
    l40 l40s rtx-6000-ada gh200 h20 h800 rtx-pro-6000 gb10 gb200 m1-max m2-ultra m3-max m4-max m4-pro a30 a800 4090-laptop 4060-laptop 5090-laptop""".split()


@pytest.mark.parametrize("name", CARDS)
def test_cards_that_people_own(name):
    device = find_device(name)
    assert device.source and device.memory_bytes > 4 * 2**30
    assert ("Laptop" in device.name) == ("laptop" in name)
    assert device.measured or device.note


def test_gb200_holds_four_instances(): assert find_device("gb200").memory_bytes >= 182 * 2**30


def test_every_row_finds_itself(): assert all(find_device(d.name) == d for d in devices())


CELLS = ['from fsdl_devinfra.core.console import table_text, progress\nprint(table_text(["a", "b"], [["x", 1]]))',
         'import fsdl_devinfra as fd\nfootprint = fd.estimate("llama-3.1-8b", gpu="h100")\nprint(len(footprint.table()) > 50, len(repr(footprint)) < 250)',
         "footprint", 'str(fd.plan("llama-3.1-8b", gpu="h100", gpus=8))[:60]', 'fd.cost("gpt2", gpu="h100", tokens="1B")', "fd.capture()",
         'with progress("counting", total=2) as p:\n    for _ in range(2): p.advance()']


def test_in_a_real_kernel(tmp_path):
    """Strings are strings, figures are displays: rich shows tables by itself in Jupyter and returns nothing."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    printed = ["".join(o.get("text", "") for o in cell.outputs if o.output_type == "stream") for cell in notebook.cells]
    shown = [next((o.data for o in cell.outputs if o.output_type == "execute_result"), {}) for cell in notebook.cells]
    assert "x" in printed[0] and "─" in printed[0]
    assert printed[1].strip() == "True True"
    assert "<svg" in shown[2]["text/html"] and len(shown[2]["text/plain"]) < 250
    assert "llama-3.1-8b" in shown[3]["text/plain"]
    assert all("text/html" in shown[i] for i in (4, 5))
    assert any("<progress" in str(o.get("data", {})) or o.output_type == "display_data" for o in notebook.cells[6].outputs)


def test_python_and_the_command_line_agree(tmp_path):
    document = json.loads(shell("fsdl-devinfra memory qwen3-8b --gpu a100-80 --lora-rank 8 --micro-batch 2 --json", tmp_path).stdout)
    found = fd.estimate("qwen3-8b", gpu="a100-80", lora_rank=8, micro_batch=2).to_dict()
    assert found == {k: v for k, v in document.items() if k != "environment"}


def test_importing_is_light():
    code = "import sys; before = set(sys.modules); import fsdl_devinfra; print(len(set(sys.modules) - before))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert int(ran.stdout) == 1


def test_another_model_in_the_same_folder_is_a_new_lock(tmp_path):
    """The demonstration, then a model of one's own: nothing is compared with the other's lock; a change of the same model is found."""
    from fsdl_devinfra.preflight import PreflightContext, known_lock
    device, out = find_device("t4"), tmp_path / "out"
    out.mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    def context(model): return PreflightContext(model, out, tmp_path, [device], quiet=True)
    fd.lock(tmp_path / "mine").save(out / "model.lock.json")
    for previous, model, kept in (("builtin:digits", tmp_path / "mine", False), (tmp_path / "mine", tmp_path / "mine", True)):
        (out / "report.json").write_text(json.dumps({"model": str(previous)}))
        assert (known_lock(context(str(model))) == out / "model.lock.json") == kept


@pytest.mark.parametrize("model,gpu", [("llama-3.1-8b", "3060"), ("qwen2.5-7b", "3060"), ("llama-3.1-8b", "4090"), ("qwen2.5-14b", "4080")])
def test_remedies_are_commands_that_fit(model, gpu, tmp_path):
    """Also on a small card: QLoRA with the loss in chunks, on shorter sequences where nothing else is left."""
    remedies = fd.estimate(model, gpu=gpu).remedies
    commands = [r.partition(": ")[2] for r in remedies if "(tight)" not in r]
    assert any("--base-weights nf4" in c for c in commands), remedies
    for command in commands: assert shell(command, tmp_path).returncode == 0, command


@pytest.mark.parametrize("line", ["memory ''", "preflight ''", "cost ''", "plan gpt2 --gpu ''", "hub inspect ''", "env verify ''", "hub serve ''", "memory gpt2 --config ''", "preflight -o ' '"])
def test_an_empty_argument_is_one_sentence(line, tmp_path):
    """A shell variable that is not set: nothing is done with another model, folder or GPU in its place."""
    ran = shell(f"fsdl-devinfra {line}", tmp_path)
    assert ran.returncode == 2 and not ran.stdout and " empty" in ran.stderr and ran.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


def test_preflight_without_a_gpu_says_which_one_it_took(tmp_path, monkeypatch):
    from fsdl_devinfra.preflight import PreflightContext, gpus_to_try, memory_step
    monkeypatch.setattr("fsdl_devinfra.compute.cluster.local_devices", lambda: [])
    def judged(name, *gpu):
        config = popular(name).config
        run = PreflightContext(name, tmp_path, tmp_path, *gpus_to_try(*gpu)[:1], quiet=True, made={"config": config})
        return memory_step(run), run
    (holds, said, _), run = judged("gpt2")
    assert holds and run.device.name == "RTX-3060-12GB" and said.endswith("this is the smallest of 9 common GPUs that it fits on")
    (holds, said, _), run = judged("llama-3.1-70b")
    assert not holds and run.device.name == "B200-SXM-180GB" and "the largest of 9 common GPUs; `fsdl-devinfra memory llama-3.1-70b` shows" in said
    (holds, said, _), run = judged("gpt2", "t4")
    assert holds and run.device.name == "T4-16GB" and "No --gpu" not in said
    monkeypatch.setattr("fsdl_devinfra.compute.cluster.local_devices", lambda: [("NVIDIA GeForce RTX 4090", 24564 * 2**20)])
    found, why = gpus_to_try()
    assert [d.name for d in found] == ["RTX-4090-24GB"] and why == "this machine's GPU"


@pytest.mark.parametrize("width, shown, hidden", [(60, "strategy", "tokens/s/GPU"), (80, "tokens/s/GPU", "batch"), (160, "batch", "nothing")])
def test_the_table_of_plans_fits_the_terminal(width, shown, hidden, tmp_path):
    ran = shell("fsdl-devinfra plan llama-3.1-8b --gpu h100 --gpus 8 --tokens 1B", tmp_path, COLUMNS=str(width))
    table = ran.stdout.split("\n\n")[1].splitlines()
    assert "strategy" in table[0] and max(map(len, table)) <= width and len(table) > 4
    assert shown in table[0] and hidden not in table[0]


@pytest.mark.slow
def test_a_report_fits_a_phone(browser, tmp_path):
    """Wide tables and charts scroll inside the page, the page itself does not; columns drawn with spaces stay columns."""
    from fsdl_devinfra.core.charts import stacked_bars
    from fsdl_devinfra.core.page import html_page, paragraph, printed, section
    wide = "<table><tr>" + "".join(f"<th>column {i}</th>" for i in range(14)) + "</tr></table>"
    columns = " module" + " " * 60 + "dtype\n" + "─" * 80 + "\n blocks" + " " * 60 + "F32"
    chart = stacked_bars({"forward": {"parameters": 1.0}}, "GiB").svg
    (page := tmp_path / "report.html").write_text(html_page("Report", [section("A", wide), section("B", printed("A sentence. " * 20 + "\n\n" + columns)), section("C", chart, paragraph("end"))]))
    def value(expression): return browser.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")
    browser.call("Emulation.setDeviceMetricsOverride", width=420, height=800, deviceScaleFactor=1, mobile=True)
    browser.call("Page.navigate", url=page.as_uri())
    browser.wait("A sentence")
    assert value("document.documentElement.scrollWidth") <= 420
    assert value("document.querySelector('table').scrollWidth") > 420 and value("document.querySelector('.chart').scrollWidth") > 420
    assert value("Math.round(document.querySelector('pre').getBoundingClientRect().height / parseFloat(getComputedStyle(document.querySelector('pre')).lineHeight))") == 3
