"""Plans and prices with a hostile eye: what cannot be is one sentence, and what is odd is not misread."""
from __future__ import annotations

import json

import pytest

from fsdl_devinfra.compute.planning import plan
from fsdl_devinfra.compute.prices import price_number, read_prices
from fsdl_devinfra.core.device_table import find_device
from fsdl_devinfra.core.errors import BadInput
from fsdl_devinfra.memory import Architecture, Strategy, Workload

LLAMA = Architecture.from_numbers(layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocab=128256, name="org/llama")
H100 = find_device("h100")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(dict(model_type="llama", architectures=["LlamaForCausalLM"], hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                                                      num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192)))
    return path


@pytest.mark.parametrize("args,why", [
    (["--gpus", "0"], "less than 1"), (["--gpus", "8", "--budget", "0"], "the budget cannot be"), (["--gpus", "8", "--budget", "100"], "needs a run and a price"), (["--gpus", "8", "--tokens", "-1"], "not a count"),
    (["--gpus", "8", "--network", "0"], "moves nothing"), (["--gpus", "8", "--network", "nan"], "not a finite number"), (["--gpus", "99999999"], "more than anybody has"), (["--gpus", "8", "--tp", "3"], "tp 3"), (["--gpus", "8", "--dp", "16"], "dp 16"),
    (["--gpus", "8", "--usd-per-gpu-hour", "-1", "--tokens", "1B"], "cannot cost"), (["--gpus", "8", "--states-only"], "more than states"),
])
def test_mistakes_are_one_sentence(cli, folder, args, why):
    ran = cli("plan", folder, "--gpu", "h100", *args)
    assert ran.status == 2 and why in ran.sentence() and len(ran.err.strip().splitlines()) == 1


def test_an_impossible_budget_says_what_it_would_cost(cli, folder):
    """Not that nothing fits: that is another problem, with other ways out."""
    ran = cli("plan", folder, "--gpu", "h100", "--gpus", "8", "--tokens", "1T", "--budget", "10", "--json")
    d = ran.json
    assert ran.status == 1 and d["best"] is None and d["plans"] == []
    assert d["cheapest_usd"] > 10_000 and any("budget" in r["why"] for r in d["rejected"]) and any("--minimize cost" in line for line in d["advice"])
    enough = cli("plan", folder, "--gpu", "h100", "--gpus", "8", "--tokens", "1T", "--budget", str(d["cheapest_usd"] * 1.001), "--json").json
    assert enough["plans"][enough["best"]]["usd"] == pytest.approx(d["cheapest_usd"])


@pytest.mark.parametrize("batch", [1, 7, 12, 24, 100])
def test_the_batch_is_the_one_that_was_asked_for(batch):
    """No plan rounds it: 7 sequences on 8 GPUs go through a pipeline or tensor parallelism, or not at all."""
    r = plan(LLAMA, H100, 8, workload=Workload(1024), batch=batch)
    assert r.plans and {p.workload.micro_batch * p.workload.microbatches(p.strategy) * p.strategy.dp for p in r.plans} == {batch}


def test_the_smallest_number_is_found():
    r = plan(LLAMA, H100, None, workload=Workload(4096), base=Strategy(recompute="full"))
    assert r.best is not None and r.gpus <= 8
    assert all(p.strategy.gpus == r.gpus for p in r.plans)


def test_the_network_is_heard():
    slow, fast = (plan(LLAMA, H100, 64, workload=Workload(4096), network=n).headline.step_seconds.value for n in (1.0, 400.0))
    assert slow > fast


PRICES = {"$1,600.50": 1600.5, "1.600,50": 1600.5, "16,00": 16, "3,2": 3.2, "0,750": 0.75, "1,600": 1600, "12 - 14": 14, "12–14 USD/hr": 14, "US$ 3.2": 3.2, "3.20 per hour": 3.2, "1 600,50": 1600.5,
          "€20": None, "20 EUR": None, "£3.2": None, "¥20": None, "n/a": None, "": None, "-5": None, "0": None, "inf": None, "1e3": None, "from 2.5": None, "10-": None, "1.2.3": None, "1,2,3": None}


@pytest.mark.parametrize("cell,usd", PRICES.items())
def test_a_cell_is_read_as_it_is_meant_or_not_at_all(cell, usd): assert price_number(cell) == usd


HEAD, ROWS = ["Cloud", "GPU Type", "GPUs", "On-demand"], [["Café", "H100 (80 GB)", "8", "16.00"], ["B", "H100 (80 GB)", "8", ""], ["C", "H100 (80 GB)", "8", "20-24"], ["D", "H100 (80 GB)", "8", "€ 8"]]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_files_as_spreadsheets_export_them(tmp_path, separator, encoding):
    """Separators, byte-order marks and code pages; blanks and other currencies are skipped and told, a range counts by its higher end."""
    file = tmp_path / "prices.csv"
    file.write_bytes("\r\n".join(separator.join(row) for row in [HEAD, *ROWS]).encode(encoding))
    found = read_prices(file)
    assert [(p.cloud, p.usd_per_hour) for p in found.prices] == [("Café", 16.0), ("C", 24.0)]
    assert len(found.skipped) == 2 and "line 3" in found.skipped[0] and "line 5" in found.skipped[1]


@pytest.mark.parametrize("data,why", [(b"", "no prices"), (bytes(range(256)) * 9, "not text"), (b"a,b\n1,2\n", "none of the columns"), (b"Cloud,GPU Type,GPUs,On-demand\n", "no prices"), (b"Cloud,GPU Type,GPUs,On-demand\nA,H100,8,free\n", "no row with a price")])
def test_files_that_are_none(tmp_path, data, why):
    (tmp_path / "p.csv").write_bytes(data)
    with pytest.raises(BadInput, match=why): read_prices(tmp_path / "p.csv")
