"""Prices, cost and break-even through the command line: every mistake is one sentence."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fsdl_devinfra.compute.prices import read_prices

DATA = Path(__file__).parent / "data" / "prices"
CONFIG = dict(model_type="llama", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336, vocab_size=128256, max_position_embeddings=131072)
KEYS = {"step_seconds", "tokens_per_second_per_gpu", "mfu", "flops_convention", "hours", "usd", "assumptions"}


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "llama-8b"; folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def test_cost_document(cli, model):
    ran = cli("cost", model, "--gpu", "h100", "--dp", "8", "--zero", "3", "--recompute", "full", "--tokens", "1e9", "--usd-per-gpu-hour", "2", "--json")
    d = ran.json
    assert ran.status == 0 and KEYS <= d.keys()
    for key in ("step_seconds", "tokens_per_second_per_gpu"): assert d[key]["low"] <= d[key]["value"] <= d[key]["high"]
    assert d["usd"] == pytest.approx(d["hours"] * 8 * 2)
    assert d["hours"] == pytest.approx(1e9 / d["tokens_per_second_per_gpu"]["value"] / 8 / 3600, rel=0.01)


def test_cost_without_tokens_has_no_bill(cli, model):
    d = cli("cost", model, "--gpu", "b200", "--json").json
    assert d["hours"] is None and d["usd"] is None


@pytest.mark.parametrize("args,why", [
    (["cost"], "needs a GPU"), (["cost", "--gpu", "h1000"], "Did you mean"), (["cost", "--gpu", "h100", "--gpus", "0"], "less than 1"), (["cost", "--gpu", "a100-80", "--precision", "fp8-mixed"], "8-bit"),
    (["cost", "--gpu", "h100", "--tokens", "-5"], "not a count"), (["cost", "--gpu", "h100", "--tokens", "many"], "not a count"), (["cost", "--gpu", "h100", "--usd-per-gpu-hour", "-1"], "cannot cost"),
    (["cost", "--gpu", "h100", "--usd-per-gpu-hour", "nan"], "finite"), (["cost", "--gpu", "h100", "--prices", "nowhere.csv"], "no price file"), (["cost", "--gpu", "h100", "--prices", "."], "folder"),
    (["plan", "--gpu", "h100", "--gpus", "8", "--budget", "-3"], "budget"), (["plan", "--gpu", "h100", "--gpus", "8", "--budget", "100"], "needs a run"), (["plan", "--gpu", "banana"], "no GPU"), (["plan"], "--gpu"),
])
def test_mistakes_are_one_sentence(cli, model, args, why):
    ran = cli(args[0], model, *args[1:], cwd=model)
    assert ran.status == 2, ran.out
    assert why in ran.sentence()


@pytest.mark.parametrize("text", ["", "a,b\n", "Cloud,GPU Type,GPUs,On-demand,Per-GPU,Spot,Name\nX,H100,8,ask us,,,\n", "Cloud,GPU Type,GPUs,On-demand\nX,H100,4-8,1-2\n", "\x00\x00"])
def test_a_price_file_that_says_nothing(cli, model, tmp_path, text):
    (tmp_path / "p.csv").write_text(text)
    ran = cli("cost", model, "--gpu", "h100", "--prices", tmp_path / "p.csv")
    assert ran.status == 2 and ran.sentence()


def test_ranges_and_blanks_are_read(cli, model, tmp_path):
    (tmp_path / "p.csv").write_text("Cloud,GPU Type,GPU Arch,GPUs,GPU RAM,vCPUs,RAM,On-demand,Per-GPU,Spot,Name\nX,H100 (80 GB),Hopper,8,80,188-208,,16-24,,,ranged\nY,H100 (80 GB),,8,,,,,,,blank\n")
    d = cli("cost", model, "--gpu", "h100", "--gpus", "8", "--zero", "3", "--prices", tmp_path / "p.csv", "--json").json
    assert d["price"]["usd_per_hour"] == 24  # of a range, the dearer end


def test_samples():
    fsdl, sky = read_prices(DATA / "fsdl_sample.csv"), read_prices(DATA / "skypilot_sample.csv")
    exoscale = {p.gpus: p.usd_per_hour for p in fsdl.prices if p.cloud == "Exoscale" and p.gpu.startswith("RTX-A6000")}
    assert all(p.usd_per_gpu_hour < 45 for p in fsdl.prices) and (not exoscale or max(exoscale.values()) < 10)
    assert {(p.gpu, p.gpus, p.spot) for p in sky.prices} == {("V100-SXM-16GB", 8, False), ("H100-SXM-80GB", 8, False), ("A100-SXM-80GB", 1, True)}
    with pytest.raises(Exception): fsdl.prices[0].gpus = 3  # frozen


def test_gpuhunt_offline(tmp_path, monkeypatch):
    """Today's catalog from a folder, and a sentence where there is none."""
    hunt = pytest.importorskip("gpuhunt._internal.catalog")
    from fsdl_devinfra.compute.prices import hunted_prices
    from fsdl_devinfra.core.device_table import find_device
    from fsdl_devinfra.core.errors import Unreachable
    head = "instance_name,location,price,cpu,memory,gpu_count,gpu_name,gpu_memory,spot,disk_size,gpu_vendor,flags,cpu_arch,provider_data\n"
    for provider in hunt.OFFLINE_PROVIDERS: (tmp_path / f"{provider}.csv").write_text(head + ("x,us,24.0,192,1800,8,H100,80,False,,nvidia,,,{}\n" if provider == "lambdalabs" else ""))
    monkeypatch.setenv("GPUHUNT_CATALOG_DIR", str(tmp_path))
    try: found = hunted_prices(find_device("h100"), 30)
    except Unreachable: pytest.skip("this version of gpuhunt reads no catalog folder")
    assert [(p.gpu, p.usd_per_gpu_hour) for p in found.prices if p.instance == "x"] == [("H100-SXM-80GB", 3.0)]
    monkeypatch.setenv("GPUHUNT_CATALOG_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(Unreachable): hunted_prices(find_device("h100"), 10)


def test_breakeven_command(cli):
    d = cli("cost", "breakeven", "--gpu", "a100-80", "--gpus", "8", "--machine-usd", "60000", "--usd-per-gpu-hour", "1.1", "--json").json
    assert 0 < d["breakeven_utilisation"] < 1 and d["cheaper"] in ("own", "cloud") and d["assumptions"]
    assert cli("cost", "breakeven", "--gpus", "8").status == 2


def test_plan_is_quick_and_light(model, tmp_path):
    """A 405B model on 1,024 GPUs: under two seconds of the processor, and neither torch nor numpy."""
    big = tmp_path / "big"; big.mkdir()
    (big / "config.json").write_text(json.dumps(CONFIG | dict(hidden_size=16384, num_hidden_layers=126, num_attention_heads=128, intermediate_size=53248)))
    code = f"import sys, time; from fsdl_devinfra.cli import main; t = time.process_time(); s = main(['plan', {str(big)!r}, '--gpu', 'h100', '--gpus', '1024', '--json']); print(time.process_time() - t, file=sys.stderr); sys.exit(3 if {{'torch', 'transformers', 'numpy'}} & set(sys.modules) else s)"
    best = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        best.append(float(done.stderr.strip().splitlines()[-1]))
    assert min(best) < 2
    document = json.loads(done.stdout)
    assert {"best", "plans", "rejected", "advice"} <= document.keys()
    assert {"strategy", "peak_bytes", "step_seconds", "tokens_per_second_per_gpu", "mfu", "hours", "usd", "why"} <= document["plans"][0].keys() and {"strategy", "why"} <= document["rejected"][0].keys()


def test_plan_that_cannot_fit_is_status_1(cli, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | dict(hidden_size=16384, num_hidden_layers=126, num_attention_heads=128, intermediate_size=53248)))
    ran = cli("plan", tmp_path, "--gpu", "t4", "--gpus", "2", "--json")
    assert ran.status == 1 and ran.json["best"] is None and ran.json["rejected"]
