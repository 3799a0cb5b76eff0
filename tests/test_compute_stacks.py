"""Kernels apart from sharding, layouts that ran, and the price of the node that a run needs."""
from __future__ import annotations

import json

import pytest

from fsdl_devinfra.compute.cluster import cluster
from fsdl_devinfra.compute.operations import layer_products
from fsdl_devinfra.compute.planning import plan
from fsdl_devinfra.compute.prices import Price, cheapest
from fsdl_devinfra.compute.throughput import peak_flops, throughput
from fsdl_devinfra.core.device_table import find_device
from fsdl_devinfra.core.errors import BadInput
from fsdl_devinfra.memory import Architecture, Strategy, Workload

LLAMA = Architecture.from_numbers(layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocab=128256, name="org/llama")
QWEN = Architecture.from_config(dict(model_type="qwen3_moe", num_hidden_layers=94, hidden_size=4096, num_attention_heads=64, num_key_value_heads=4, vocab_size=151936, head_dim=128,
                                     intermediate_size=12288, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=1536), name="org/experts")
H100 = find_device("h100")


def rate(a, s, w, gpu="h100"): return throughput(a, s, w, cluster(gpu, s.gpus)).tokens_per_second_per_gpu.value


def test_kernels_are_not_the_framework():
    """The same kernels compute a layer as fast under either sharding; other kernels do not."""
    w = Workload(8192, 1, 8)
    spent = {f: throughput(LLAMA, Strategy(kernels="te", framework=f), w, cluster("h100", 1)).spent_seconds for f in ("fsdp", "megatron", "deepspeed")}
    assert len({(x["products"], x["attention"]) for x in spent.values()}) == 1
    rates = {k: rate(LLAMA, Strategy(dp=8, zero=1, kernels=k), w) for k in ("torch", "compile", "te", "megatron", "jax")}
    assert rates["torch"] < rates["compile"] < rates["jax"] and rates["torch"] < rates["te"]


def test_a_table_holds_one_stack_and_says_which(cli, tmp_path):
    """cost of the flags that a row stands for says the row's figures."""
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="llama", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336,
                                                          vocab_size=128256, max_position_embeddings=8192)))
    for extra, kernels in (([], "torch"), (["--kernels", "megatron"], "megatron"), (["--framework", "megatron"], "megatron")):
        d = cli("plan", tmp_path, "--gpu", "h100", "--gpus", "8", *extra, "--json").json
        assert {p["strategy"]["kernels"] for p in d["plans"]} == {kernels} and 0 <= d["best"] < len(d["plans"])
        p = next(p for p in d["plans"] if p["strategy"]["tp"] > 1)
        s, w = p["strategy"], p["workload"]
        words = [f"--{k}={s[k]}" for k in ("dp", "tp", "pp", "vpp", "zero", "framework", "recompute", "kernels")]
        c = cli("cost", tmp_path, "--gpu", "h100", *words, f"--seq-len={w['seq_len']}", f"--micro-batch={w['micro_batch']}", f"--grad-accum={w['grad_accum']}", "--json").json
        assert c["step_seconds"] == p["step_seconds"] and c["tokens_per_second_per_gpu"] == p["tokens_per_second_per_gpu"] and c["strategy"]["kernels"] == kernels
        assert c["samples_per_second"]["value"] == pytest.approx(c["tokens_per_second_per_gpu"]["value"] * 8 / w["seq_len"])


def test_a_run_that_does_not_fit_is_bad_news_first(cli, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="llama", hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, intermediate_size=28672, vocab_size=128256)))
    ran = cli("cost", tmp_path, "--gpu", "h100")
    assert ran.status == 1 and ran.out.startswith("It does not fit")
    assert cli("cost", tmp_path, "--gpu", "h100", "--json").json["fits"] == "no"
    fits = cli("cost", tmp_path, "--gpu", "h100", "--dp", "64", "--zero", "3", "--recompute", "full")
    assert fits.status == 0 and not fits.out.startswith("It does not fit")


@pytest.mark.parametrize("s,w", [(Strategy(dp=32, tp=2, ep=64, zero=1, framework="megatron"), Workload(4096, 1, 32)), (Strategy(dp=8, tp=2, ep=8, zero=1, framework="megatron"), Workload(4096, 1, 32))])
def test_experts_across_tensor_parallel_ranks_run(s, w): assert rate(QWEN, s, w) > 0


def test_more_chunks_wait_less_and_uneven_ones_run():
    big = Architecture.from_numbers(126, 16384, 128, 128256, kv_heads=8, ffn=53248)
    waits = [throughput(big, Strategy(dp=1, tp=8, pp=16, vpp=v, zero=1, framework="megatron"), Workload(8192, 1, 64), cluster("h100", 128)).spent_seconds["bubble"] for v in (1, 2, 8)]
    assert waits[0] > waits[1] > waits[2]


