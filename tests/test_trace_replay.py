"""The allocator's invariants under random orders, the recorder's account of a step, and the command for modules named as code."""
import random

import pytest

pytest.importorskip("torch")
import torch  # noqa: E402

from fsdl_devinfra.trace.allocator import MIB, AllocatorOptions, CachingAllocator, OutOfMemory, replay  # noqa: E402
from fsdl_devinfra.core.errors import BadInput  # noqa: E402
from fsdl_devinfra.trace.naming import named_module  # noqa: E402
from fsdl_devinfra.trace.reading import at_batch, largest_batch, without_workspaces  # noqa: E402
from fsdl_devinfra.trace.steps import StepOptions, record_step  # noqa: E402

NET = """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.Linear(32, 10)
    def forward(self, x): return self.b(self.a(x).relu().mean((2, 3)))
def fails(): raise RuntimeError("on purpose")
def leaves(): raise SystemExit(3)
"""
DATA = """
from __future__ import annotations
from dataclasses import dataclass
import torch
@dataclass
class Sizes:
    width: int = 8
def make():
    import beside
    return torch.nn.Linear(Sizes().width, beside.OUT)
"""


def net():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.BatchNorm2d(32), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
                               torch.nn.Flatten(), torch.nn.Linear(32, 10))


@pytest.mark.parametrize("options", [AllocatorOptions(), AllocatorOptions(expandable_segments=True), AllocatorOptions(max_split_size_mb=32),
                                     AllocatorOptions(roundup_power2_divisions=4)], ids=["default", "expandable", "max-split", "power2"])
def test_blocks_never_overlap_and_all_comes_back(options):
    draw, allocator, held = random.Random(3), CachingAllocator(options), []
    for _ in range(1500):
        if held and draw.random() < 0.45: allocator.free(held.pop(draw.randrange(len(held))))
        else: held.append(allocator.malloc(draw.choice((700, 40_000, 3 * MIB, 15 * MIB, 70 * MIB)) + draw.randrange(5000), draw.randrange(2)))
        assert allocator.allocated == sum(b.size for b in held) <= allocator.reserved
    spans = sorted((b.address, b.address + b.size) for b in held)
    assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:]))
    for block in held: allocator.free(block)
    allocator.release_cached()
    assert (allocator.allocated, allocator.reserved) == (0, 0)


def test_the_limit_is_kept():
    draw, allocator = random.Random(5), CachingAllocator(limit=500 * MIB)
    with pytest.raises(OutOfMemory):
        for _ in range(100): allocator.malloc(draw.randrange(1, 40) * MIB)
    assert 440 * MIB < allocator.reserved <= 500 * MIB


def test_parameters_gradients_and_states_are_counted_once():
    model = net()
    trace = record_step(model, torch.empty(16, 3, 32, 32), StepOptions(optimizer="adamw"))
    trained = sum(p.numel() * 4 for p in model.parameters())
    second = [a for a in trace.allocations if a.kind == "gradients" and trace.operators[a.operator].step == 1]
    assert sum(a.size for a in second) == trained
    states = sum(a.size for a in trace.allocations if a.kind == "optimizer" and a.freed is None)
    assert states == 2 * trained + 4 * len(list(model.parameters()))  # two moments, and a step counter for each parameter
    assert all(p.grad is None for p in model.parameters())


def test_inference_keeps_no_activations():
    layers = torch.nn.Sequential(*[torch.nn.Linear(256, 256) for _ in range(12)])
    trained, run = (replay(record_step(layers, torch.empty(8192, 256), StepOptions(inference=i))) for i in (False, True))
    assert run.allocated < 0.5 * trained.allocated


def test_mixed_precision_keeps_half():
    def kept(precision):
        trace = record_step(torch.nn.Sequential(*[torch.nn.Linear(512, 512) for _ in range(6)]), torch.empty(4096, 512), StepOptions(precision=precision))
        return sum(a.size for a in trace.allocations if trace.operators[a.operator].name == "aten.addmm")
    assert kept("bf16-mixed") == kept("fp32") / 2


