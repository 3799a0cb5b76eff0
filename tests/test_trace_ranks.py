"""One rank of several: what it holds, against closed forms."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fsdl_devinfra.cli import main

pytest.importorskip("torch")
pytestmark = pytest.mark.slow
Run = Callable[..., dict]
MIB = 1 << 20
#: bytes of the weights below, fp32
LAYER, BLOCKS = 4 * 1024 * 4096, 4
WEIGHTS = BLOCKS * (2 * LAYER + 4 * (4096 + 1024))

START = """
import os, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(1024, 4096), torch.nn.Linear(4096, 1024)
    def forward(self, x): return x + self.down(self.up(x).relu())
dist.init_process_group("nccl")
assert dist.get_rank() == 0 and dist.get_world_size() == int(os.environ["WORLD_SIZE"]) == torch.cuda.device_count()
rank = int(os.environ["LOCAL_RANK"])
torch.cuda.set_device(rank)
model = torch.nn.Sequential(*[Block() for _ in range(4)]).to(rank)
"""
TRAIN = """
optimizer = torch.optim.AdamW(model.parameters())
for _ in range(50):
    loss = model(torch.randn(8, 1024, device="cuda")).pow(2).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    print(mean.item())
dist.barrier()
if rank == 0: torch.save(model.state_dict(), "model.pt")
dist.destroy_process_group()
"""
PLAIN = START + TRAIN
DDP = START + "model = torch.nn.parallel.DistributedDataParallel(model, device_ids=[rank])" + TRAIN
VIEWS = START + "model = torch.nn.parallel.DistributedDataParallel(model, device_ids=[rank], gradient_as_bucket_view=True)" + TRAIN
SHARDED = START + """
from torch.distributed.fsdp import fully_shard
for block in model: fully_shard(block)
fully_shard(model)
""" + TRAIN
TENSOR = START + """
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
mesh = init_device_mesh("cuda", (dist.get_world_size(),))
for block in model: parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
""" + TRAIN


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    def started(script: str, ranks: int) -> dict:
        (tmp_path / "train.py").write_text(script)
        monkeypatch.chdir(tmp_path)
        status = main(["dryrun", "--json", "--gpu", "a100-40", "--gpus", str(ranks), "--", "train.py"])
        said = capfd.readouterr()
        found = json.loads(said.out)
        assert status == 0, (found, said.err[-3000:])
        assert [p.name for p in tmp_path.iterdir()] == ["train.py"]
        return found
    return started


def held(found: dict, kind: str) -> int:
    "Bytes of a kind when a step has ended."
    return found["timeline"][-1].get(kind, 0)


def highest(found: dict) -> int:
    "The most that tensors take once there are states."
    return max(sum(v for k, v in m.items() if k not in ("event", "workspace")) for m in found["timeline"] if "optimizer" in m)


def test_replicas_hold_everything_and_buckets(run: Run) -> None:
    plain, replica, views = run(PLAIN, 4), run(DDP, 4), run(VIEWS, 4)
    assert held(replica, "optimizer") == pytest.approx(2 * WEIGHTS, rel=1e-4)
    more = replica["allocated_bytes"]["value"] - plain["allocated_bytes"]["value"]
    assert more == pytest.approx(WEIGHTS, rel=0.01)
    assert views["allocated_bytes"]["value"] == pytest.approx(plain["allocated_bytes"]["value"], rel=1e-3)
    assert any("rank 0 of 4" in line for line in replica["assumptions"])


@pytest.mark.parametrize("ranks", [2, 8])
def test_fsdp_holds_its_share(run: Run, ranks: int) -> None:
    found = run(SHARDED, ranks)
    assert held(found, "optimizer") == pytest.approx(2 * WEIGHTS / ranks, rel=0.01)
    assert held(found, "parameters") == pytest.approx(WEIGHTS / ranks, rel=0.01)
    states = 4 * WEIGHTS / ranks  # weights, gradients and two moments; at the peak of backward, at most three blocks are gathered or reduced
    assert states * 0.95 < highest(found) < states + 5 * WEIGHTS / BLOCKS


@pytest.mark.parametrize("ranks", [2, 4])
def test_tensor_parallel_holds_its_share(run: Run, ranks: int) -> None:
    found = run(TENSOR, ranks)
    assert held(found, "optimizer") == pytest.approx(2 * WEIGHTS / ranks, rel=0.01)
    assert held(found, "parameters") == pytest.approx(WEIGHTS / ranks, rel=0.01)
    assert highest(found) == pytest.approx(5 * WEIGHTS / ranks, rel=0.02)  # the step's own temporaries are a fifth share


DATA = """
import torch
class Rows(torch.utils.data.Dataset):
    def __len__(self): return 512
    def __getitem__(self, index): return dict(input_ids=torch.randint(0, 100, (32,)), labels=torch.tensor(index % 2))
def seen(module, args, kwargs): print("batch", tuple((kwargs.get("input_ids") if kwargs else args[0]).shape))
"""
#: script and the batch of one rank, as each library's documentation starts a run on several GPUs
LIBRARIES = {
    "accelerate": (DATA + """
from accelerate import Accelerator
accelerator = Accelerator()
model = torch.nn.Sequential(torch.nn.Embedding(100, 64), torch.nn.Flatten(), torch.nn.Linear(32 * 64, 2))
model.register_forward_pre_hook(seen, with_kwargs=True)
model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters()), torch.utils.data.DataLoader(Rows(), 16))
for _ in range(3):
    for batch in loader:
        accelerator.backward(torch.nn.functional.cross_entropy(model(batch["input_ids"]), batch["labels"]))
        optimizer.step()
        optimizer.zero_grad()
accelerator.wait_for_everyone()
accelerator.save_state("checkpoint")
""", (16, 32)),
    "transformers": (DATA + """
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
model = BertForSequenceClassification(BertConfig(vocab_size=100, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64))
model.register_forward_pre_hook(seen, with_kwargs=True)
Trainer(model, TrainingArguments("out", per_device_train_batch_size=8, max_steps=6, report_to=[]), train_dataset=Rows()).train()
""", (8, 32)),
    "pytorch_lightning": (DATA + """
import pytorch_lightning as lightning
class Net(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Embedding(100, 64), torch.nn.Flatten(), torch.nn.Linear(32 * 64, 2))
        self.net.register_forward_pre_hook(seen, with_kwargs=True)
    def training_step(self, batch, index): return torch.nn.functional.cross_entropy(self.net(batch["input_ids"]), batch["labels"])
    def configure_optimizers(self): return torch.optim.Adam(self.parameters())
lightning.Trainer(max_epochs=2, accelerator="gpu", devices=4, strategy="ddp").fit(Net(), torch.utils.data.DataLoader(Rows(), 32))
""", (32, 32)),
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_on_four_ranks_sees_the_batch_of_one(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                       capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(library)
    script, batch = LIBRARIES[library]
    (tmp_path / "train.py").write_text(script)
    monkeypatch.chdir(tmp_path)
    status = main(["dryrun", "--json", "--gpu", "a100-40", "--gpus", "4", "--", "train.py"])
    said = capfd.readouterr()
    found = json.loads(said.out)
    assert (status, found["script_exit"]) == (0, 0) and found["steps"] >= 3, (found, said.err[-3000:])
    assert any("rank 0 of 4" in line for line in found["assumptions"])
    assert f"batch {batch}" in said.err and said.err.count("batch (") == said.err.count(f"batch {batch}"), said.err[-3000:]
    assert [p.name for p in tmp_path.iterdir()] == ["train.py"]