def test_dualpipe_waits_less_than_1f1b_and_hides_the_experts():
    one, both = (throughput(QWEN, Strategy(dp=8, pp=8, ep=8, zero=1, framework="megatron", schedule=n), Workload(4096, 1, 64), cluster("h100", 64)).spent_seconds for n in ("1f1b", "dualpipe"))
    assert both["bubble"] < one["bubble"] and both["tensor"] < one["tensor"]


def test_block_scaled_precisions_need_their_units():
    b200 = find_device("b200")
    assert peak_flops("mxfp8-mixed", b200) == peak_flops("fp8-mixed", b200) == peak_flops("nvfp4-mixed", b200) / 2
    for p in ("mxfp8-mixed", "nvfp4-mixed"):
        with pytest.raises(BadInput, match="block-scaled"): peak_flops(p, H100)
    w = Workload(8192, 1, 8)
    assert rate(LLAMA, Strategy(dp=8, zero=1, precision="nvfp4-mixed"), w, "b200") > rate(LLAMA, Strategy(dp=8, zero=1, precision="mxfp8-mixed"), w, "b200")


def test_gradients_in_16_bits_travel_in_half_the_time():
    wide, narrow = (throughput(LLAMA, Strategy(dp=64, grad_dtype=g), Workload(2048), cluster("a100-80", 64)).spent_seconds["data"] for g in ("fp32", "bf16"))
    assert narrow < wide


def test_compiled_additions_do_not_launch_experts_faster():
    """Megatron compiles small functions: its experts are launched one by one with or without."""
    host = [throughput(QWEN, Strategy(dp=8, ep=8, zero=1, framework="megatron", compile=c), Workload(512, 1, 8), cluster("b200", 8)).spent_seconds.get("host", 0) for c in (False, True)]
    assert host[1] >= host[0] > 0 and layer_products(QWEN)


LIST = [Price("A", "one", "H100-SXM-80GB", 1, 2.0), Price("A", "node", "H100-SXM-80GB", 8, 24.0), Price("B", "node", "H100-SXM-80GB", 8, 32.0)]


@pytest.mark.parametrize("gpus,usd", [(1, 2.0), (2, 24.0), (8, 24.0), (12, 48.0), (16, 48.0)])
def test_the_node_that_the_run_needs_is_paid(gpus, usd):
    found = cheapest(LIST, H100, gpus)
    assert found.usd_per_hour == usd and found.gpus >= min(gpus, 8)


def test_more_gpus_never_cost_less_an_hour():
    bills = [cheapest(LIST, H100, n).usd_per_hour for n in range(1, 40)]
    assert bills == sorted(bills)


def test_breakeven_and_cost_take_the_same_price(cli, tmp_path):
    (tmp_path / "p.csv").write_text("Cloud,GPU Type,GPU Arch,GPUs,GPU RAM,vCPUs,RAM,On-demand,Per-GPU,Spot,Name\nA,H100 (80 GB),,1,,,,2,,,one\nA,H100 (80 GB),,8,,,,24,,,node\n")
    own = cli("cost", "breakeven", "--gpu", "h100", "--gpus", "8", "--machine-usd", "250000", "--prices", tmp_path / "p.csv", "--json").json
    run = cli("cost", "--gpu", "h100", "--gpus", "8", "--prices", tmp_path / "p.csv", "--json", cwd=tmp_path)
    assert own["cloud_usd_per_gpu_hour"] == 3.0, run.out[:200]


def test_the_headline_is_the_simplest_that_is_near():
    r = plan(LLAMA, H100, 8, workload=Workload(8192))
    first = r.plans[0]
    assert r.headline.tokens_per_second_per_gpu.value >= 0.9 * first.tokens_per_second_per_gpu.value
    assert r.headline.description in r.verdict() and (r.best == 0 or first.description in r.verdict())


def test_a_card_without_a_bridge_talks_through_pcie():
    """A bridge is sold apart: it counts where somebody says that it is there. link=0 says that it is not; other figures cannot be nothing."""
    bridged, apart = find_device("pair=RTX-3090-24GB,link=112.5"), find_device("apart=RTX-3090-24GB,link=0")
    assert cluster("RTX-3090-24GB", 2).link == cluster(apart, 2).link
    assert cluster(bridged, 2).nvlink and not cluster(apart, 2).nvlink and cluster(apart, 2).link == cluster(apart, 2).pcie
    s, w = Strategy(dp=2, zero=3, lora_rank=64), Workload(512)
    assert rate(LLAMA, s, w, apart) < rate(LLAMA, s, w, bridged)
    for field in ("bandwidth", "memory", "bf16"):
        with pytest.raises(BadInput, match="cannot be '0'"): find_device(f"x=RTX-3090-24GB,{field}=0")


def test_adapters_on_fewer_products_move_less():
    spent = [throughput(LLAMA, Strategy(lora_rank=16, lora_targets=t), Workload(4096), cluster("h100", 1)).spent_seconds["elementwise"] for t in ("attention-qv", "attention", "all-linear")]
    assert spent[0] < spent[1] < spent[2]


def write_config(folder, **kw):
    config = dict(model_type="llama", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336, vocab_size=128256, max_position_embeddings=8192)
    (folder / "config.json").write_text(json.dumps(config | kw))


