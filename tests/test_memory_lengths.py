"""Batches of changing lengths: what is said on the command line, what it does to the range, and what it must leave alone."""
import json
import subprocess
import sys

import pytest

from fsdl_devinfra.core.device_table import find_device
from fsdl_devinfra.core.errors import BadInput
from fsdl_devinfra.memory import Architecture, Strategy, Workload, estimate
from fsdl_devinfra.memory.lengths import Lengths, holes, reserved_after, step_moves, typical_records
from fsdl_devinfra.trace.allocator import CachingAllocator

MODEL = Architecture.from_numbers(8, 1024, 8, 32_000, ffn=4096)
TUNED = Strategy(framework="hf", lora_rank=8, recompute="full")
SAID = "900,600"


def peak(strategy, workload, measure="reserved"):
    return estimate(MODEL, strategy, workload, None, measure, advice=False).peak_bytes


def run(*words):
    return subprocess.run([sys.executable, "-m", "fsdl_devinfra", "memory", *words, "--json"], capture_output=True, text=True)


def test_lengths_raise_what_is_reserved_and_not_what_is_allocated():
    equal, changing = Workload(2048), Workload(2048, lengths=SAID)
    assert peak(TUNED, changing).value > peak(TUNED, equal).value
    assert peak(TUNED, changing, "allocated") == peak(TUNED, equal, "allocated")


@pytest.mark.parametrize("strategy", [Strategy(lora_rank=8, recompute="full"), Strategy(framework="hf", padding="packed"),
                                      Strategy(framework="hf", padding="fixed"), Strategy(framework="hf", inference=True)])
def test_nothing_changes_where_lengths_do_not(strategy):
    assert holes(MODEL, strategy, Workload(2048, lengths=SAID)).high == 0
    assert peak(strategy, Workload(2048, lengths=SAID)) == peak(strategy, Workload(2048))


def test_unsaid_lengths_are_in_the_upper_bound_alone():
    fixed, padded = Strategy(framework="hf", recompute="full", padding="fixed"), Strategy(framework="hf", recompute="full")
    assert peak(fixed, Workload(2048)).value == peak(padded, Workload(2048)).value
    assert peak(fixed, Workload(2048)).high < peak(padded, Workload(2048)).high


def test_only_records_matter():
    moves = step_moves(MODEL, TUNED)
    assert reserved_after(moves, [600, 900, 700, 2048, 64]) == reserved_after(moves, [600, 900, 2048])
    assert reserved_after(moves, [2048, 900, 600]) == reserved_after(moves, [2048])
    assert reserved_after(moves, typical_records(2048)) > reserved_after(moves, [2048])


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("loss", ["full", "fused"])
def test_a_step_gives_back_what_it_took(recompute, loss):
    strategy, allocator, held = Strategy(framework="hf", recompute=recompute, loss=loss), CachingAllocator(), {}
    for name, size in step_moves(MODEL, strategy):
        if size:
            assert name not in held, f"{name} is taken twice"
            held[name] = allocator.malloc(int(size * 100))
        else: allocator.free(held.pop(name))
    assert not held and allocator.allocated == 0


def test_a_file_of_lengths_is_replayed_in_its_order(tmp_path):
    rising, falling = tmp_path / "rising.txt", tmp_path / "falling.json"
    rising.write_text("\n".join(str(n) for n in range(200, 2000, 60)))
    falling.write_text(json.dumps(list(range(2000, 200, -60))))
    said = [holes(MODEL, TUNED, Workload(2048, lengths=str(path))).value for path in (rising, falling)]
    assert said[0] > said[1]


@pytest.mark.parametrize("text", ["", "abc", "0,5", "5,-1", "5,5,never", "1e99,2"])
def test_nonsense_is_refused(text):
    with pytest.raises(BadInput): Lengths.parse(text)


def test_command():
    words = ["llama-3.1-8b", "--framework", "hf", "--lora-rank", "8", "--recompute", "full", "--seq-len", "2048"]
    plain, said, wrong = run(*words), run(*words, "--lengths", "900,600"), run(*words, "--lengths", "nowhere.txt")
    assert json.loads(said.stdout)["workload"]["lengths"] == "900,600" and json.loads(plain.stdout)["workload"]["lengths"] is None
    assert json.loads(said.stdout)["peak_bytes"]["value"] > json.loads(plain.stdout)["peak_bytes"]["value"]
    assert wrong.returncode == 2 and "nowhere.txt" in wrong.stdout + wrong.stderr


def test_remedies_keep_the_lengths():
    found = estimate(MODEL, Strategy(framework="hf"), Workload(4096, 16, lengths=SAID), find_device("v100-16"))
    assert found.fits != "yes" and any("--lengths 900,600" in line for line in found.remedies)


@pytest.mark.parametrize("said", ["100,0", "500,300", "100,0,dropped"])
def test_a_limit_that_no_sample_reaches_is_not_what_is_held(said):
    """Parts were those of --seq-len and the reserve what was missing to the whole: −640 GiB for 131,072 tokens."""
    found = estimate(MODEL, TUNED, Workload(2048 * 16, lengths=said))
    assert min(found.per_gpu_bytes.values()) >= 0 and min(size for part in found.timeline.values() for size in part.values()) >= 0
    nearer = estimate(MODEL, TUNED, Workload(2048 * 4, lengths=said))
    assert found.peak_bytes.value == pytest.approx(nearer.peak_bytes.value, rel=0.01)


def test_equal_lengths_are_a_limit_of_that_length():
    said, limit = estimate(MODEL, TUNED, Workload(8192, 2, lengths="100,0")), estimate(MODEL, TUNED, Workload(100, 2))
    assert said.peak_bytes.value == limit.peak_bytes.value and said.per_gpu_bytes == limit.per_gpu_bytes


def test_samples_longer_than_the_limit_are_cut_to_it():
    """The control: where samples reach the limit, it is what is counted."""
    cut, limit = estimate(MODEL, TUNED, Workload(512, lengths="3000,10")), estimate(MODEL, TUNED, Workload(512))
    assert cut.peak_bytes.value == limit.peak_bytes.value
