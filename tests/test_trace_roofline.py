"""Seconds of a step from its trace: shapes, layouts and cards order as they must, and the command answers with the agreed keys."""
import pytest

pytest.importorskip("torch")
import torch  # noqa: E402

from fsdl_devinfra.core.device_table import devices, find_device  # noqa: E402
from fsdl_devinfra.trace.roofline import Card, product_flops, step_time, tile_share  # noqa: E402
from fsdl_devinfra.trace.steps import StepOptions, record_step  # noqa: E402

NET = """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.Linear(32, 10)
    def forward(self, x): return self.b(self.a(x).relu().mean((2, 3)))
def words(): return torch.nn.Sequential(torch.nn.Embedding(100, 64), torch.nn.Linear(64, 64))
"""


def convolutions(groups=1, width=128):
    return torch.nn.Sequential(*[torch.nn.Conv2d(width, width, 3, padding=1, groups=groups) for _ in range(4)])


def seconds(gpu="a100-80", groups=1, batch=64, channels_last=False, width=128, **options):
    trace = record_step(convolutions(groups, width), torch.empty(batch, width, 56, 56), StepOptions(precision="fp16-mixed", **options), steps=1)
    return step_time(trace, Card(find_device(gpu), channels_last, inference=options.get("inference", False)))


def test_work_of_convolutions_is_counted_from_their_shapes():
    trace = record_step(convolutions(), torch.empty(8, 128, 56, 56), StepOptions(inference=True), steps=1)
    done = [o for o in trace.operators if o.kernel == "convolution"]
    assert [product_flops(o) for o in done] == [2 * 8 * 56 * 56 * 128 * 128 * 9] * 4
    trained = record_step(convolutions(4), torch.empty(8, 128, 56, 56), StepOptions(), steps=1)
    back = next(o for o in trained.operators if o.name == "aten.convolution_backward")
    assert product_flops(back) == 2 * 2 * 8 * 56 * 56 * 128 * 32 * 9


def test_faster_cards_and_better_layouts_take_less():
    by_card = [seconds(gpu, inference=True).step.value for gpu in ("t4", "v100", "a100-80", "h100")]
    assert by_card == sorted(by_card, reverse=True)
    assert seconds(inference=True, width=16, batch=1024, channels_last=True).step.value < seconds(inference=True, width=16, batch=1024).step.value
    assert seconds(inference=True).step.value < seconds().step.value / 2
    assert seconds(groups=128, inference=True).by_kernel["depthwise"] < seconds(inference=True).by_kernel["convolution"]
    assert seconds(groups=128).by_kernel["depthwise"] > seconds().by_kernel["convolution"]  # the gradient of each tap finds its place anew


def test_one_sample_waits_for_the_host():
    found = seconds(batch=1, inference=True)
    assert found.step.value == found.host > sum(found.by_kernel.values()) - 1e-9


def test_every_card_gets_an_answer():
    trace = record_step(convolutions(), torch.empty(8, 128, 56, 56), StepOptions(precision="fp16-mixed", inference=True), steps=1)
    for device in devices():
        found = step_time(trace, Card(device)).step
        assert 0 < found.low < found.value < found.high < 10, device.name


def test_shares_stay_below_one():
    for dims in ([1, 1, 1, 1], [1, 128, 128, 64], [64, 197, 197, 64], [1, 100_000, 4096, 4096], [1000, 7, 3, 5]):
        for units in (1, 56, 132): assert 0 < tile_share(dims, units) <= 1


def test_cost_of_a_file_as_a_command(cli, tmp_path):
    file = tmp_path / "net.py"
    file.write_text(NET)
    found = cli("cost", f"{file}:Net", "--inference", "--batch-size", 32, "--precision", "fp16-mixed", "--gpu", "4090", "--json")
    step, rate = found.json["step_seconds"], found.json["samples_per_second"]
    assert found.status == 0 and step["low"] < step["value"] < step["high"] and rate["value"] == pytest.approx(32 / step["value"])
    keys = {"tokens_per_second_per_gpu", "mfu", "flops_convention", "hours", "usd", "assumptions", "fits"}
    assert keys <= set(found.json) and found.json["tokens_per_second_per_gpu"] is None and 0 < found.json["mfu"] < 1
    refused = cli("cost", f"{file}:Net", "--gpu", "4090", "--dp", 2, "--json")
    assert refused.status == 2 and "one GPU" in refused.json["error"]


@pytest.mark.slow
def test_cost_of_words_and_of_what_does_not_fit(cli, tmp_path):
    file = tmp_path / "net.py"
    file.write_text(NET)
    words = cli("cost", f"{file}:words", "--batch-size", 4, "--seq-len", 128, "--gpu", "4090", "--json").json
    assert words["tokens_per_second_per_gpu"]["value"] == pytest.approx(128 * words["samples_per_second"]["value"])
    large = cli("cost", f"{file}:Net", "--batch-size", 20000, "--precision", "fp32", "--gpu", "t4", "--json")
    assert large.status == 1 and large.json["fits"] == "no"


def test_a_snapshot_holds_what_the_replay_holds(tmp_path):
    import pickle

    from fsdl_devinfra.trace.allocator import replay
    from fsdl_devinfra.trace.timeline import write_snapshot
    trace = record_step(convolutions(), torch.empty(4, 128, 28, 28), StepOptions())
    seen = pickle.loads(write_snapshot(trace, tmp_path / "snapshot.pickle").read_bytes())
    done = replay(trace)
    assert sum(s["total_size"] for s in seen["segments"]) == sum(s.size for s in done.segments)
    assert all(sum(b["size"] for b in s["blocks"]) == s["total_size"] for s in seen["segments"])
    alive = highest = 0
    for entry in seen["device_traces"][0]:
        alive += {"alloc": 1, "free_completed": -1}.get(entry["action"], 0) * entry["size"]
        highest = max(highest, alive)
    assert highest == done.allocated