def test_recomputation_that_nobody_said_is_tight_and_said_it_is_no(cli, tmp_path):
    """8 × 4096 tokens of an 8B on eight H100 need it; with it said, either way, the verdict is plain."""
    write_config(tmp_path)
    line = ("cost", tmp_path, "--gpu", "h100", "--gpus", "8", "--zero", "3", "--micro-batch", "4", "--seq-len", "4096")
    unsaid = cli(*line)
    assert unsaid.status == 0 and unsaid.out.startswith("It fits only with activation checkpointing")
    said = cli(*line, "--recompute", "none")
    assert said.status == 1 and said.out.startswith("It does not fit")
    assert cli(*line, "--json").json["fits"] == "tight" and cli(*line, "--recompute", "full", "--json").json["fits"] != "no"


def test_the_way_out_keeps_what_was_asked_for(cli, tmp_path):
    import shlex
    write_config(tmp_path, num_hidden_layers=80, hidden_size=8192)
    asked = ["--seq-len", "2048", "--precision", "fp8-mixed", "--tokens", "20B", "--spot", "--optimizer", "adamw-8bit", "--loss", "fused"]
    ran = cli("cost", tmp_path, "--gpu", "h100", "--tp", "2", "--grad-accum", "8", *asked)
    line = shlex.split(ran.out.split("To see what would: ")[1].splitlines()[0])
    assert line[:3] == ["fsdl-devinfra", "plan", str(tmp_path)] and {*asked} <= {*line} and "--tp" not in line
    assert line[line.index("--gpus") + 1] == "2" and line[line.index("--batch") + 1] == "8"
    assert cli(*line[1:], "--json").json["schema"] == "fsdl-devinfra/plan/1"


def test_a_measured_step_scales_every_plan(cli, tmp_path):
    write_config(tmp_path)
    (tmp_path / "steps.json").write_text("[9, 2.0, 2.0, 2.0]")
    run = ("--gpu", "h100", "--gpus", "8", "--seq-len", "4096")
    measured = cli("cost", tmp_path, *run, "--zero", "3", "--recompute", "full", "--calibrate", tmp_path / "steps.json", "--json").json
    (tmp_path / "cost.json").write_text(json.dumps(measured))
    plain, scaled = (cli("plan", tmp_path, *run, *more, "--json").json for more in ([], ["--calibrated", tmp_path / "cost.json"]))
    share = measured["measured_share"]
    assert share > 1.2 and scaled["plans"][0]["step_seconds"]["value"] == pytest.approx(share * plain["plans"][0]["step_seconds"]["value"])
    other = cli("plan", tmp_path, "--gpu", "a100-80", "--gpus", "8", "--calibrated", tmp_path / "cost.json")
    assert other.status == 2 and "was measured on H100" in other.err


def test_energy_follows_the_hours(cli, tmp_path):
    write_config(tmp_path)
    d = cli("plan", tmp_path, "--gpu", "h100", "--gpus", "8", "--tokens", "1B", "--json").json["plans"][0]
    assert d["kwh"] == pytest.approx(700 * 1.5 * 8 * d["hours"] / 1000) and d["co2_kg"] == pytest.approx(0.373 * d["kwh"])


@pytest.mark.slow  # every batch is traced
def test_a_plan_of_a_net_is_in_images(cli, tmp_path):
    pytest.importorskip("torch")
    (tmp_path / "net.py").write_text("import torch.nn as nn\n\n\ndef net(): return nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))\n")
    line = ("plan", f"{tmp_path / 'net.py'}:net", "--gpu", "rtx-4090", "--image-size", "224")
    one, four = (cli(*line, *more, "--json").json for more in ([], ["--gpus", "4"]))
    assert one["samples"] == "images" and one["rejected"] and one["plans"][one["best"]]["fits"] == "yes"
    said = cli("cost", line[1], *line[2:], "--batch-size", str(one["plans"][0]["batch"]), "--json").json
    assert one["plans"][0]["samples_per_second"] == said["samples_per_second"]
    assert 2 < four["plans"][0]["samples_per_second"]["value"] / one["plans"][0]["samples_per_second"]["value"] <= 4


@pytest.mark.parametrize("words, tried", [((), {"none", "selective", "full"}), (("--recompute", "none"), {"none"}), (("--recompute", "full"), {"full"})])
def test_activation_checkpointing_is_searched_only_where_nobody_said_it(words, tried, tmp_path):
    """`--recompute none` is a choice, and not the same as leaving it out; Llama 3.1 8B on two H100 wants it otherwise."""
    from fsdl_devinfra.cli import make_parser
    args = make_parser("plan").parse_args(["plan", "llama-3.1-8b", "--gpu", "h100", "--gpus", "8", "--seq-len", "8192", *words])
    found = args.run(args).document
    said = {p["strategy"]["recompute"] for p in [*found["plans"], *found["rejected"]]}
    assert said <= tried and (len(tried) == 1 or len(said) > 1)
