"""A footprint is the sum of its explanation, for every engine, measure and kind of run; and the numbers beside a formula give its value."""
from __future__ import annotations

import json
import random

import pytest

from fsdl_devinfra.cli import main
from fsdl_devinfra.core.device_table import find_device
from fsdl_devinfra.core.errors import BadInput
from fsdl_devinfra.hub.popular import popular_models
from fsdl_devinfra.memory import PARTS, Architecture, Strategy, Workload, estimate, explain
from fsdl_devinfra.memory.activations import layer_bytes
from fsdl_devinfra.memory.explanation import formula_of, inputs_of
from fsdl_devinfra.memory.strategy import CHOICES

GPUS = (None, "h100", "RTX-4090-24GB", "a100-40", "B200-SXM-180GB")


def drawn(rng: random.Random, gpus=(None,)):
    """A popular model, a strategy, a workload and a GPU, as the dice fall; refused ones are drawn again."""
    while True:
        config = rng.choice(popular_models()).config
        words = {name: rng.choice(CHOICES[name]) for name in ("precision", "optimizer", "recompute", "attention", "loss", "framework", "padding")}
        degrees = dict(dp=rng.choice((1, 2, 8)), tp=rng.choice((1, 2, 4)), pp=rng.choice((1, 1, 2)), zero=rng.choice((0, 1, 2, 3)))
        kind = rng.choice((*[{}] * 5, {"inference": True}, {"states_only": True}, {"lora_rank": 16}, {"lora_rank": 16, "base_weights": "nf4"}, {"offload": "optimizer"}))
        try:
            model, strategy = Architecture.from_config(config), Strategy(**words, **degrees, **kind)
            workload = Workload(rng.choice((128, 2048)), rng.choice((1, 4)), rng.choice((1, 4)))
            gpu = rng.choice(gpus)
            device = find_device(gpu) if gpu else None
            estimate(model, strategy, workload, device, advice=False)
        except BadInput: continue
        return model, strategy, workload, device


@pytest.mark.parametrize("seed", range(8))
def test_lines_add_up_to_the_footprint(seed):
    rng = random.Random(seed)
    for _ in range(25):
        model, strategy, workload, device = drawn(rng, GPUS)
        measure = rng.choice(("reserved", "allocated", "device"))
        said = estimate(model, strategy, workload, device, measure, advice=False)
        found = explain(model, strategy, workload, device, measure)
        off = {part: found.of(part) - said.per_gpu_bytes[part] for part in PARTS}
        assert all(abs(d) <= len(found.lines) for d in off.values()), (model.name, strategy, workload, device, measure, off)
        assert found.phase == said.peak_phase


@pytest.mark.parametrize("seed", range(4))
def test_a_layer_is_the_sum_of_what_it_keeps(seed):
    rng = random.Random(100 + seed)
    for _ in range(25):
        model, strategy, workload, _ = drawn(rng)
        lines = explain(model, strategy, workload).layer
        if strategy.inference or strategy.states_only or not model.layers:
            assert lines == []
            continue
        assert abs(sum(line.value_bytes for line in lines) - layer_bytes(model, strategy, workload)) <= len(lines)


def test_the_numbers_beside_a_formula_give_its_value():
    """A reader who multiplies what is shown gets the figure."""
    model = Architecture.from_config(next(m.config for m in popular_models() if m.repo == "meta-llama/Llama-3.1-8B"))
    found = explain(model, Strategy(dp=8, zero=3), Workload(4096))
    line = next(line for line in found.lines if line.part == "optimizer")
    assert line.value_bytes == round(line.inputs["kept"] * line.inputs["trained"] * line.inputs["recipe.optimizer"])
    kept = next(line for line in found.lines if line.function.endswith("kept_activations"))
    each = sum(line.value_bytes for line in found.layer)
    share = {name: kept.inputs[f"share.{name}"] for name in ("layers", "in_flight", "tokens")}
    assert kept.value_bytes == pytest.approx(share["layers"] * share["in_flight"] * share["tokens"] * each, rel=1e-6)


def test_a_card_that_is_too_small_for_the_cache_says_what_is_given_back():
    model = Architecture.from_config(next(m.config for m in popular_models() if m.repo == "meta-llama/Llama-3.1-8B"))
    strategy = Strategy(dp=8, zero=3, recompute="full")
    need = estimate(model, strategy, Workload(4096)).device_bytes.value
    device = find_device(f"small=H100-SXM-80GB,memory={need / 2**30 - 2:.2f}")
    back = [line for line in explain(model, strategy, Workload(4096), device).lines if line.value_bytes < 0]
    assert len(back) == 1 and back[0].part == "reserve" and "given back" in back[0].what
    assert not any(line.value_bytes < 0 for line in explain(model, strategy, Workload(4096), find_device("h100")).lines)


def test_a_function_without_source_is_named_all_the_same():
    assert formula_of(len) == "" and inputs_of("", None) == {}


def test_the_command_explains(capsys):
    assert main(["memory", "llama-3.1-8b", "--zero", "3", "--dp", "8", "--explain", "--gpu", "h100"]) == 0
    said = capsys.readouterr().out
    assert "engines.sharded_optimizer" in said and "activations.mlp_bytes" in said
    assert main(["memory", "llama-3.1-8b", "--zero", "3", "--dp", "8", "--explain", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    total = sum(line["value_bytes"] for line in document["explanation"]["lines"])
    assert total == pytest.approx(sum(document["per_gpu_bytes"].values()), abs=30)
    assert main(["memory", "llama-3.1-8b", "--zero", "3", "--dp", "8", "--json"]) == 0
    assert "explanation" not in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("more", [["--serve", "vllm"], ["--solve", "micro-batch"]])
def test_what_is_not_explained_is_said(more, capsys):
    assert main(["memory", "llama-3.1-8b", "--gpu", "h100", "--explain", *more]) == 2
    assert "--explain" in capsys.readouterr().err


def test_the_page_of_a_notebook_escapes_what_it_shows():
    model = Architecture.from_config(next(m.config for m in popular_models() if m.repo == "meta-llama/Llama-3.1-8B"))
    page = explain(model, Strategy(dp=2), Workload(128))._repr_html_()
    assert "strategy.cp &gt; 1" in page and page.count("<details>") == page.count("</details>") > 5 and "blob/main" in page


@pytest.mark.parametrize("kind, counted_by", [("recurrent_gemma", "griffin"), ("minimax", "lightning"), ("xlstm", "mlstm"), ("zamba2", "mamba2")])
def test_new_families_lead_to_their_formula_and_to_the_runs(kind, counted_by):
    config = dict(model_type=kind, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_heads=4, intermediate_size=512, vocab_size=1000, hybrid_layer_ids=[1], n_mamba_heads=4)
    model = Architecture.from_config(config)
    found = explain(model, Strategy(), Workload(128))
    assert counted_by in [line.function.rpartition(".")[2] for line in found.layer]
    assert "published runs" in str(found) and found._repr_html_().count("published runs") == len(found.lines) + len(found.layer)
    notes = " ".join(estimate(model, Strategy(), Workload(128)).assumptions)
    assert ("plain PyTorch, as Transformers has them" in notes) == (kind != "zamba2") and ("kernels of their own" in notes) == (kind == "zamba2")
    for other in ({"inference": True}, {"states_only": True}): assert all(line.formula for line in explain(model, Strategy(**other), Workload(128)).lines)