def test_every_batch_from_two_traces():
    small, large, traced = (record_step(net(), torch.empty(n, 3, 64, 64)) for n in (8, 32, 100))
    assert replay(at_batch(small, large, (8, 32), 100)).reserved == replay(traced).reserved
    most = largest_batch(small, large, (8, 32), 1 << 30)
    assert replay(record_step(net(), torch.empty(most, 3, 64, 64)), limit=1 << 30).out_of_memory is None
    assert replay(record_step(net(), torch.empty(most + 1, 3, 64, 64)), limit=1 << 30).out_of_memory is not None


def test_autocast_steps_are_solved_too():
    "Autocast empties its cache in an order of addresses: the events of two batches were hardly ever the same."
    layers = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(40)])
    small, large, traced = (record_step(layers, torch.empty(n, 64), StepOptions("bf16-mixed")) for n in (8, 32, 100))
    assert small.events == large.events
    assert replay(at_batch(small, large, (8, 32), 100)).reserved == replay(traced).reserved


def test_a_convolution_does_without_its_room():
    "The copies in tensor cores' layout, or Winograd's tiles, are taken where there is room; a step that fits without them does not run out."
    trace = record_step(net(), torch.empty(64, 3, 64, 64))
    bare = replay(without_workspaces(trace)).reserved
    assert replay(trace).reserved > 1.2 * bare
    assert replay(trace, limit=bare + 24 * MIB).out_of_memory is None
    assert replay(trace, limit=bare // 2).out_of_memory is not None  # tensors are not done without


@pytest.mark.parametrize("precision", ["fp16-mixed", "bf16"])
def test_channels_last_and_whole_precision(precision):
    "PyTorch 2.14 cannot exchange fake parameters: `Module.to` failed there."
    trace = record_step(net(), torch.empty(4, 3, 32, 32), StepOptions(precision=precision, channels_last=True))
    weights = sum(p.numel() for p in net().parameters())
    floats = sum(b.numel() for b in net().buffers() if b.is_floating_point())
    held = sum(a.size for a in trace.allocations if a.kind == "parameters")
    assert held == (weights + floats) * (2 if precision == "bf16" else 4) + 8  # and the counter of a normalisation


def test_files_that_leave_or_need_their_folder(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "data.py").write_text(DATA)
    (tmp_path / "beside.py").write_text("OUT = 3")
    (tmp_path / "quits.py").write_text("import sys\nsys.exit(4)")
    assert named_module(f"{tmp_path}/data.py:make").weight.shape == (3, 8)
    for name in ("net.py:leaves", "quits.py:Net"):
        with pytest.raises(BadInput, match="SystemExit"): named_module(f"{tmp_path}/{name}")


def test_a_file_as_a_command(cli, tmp_path):
    file = tmp_path / "net.py"
    file.write_text(NET)
    found = cli("memory", f"{file}:Net", "--batch-size", 32, "--precision", "fp32", "--gpu", "t4", "--json")
    assert found.status == 0 and found.json["fits"] == "yes" and found.json["model"]["parameters"] == 3 * 32 * 9 + 32 + 330
    assert sum(found.json["per_gpu_bytes"].values()) == pytest.approx(found.json["device_bytes"]["value"], rel=1e-6)
    large = cli("memory", f"{file}:Net", "--batch-size", 20000, "--precision", "fp32", "--gpu", "t4", "--json")
    assert large.status == 1 and large.json["fits"] == "no"
    for member, said in (("fails", "on purpose"), ("absent", "absent")):
        refused = cli("memory", f"{file}:{member}", "--json")
        assert refused.status == 2 and said in refused.json["error"] + refused.json["hint"]


@pytest.mark.parametrize(("batch", "measured"), [(8, 2153), (32, 3291), (128, 7269)])
def test_a_timm_model_as_a_command(cli, batch, measured):
    pytest.importorskip("timm", reason="timm and torchvision are in an environment of their own")
    found = cli("memory", "timm:resnet18", "--batch-size", batch, "--precision", "fp32", "--optimizer", "sgd", "--gpu", "a100-40", "--json")
    assert found.json["device_bytes"]["value"] == pytest.approx(measured << 20, rel=0.2)  # itu-rad/GPUMemNet; 0, 11 and 18 % too low


def test_an_unknown_timm_model_is_refused(cli):
    pytest.importorskip("timm", reason="timm and torchvision are in an environment of their own")
    assert cli("memory", "timm:resnot18", "--json").status == 2
