"The words of `memory` agree with its numbers, and options that would be ignored are refused."
import re
import shlex

import pytest

from fsdl_devinfra.core.device_table import find_device
from fsdl_devinfra.core.errors import BadInput
from fsdl_devinfra.core.units import size_text
from fsdl_devinfra.memory.architecture import Architecture
from fsdl_devinfra.memory.commands import register
from fsdl_devinfra.core.command import Parser
from fsdl_devinfra.memory.footprint import estimate
from fsdl_devinfra.memory.overview_screen import overview_of
from fsdl_devinfra.memory.serving import ServeOptions, serve
from fsdl_devinfra.memory.strategy import Strategy

LLAMA = Architecture.from_model("llama-3.1-8b")
LARGE = Architecture.from_model("llama-3.1-70b")


def run(line):
    parser = Parser("fsdl-devinfra memory")
    register(parser)
    args = parser.parse_args(shlex.split(line))
    return args.run(args)


def allocator_note(footprint): return next(n for n in footprint.assumptions if n.startswith("Allocator"))


def gibibytes(text): return [float(x) for x in re.findall(r"([\d.]+) GiB", text)]


def test_the_parts_of_the_reserve_add_up_and_name_the_gradients():
    f = estimate(LLAMA)
    reserve, freed, gradients, fragments, _ = gibibytes(allocator_note(f))
    assert reserve == pytest.approx(f.per_gpu_bytes["reserve"] / 2**30, abs=0.05)
    assert freed + fragments == pytest.approx(reserve, abs=0.05)
    assert gradients == pytest.approx(4 * LLAMA.parameters / 2**30, rel=0.01) and gradients <= freed


def test_a_reserve_without_freed_blocks_is_fragmentation_alone():
    note = allocator_note(estimate(LLAMA, Strategy(dp=8, framework="megatron")))
    assert "freed" not in note and "fragmentation" in note


@pytest.mark.parametrize("gpu", ["b200", "h100"])
def test_the_parts_add_up_to_the_figure_of_the_device(gpu):
    f = estimate(LLAMA, device=find_device(gpu))
    assert sum(f.per_gpu_bytes.values()) == pytest.approx(f.device_bytes.value, abs=10)
    assert ("gives back" in allocator_note(f)) == (gpu == "b200")


def test_what_a_use_needs_is_not_capped_by_the_largest_gpu():
    screen = overview_of(LLAMA, gpus=("RTX-3060-12GB", "A100-SXM-80GB", "H200-SXM-141GB"))
    free = estimate(LLAMA, Strategy(recompute="full")).device_bytes.value
    assert screen.cells()[-1][-1] == size_text(free)  # more than an H200, whose row stops at its size
    assert screen.of("full training")[-1].peak_bytes < free


@pytest.mark.parametrize("model, engine", [("8b", "vllm"), ("8b", "sglang"), ("8b", "llama.cpp"), ("70b", "vllm")])
def test_what_would_make_serving_fit_does(model, engine):
    outcome = run(f"llama-3.1-{model} --serve {engine} --gpu rtx-3090")
    remedies = outcome.document["remedies"]
    assert outcome.status == 1 and "0 B" not in outcome.text and remedies
    for remedy in remedies:
        again = run(remedy.split("fsdl-devinfra memory ")[1])
        assert (again.status, again.document["fits"]) == (0, "yes")


def test_serving_that_fits_needs_no_remedy():
    assert not serve(LLAMA, ServeOptions(), find_device("h100"))[1].remedies


def test_serving_that_nothing_helps_says_so():
    remedies = serve(LARGE, ServeOptions("llama.cpp"), find_device("rtx-3060"))[1].remedies
    assert len(remedies) == 1 and "smaller model" in remedies[0]


@pytest.mark.parametrize("line, why", [
    ("llama-3.1-8b --lengths 500,200", "--lengths"),
    ("llama-3.1-8b --framework hf --padding packed --lengths 500,200", "--lengths"),
    ("llama-3.1-8b --max-model-len 8192", "--max-model-len"),
    ("llama-3.1-8b --serve vllm --gpu h100 --solve kv-tokens", "--serve"),
    ("llama-3.1-8b --row", "check-log"),
    ("llama-3.1-8b --of gpt2", "check-log"),
    ("nowhere.gguf", "no file nowhere.gguf"),
])
def test_what_would_be_ignored_is_refused(line, why):
    with pytest.raises(BadInput, match=why): run(line)


def test_the_same_options_where_they_count():
    assert run("llama-3.1-8b --framework hf --lora-rank 8 --recompute full --lengths 500,200").status == 0
    assert run("llama-3.1-8b --serve vllm --max-model-len 8192").status == 0
    assert run("llama-3.1-8b --inference --gpu h100 --solve kv-tokens").status == 0
