"""Scripts as their libraries' documentation writes them: followed whole, with the right outcome, and nothing written."""
from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fsdl_devinfra.cli import main

pytest.importorskip("torch")
Run = Callable[..., tuple[int, dict, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    "Status, document and standard error of a dry run, in a folder and a home of its own."
    def started(script: str, *options: str, arguments: tuple[str, ...] = ()) -> tuple[int, dict, str]:
        (tmp_path / "train.py").write_text(script)
        (tmp_path / "home").mkdir(exist_ok=True)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.chdir(tmp_path)
        status = main(["dryrun", "--json", "--gpu", "a100-40", *options, "--", "train.py", *arguments])
        said = capfd.readouterr()
        return status, json.loads(said.out), said.err
    return started


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def fits(found: tuple[int, dict, str], folder: Path) -> dict:
    "The document of a script that fits, which wrote nothing and does not grow."
    status, document, errors = found
    assert (status, document.get("fits")) == (0, "yes"), (document, errors[-3000:])
    assert document["script_exit"] == 0 and document["out_of_memory"] is None and document["growth_bytes_per_step"] == 0
    assert files(folder) == ["train.py"]
    return document


FILES = """
import glob, json, os, pathlib, shutil, sqlite3, tempfile
import numpy as np, torch
old = pathlib.Path("kept")
assert sorted(os.listdir(old)) == ["a.txt", "b.txt"]
(old / "c.txt").write_text("new")
(old / "a.txt").write_text("changed")
os.remove(old / "b.txt")
assert sorted(os.listdir(old)) == sorted(p.name for p in old.iterdir()) == ["a.txt", "c.txt"] and (old / "a.txt").read_text() == "changed"
assert sorted(glob.glob("kept/*.txt")) == ["kept/a.txt", "kept/c.txt"] and not (old / "b.txt").exists()
with open(old / "a.txt", "a") as file: file.write(" twice")
assert open("kept/a.txt").read() == "changed twice"
shutil.rmtree("kept")
os.makedirs("kept")
assert os.listdir("kept") == []
home = pathlib.Path.home() / ".cache" / "mine"
home.mkdir(parents=True)
np.save(home / "x.npy", np.zeros(3))
np.savetxt(home / "x.txt", np.zeros(3))
os.rename(home / "x.txt", home / "y.txt")
assert np.load(home / "x.npy").shape == (3,) and [p.name for p in sorted(home.iterdir())] == ["x.npy", "y.txt"]
with tempfile.TemporaryDirectory() as folder: open(os.path.join(folder, "f"), "w").write("x")
table = sqlite3.connect("runs.db")
table.execute("create table runs (name text)")
table.commit()
os.makedirs("outputs/day")
os.chdir("outputs/day")
open("log.txt", "w").write("x")
assert os.path.isfile("log.txt") and os.path.isdir("../../kept") and os.getcwd().endswith("outputs/day")
try: os.rmdir("..")
except OSError: pass
else: raise SystemExit("a folder that is not empty went")
net = torch.nn.Linear(64, 64).cuda()
optimizer = torch.optim.Adam(net.parameters())
for step in range(20):
    net(torch.randn(8, 64, device="cuda")).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, "last.pt")
    kept = torch.load("last.pt", map_location="cpu")
    assert kept["step"] == step and kept["net"]["weight"].device.type == "cpu"
    net.load_state_dict(kept["net"])
    optimizer.load_state_dict(kept["optimizer"])
"""


def test_a_script_finds_its_own_files_and_the_users_stay(tmp_path: Path, run: Run) -> None:
    (tmp_path / "kept").mkdir()
    for name in ("a.txt", "b.txt"): (tmp_path / "kept" / name).write_text("old")
    status, document, errors = run(FILES)
    assert status == 0, (document, errors[-3000:])
    assert files(tmp_path) == ["kept/a.txt", "kept/b.txt", "train.py"]
    assert {(tmp_path / "kept" / name).read_text() for name in ("a.txt", "b.txt")} == {"old"}


C_LIBRARY = """
import ctypes, torch
libc = ctypes.CDLL(None, use_errno=True)
made = libc.open(b"from-c.txt", 0o101, 0o644)
print("descriptor", made)
net = torch.nn.Linear(64, 64).cuda()
for _ in range(9): net(torch.randn(8, 64, device="cuda")).sum().backward()
"""


@pytest.mark.slow
def test_a_c_library_cannot_write_either(tmp_path: Path, run: Run) -> None:
    from fsdl_devinfra.trace import dryrun_files
    seals = "import tempfile; from fsdl_devinfra.trace.dryrun_files import seal; print(seal([tempfile.gettempdir()]))"
    import subprocess
    import sys
    asked = subprocess.run([sys.executable, "-c", seals], capture_output=True, text=True, env=os.environ | {
        "PYTHONPATH": str(Path(dryrun_files.__file__).parents[2])})
    if asked.stdout.strip() != "True": pytest.skip("the kernel has no Landlock")
    status, document, errors = run(C_LIBRARY)
    assert status == 0 and "descriptor -1" in errors, (document, errors[-2000:])
    assert files(tmp_path) == ["train.py"]


SAFETENSORS = """
import os, torch
from safetensors.torch import load_file, load_model, save_file, save_model
try: load_file("net.safetensors")
except FileNotFoundError: pass
else: raise SystemExit("there is no such file yet")
net = torch.nn.Linear(64, 64).cuda()
for step in range(9):
    net(torch.randn(8, 64, device="cuda")).sum().backward()
    save_file({name: value.detach() for name, value in net.state_dict().items()}, "net.safetensors", metadata={"step": str(step)})
    save_model(net, "model.safetensors")
    assert os.path.exists("net.safetensors")
    kept = load_file("net.safetensors")
    assert kept["weight"].device.type == "cpu" and load_file("net.safetensors", device="cuda")["bias"].is_cuda
    net.load_state_dict(kept)
    load_model(net, "model.safetensors")
"""


@pytest.mark.slow
def test_safetensors_are_kept_and_not_written(tmp_path: Path, run: Run) -> None:
    pytest.importorskip("safetensors")
    fits(run(SAFETENSORS), tmp_path)


GAN = """
import torch
from torch import nn
make = nn.Sequential(nn.ConvTranspose2d(100, 128, 4, 1, 0), nn.BatchNorm2d(128), nn.ReLU(True), nn.ConvTranspose2d(128, 3, 4, 2, 1), nn.Tanh()).cuda()
judge = nn.Sequential(nn.Conv2d(3, 128, 4, 2, 1), nn.LeakyReLU(0.2, True), nn.Conv2d(128, 1, 4, 1, 0)).cuda()
judges, makes = torch.optim.Adam(judge.parameters()), torch.optim.Adam(make.parameters())
loss = nn.BCEWithLogitsLoss()
for _ in range(1000):
    judge.zero_grad()
    real = torch.rand(64, 3, 8, 8).cuda()
    label = torch.full((64,), 1.0, device="cuda")
    loss(judge(real).view(-1), label).backward()
    fake = make(torch.randn(64, 100, 1, 1, device="cuda"))
    loss(judge(fake.detach()).view(-1), label.fill_(0)).backward()
    judges.step()
    make.zero_grad()
    loss(judge(fake).view(-1), label.fill_(1)).backward()
    makes.step()
"""
POLICY = """
import torch
from torch.distributions import Categorical
policy = torch.nn.Sequential(torch.nn.Linear(4, 128), torch.nn.ReLU(), torch.nn.Linear(128, 2)).cuda()
optimizer = torch.optim.Adam(policy.parameters())
for _ in range(50):
    scores, rewards, state = [], [], torch.zeros(4)
    for _ in range(20):
        choice = Categorical(logits=policy(state.cuda()))
        action = choice.sample()
        scores.append(choice.log_prob(action))
        rewards.append(1.0 if action.item() == 1 else 0.0)
        state = torch.randn(4)
    loss = -(torch.stack(scores) * torch.tensor(rewards, device="cuda")).sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""
CARD = """
import torch
card = torch.cuda.get_device_properties("cuda:0")
assert card.total_memory > 30 << 30 and card.L2_cache_size == 40 << 20 and card.max_threads_per_multi_processor == 2048
assert torch.cuda.current_stream(device=0) is not None and torch.cuda.memory_stats(device=0)["allocated_bytes.all.current"] >= 0
net = torch.nn.Linear(512, 512).to(0)
for i in range(9):
    net(torch.randn(8, 512, device=0)).sum().backward()
    assert torch.cuda.memory_allocated(device=0) > 0
"""


@pytest.mark.parametrize("script", [GAN, pytest.param(POLICY, marks=pytest.mark.slow), pytest.param(CARD, marks=pytest.mark.slow)],
                         ids=["gan", "policy", "card"])
def test_kinds_of_loops(tmp_path: Path, run: Run, script: str) -> None:
    assert fits(run(script), tmp_path)["steps"] >= 4


@pytest.mark.slow
def test_a_gan_that_keeps_its_pictures_grows(tmp_path: Path, run: Run) -> None:
    leaking = GAN.replace("for _ in range(1000):", "kept = []\nfor _ in range(1000):").replace("    makes.step()", "    makes.step()\n    kept.append(fake)")
    status, document, errors = run(leaking)
    assert status == 0, (document, errors[-2000:])
    picture = 64 * 3 * 8 * 8 * 4
    assert picture / 3 <= document["growth_bytes_per_step"] and document["out_of_memory"]["projected"] is True


CIFAR = """
import torch, torchvision, torchvision.transforms as T
transform = T.Compose([T.RandomCrop(32, padding=4), T.ToTensor(), T.Normalize((0.5,) * 3, (0.5,) * 3)])
data = torchvision.datasets.CIFAR10("./data", train=True, download=True, transform=transform)
loader = torch.utils.data.DataLoader(data, batch_size=128, shuffle=True, num_workers=4, pin_memory=True)
assert len(data) == 50000 and len(data.classes) == 10
net = torchvision.models.resnet18(num_classes=10).cuda()
optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
for epoch in range(2):
    for x, y in loader:
        assert x.shape == (128, 3, 32, 32) or epoch
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x.cuda()), y.cuda()).backward()
        optimizer.step()
"""
DETECTION = """
import math, sys, torch, torchvision
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
class People(torch.utils.data.Dataset):
    def __len__(self): return 40
    def __getitem__(self, index):
        boxes = torch.tensor([[10.0, 20.0, 200.0, 220.0], [30.0, 40.0, 300.0, 310.0]])
        return torch.rand(3, 480, 640), {"boxes": boxes, "labels": torch.ones(2, dtype=torch.int64), "image_id": index}
device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
model = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=2)
model.roi_heads.box_predictor = FastRCNNPredictor(model.roi_heads.box_predictor.cls_score.in_features, 2)
model.to(device)
loader = torch.utils.data.DataLoader(People(), batch_size=2, shuffle=True, collate_fn=lambda batch: tuple(zip(*batch)))
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.005, momentum=0.9)
for epoch in range(2):
    model.train()
    for images, targets in loader:
        images = [image.to(device) for image in images]
        targets = [{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in t.items()} for t in targets]
        losses = sum(model(images, targets).values())
        if not math.isfinite(losses.item()): sys.exit(1)
        optimizer.zero_grad()
        losses.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        for images, _ in loader: model([image.to(device) for image in images])[0]["boxes"].to("cpu")
"""
DIFFUSION = """
import os, torch, torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
class Pictures(torch.utils.data.Dataset):
    def __len__(self): return 1000
    def __getitem__(self, index): return {"images": torch.rand(3, 64, 64)}
loader = torch.utils.data.DataLoader(Pictures(), batch_size=16, shuffle=True)
model = UNet2DModel(sample_size=64, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(64, 128),
                    down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))
noising = DDPMScheduler(num_train_timesteps=1000)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
schedule = get_cosine_schedule_with_warmup(optimizer, 500, len(loader) * 50)
accelerator = Accelerator(mixed_precision="fp16", project_dir="ddpm/logs")
model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
for epoch in range(3):
    for batch in loader:
        clean = batch["images"]
        noise = torch.randn(clean.shape, device=clean.device)
        times = torch.randint(0, noising.config.num_train_timesteps, (clean.shape[0],), device=clean.device, dtype=torch.int64)
        with accelerator.accumulate(model):
            predicted = model(noising.add_noise(clean, noise, times), times, return_dict=False)[0]
            loss = F.mse_loss(predicted, noise)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        accelerator.log({"loss": loss.detach().item()})
    DDPMPipeline(unet=accelerator.unwrap_model(model), scheduler=noising).save_pretrained("ddpm")
"""
FASTAI = """
from fastai.vision.all import *
class Data(torch.utils.data.Dataset):
    def __init__(self, count): self.count = count
    def __len__(self): return self.count
    def __getitem__(self, index): return torch.rand(3, 64, 64), torch.tensor(index % 10)
loaders = DataLoaders.from_dsets(Data(640), Data(128), bs=64, device=torch.device("cuda"))
net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
learn = Learner(loaders, net, loss_func=nn.CrossEntropyLoss(), metrics=accuracy).to_fp16()
learn.fit_one_cycle(2, 1e-3)
learn.save("last")
"""
TIMM = """
import argparse, numpy, torch, timm
from PIL import Image
from timm.data import Mixup, create_loader, resolve_data_config
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, CheckpointSaver, ModelEmaV2, NativeScaler, accuracy
parser = argparse.ArgumentParser()
parser.add_argument("--model")
parser.add_argument("--opt", default="sgd")
args = parser.parse_args()
class Data(torch.utils.data.Dataset):
    transform = None
    def __len__(self): return 3000
    def __getitem__(self, index): return self.transform(Image.new("RGB", (256, 256))), index % 1000
model = timm.create_model(args.model, num_classes=1000).cuda()
size = resolve_data_config({}, model=model)["input_size"]
optimizer, scaler, ema = create_optimizer_v2(model, opt=args.opt, lr=1e-3), NativeScaler(), ModelEmaV2(model)
common = dict(input_size=size, batch_size=16, use_prefetcher=True, num_workers=4, device=torch.device("cuda"))
train = create_loader(Data(), is_training=True, auto_augment="rand-m9-mstd0.5", re_prob=0.25, **common)
check = create_loader(Data(), is_training=False, **common)
mixup, loss_of = Mixup(mixup_alpha=0.2, num_classes=1000), SoftTargetCrossEntropy().cuda()
schedule, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=2)
saver = CheckpointSaver(model=model, optimizer=optimizer, args=args, model_ema=ema, amp_scaler=scaler, checkpoint_dir=".", recovery_dir=".")
for epoch in range(2):
    model.train()
    for x, y in train:
        x, y = mixup(x, y)
        with torch.autocast("cuda"): loss = loss_of(model(x), y)
        optimizer.zero_grad()
        scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
        ema.update(model)
    model.eval()
    top = AverageMeter()
    with torch.no_grad():
        for x, y in check: top.update(accuracy(model(x), y, topk=(1, 5))[0].item(), len(x))
    saver.save_checkpoint(epoch, metric=top.avg)
    schedule.step(epoch + 1, top.avg)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("library", "script"), [("torchvision", CIFAR), ("torchvision", DETECTION), ("diffusers", DIFFUSION), ("fastai", FASTAI)],
                         ids=["cifar", "detection", "diffusion", "fastai"])
def test_a_library_is_followed(tmp_path: Path, run: Run, library: str, script: str) -> None:
    pytest.importorskip(library)
    document = fits(run(script), tmp_path)
    if script is CIFAR: assert any("CIFAR10 are not there" in line for line in document["assumptions"])


@pytest.mark.slow
def test_timms_loop(tmp_path: Path, run: Run) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    document = fits(run(TIMM, arguments=("--model", "resnet26d", "--opt", "lamb")), tmp_path)
    assert document["allocated_bytes"]["value"] > 16 * 40 << 20


IMDB = """
import torch
from datasets import load_dataset
data = load_dataset("stanfordnlp/imdb", split="train").map(lambda row: {"length": len(row["text"].split())}, num_proc=4)
assert data.column_names == ["text", "label", "length"] and data[0]["length"] > 1024
net = torch.nn.Linear(64, 2).cuda()
for _ in range(9): net(torch.randn(8, 64, device="cuda")).sum().backward()
"""
UNKNOWN = IMDB.replace("stanfordnlp/imdb", "nobody/nothing-like-this")


@pytest.mark.slow
def test_known_rows_stand_in_and_unknown_ones_are_named(tmp_path: Path, run: Run) -> None:
    pytest.importorskip("datasets")
    assert any("stanfordnlp/imdb is not in the cache" in line for line in fits(run(IMDB), tmp_path)["assumptions"])
    status, document, _ = run(UNKNOWN)
    assert status == 2 and "train.py:4" in document["error"] and "\n" not in document["error"]


AHEAD = """
import itertools, sys, torch
from torch.utils.checkpoint import checkpoint
net = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64)).cuda()
optimizer = torch.optim.AdamW(net.parameters())
batches = iter(torch.utils.data.DataLoader(torch.randn(4096, 64), batch_size=8))
while ahead := list(itertools.islice(batches, 8)):
    for x in ahead: checkpoint(net, x.cuda().requires_grad_(), use_reentrant=True).sum().backward()
    if "never" in sys.argv: continue
    optimizer.step()
    optimizer.zero_grad()
"""
WEIGHTS = 4 * (2 * 64 * 256 + 256 + 64)


@pytest.mark.slow
def test_a_loop_that_fetches_ahead_steps_its_optimizer(tmp_path: Path, run: Run) -> None:
    def states(document: dict) -> int: return max(moment.get("optimizer", 0) for moment in document["timeline"])
    stepped = fits(run(AHEAD), tmp_path)
    never = fits(run(AHEAD, arguments=("never",)), tmp_path)
    assert states(stepped) >= 2 * WEIGHTS and states(never) == 0 and 8 <= stepped["steps"] <= 16
    says = [[line for line in document["assumptions"] if "no optimizer of PyTorch was stepped" in line] for document in (stepped, never)]
    assert says[0] == [] and says[1][0].startswith("no optimizer of PyTorch was stepped in 64 backward passes")


TRIES = """
import sys, torch
torch.backends.cudnn.benchmark = "tries" in sys.argv
net = torch.nn.Conv2d(64, 64, 3, padding=1).cuda()
for _ in range(9): net(torch.randn(8, 64, 56, 56, device="cuda")).sum().backward()
"""


@pytest.mark.slow
def test_convolutions_load_their_library_and_try_as_the_script_says(tmp_path: Path, run: Run) -> None:
    def outside(document: dict) -> int: return document["device_bytes"]["value"] - document["reserved_bytes"]["value"]
    linear = fits(run(AHEAD), tmp_path)
    plain, tries = (fits(run(TRIES, arguments=arguments), tmp_path) for arguments in ((), ("tries",)))
    assert outside(plain) - outside(linear) == 125 << 20
    assert tries["reserved_bytes"]["value"] > plain["reserved_bytes"]["value"]


SAVES = """
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
class Words(torch.utils.data.Dataset):
    def __len__(self): return 64
    def __getitem__(self, i): return dict(input_ids=torch.randint(0, 1000, (32,)), labels=torch.tensor(i % 2))
model = BertForSequenceClassification(BertConfig(vocab_size=1000, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128))
Trainer(model, TrainingArguments("out", per_device_train_batch_size=32, num_train_epochs=1, report_to=[]), train_dataset=Words()).train()
"""
METRIC = """
import torch, torchmetrics
net = torch.nn.Linear(64, 10).cuda()
right = torchmetrics.Accuracy(task="multiclass", num_classes=10).to("cuda")
for _ in range(9):
    x, y = torch.randn(64, 64, device="cuda"), torch.randint(0, 10, (64,), device="cuda")
    logits = net(x)
    torch.nn.functional.cross_entropy(logits, y).backward()
    right.update(logits.argmax(1), y)
print(right.compute())
"""


@pytest.mark.slow
@pytest.mark.parametrize(("library", "script"), [("transformers", SAVES), ("torchmetrics", METRIC)], ids=["saves", "metric"])
def test_a_short_training_is_followed_to_its_end(tmp_path: Path, run: Run, library: str, script: str) -> None:
    pytest.importorskip(library)
    fits(run(script), tmp_path)


COPIES = """
import contextlib, copy, sys, torch
net = torch.nn.Linear(1024, 1024).cuda()
mean = copy.deepcopy(net)
copies = torch.cuda.stream(torch.cuda.Stream()) if "aside" in sys.argv else contextlib.nullcontext()
for _ in range(9):
    with copies: x = torch.randn(4096, 1024, pin_memory=True).cuda(non_blocking=True)
    net(x).sum().backward()
"""


@pytest.mark.slow
def test_a_loader_enters_the_context_of_its_stream_for_each_batch(tmp_path: Path, run: Run) -> None:
    "Batches are pinned, and lie in blocks of their stream."
    found = [run(COPIES, arguments=arguments) for arguments in ((), ("aside",))]
    plain, aside = (fits(one, tmp_path) for one in found)
    assert not any("FakeTensor" in errors for _, _, errors in found)  # a copy is no fault of the script
    assert aside["allocated_bytes"]["value"] == plain["allocated_bytes"]["value"]
    assert aside["reserved_bytes"]["value"] > plain["reserved_bytes"]["value"]


VALIDATES = """
import copy, sys, torch
net = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3, padding=1), torch.nn.BatchNorm2d(64), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(65536, 10)).cuda()
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
judged = copy.deepcopy(net).eval() if "copy" in sys.argv else net
for epoch in range(9):
    net(torch.randn(2, 3, 32, 32, device="cuda")).sum().backward()
    optimizer.step()
    with torch.inference_mode() if "inference" in sys.argv else torch.no_grad():
        labels = torch.randint(0, 10, (256,))
        right = (judged(torch.randn(256, 3, 32, 32, device="cuda")).argmax(1).cpu() == labels).sum().item()
    print(f"{right / len(labels):.2f}")
"""


@pytest.mark.slow
def test_a_validation_in_inference_mode_is_one_without_gradients(tmp_path: Path, run: Run) -> None:
    "Its values are read, and the peak, which lies in it, is the same."
    inference, plain, copied = (fits(run(VALIDATES, arguments=arguments), tmp_path) for arguments in (("inference",), (), ("copy",)))
    assert inference["peak"]["source"] == plain["peak"]["source"] == copied["peak"]["source"] == "train.py:11"
    assert copied["allocated_bytes"]["value"] > 2 * (256 * 64 * 32 * 32 * 4)  # what a copy with buffers computes is recorded as well
    for size in ("allocated_bytes", "reserved_bytes", "device_bytes"): assert inference[size]["value"] == plain[size]["value"]


LAYERS = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
kind, again = sys.argv[1], "again" in sys.argv
experts = dict(moe_intermediate_size=256, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1) if "moe" in kind else {}
config = AutoConfig.for_model(kind, hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=8,
                              num_key_value_heads=2, head_dim=32, vocab_size=128, **experts)
dtype = torch.float32 if "wide" in sys.argv else torch.bfloat16
model = AutoModelForCausalLM.from_config(config, dtype=dtype).cuda().train()
if again: model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
text = torch.randint(0, 128, (2, 512)).cuda()
for _ in range(3):
    with torch.autocast("cuda", torch.bfloat16): loss = model(input_ids=text, labels=text).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_layers_that_are_computed_again_keep_what_they_kept(tmp_path: Path, run: Run, kind: str) -> None:
    """PyTorch compares what a layer keeps in both passes. Heads share keys, which CUDA's flash kernel takes as they are, and experts
    are counted in integers, which only CUDA does: neither a matrix of scores nor an error that the script would not meet on its card."""
    pytest.importorskip("transformers")
    kept, again = (fits(run(LAYERS, arguments=(kind, *how)), tmp_path) for how in ((), ("again",)))
    held = [max(moment.get("activations", 0) for moment in document["timeline"]) for document in (kept, again)]
    assert held[1] < 0.5 * held[0]
    scores = 2 * 8 * 512 * 512 * 2  # bytes of a layer's scores in 16 bits
    assert max(holder["bytes"] for holder in kept["largest"] if holder["kind"] == "activations") < scores
    fits(run(LAYERS, arguments=(kind, "wide")), tmp_path)  # experts in 32 bits are multiplied one by one


CALLED = """
import sys, torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
weight = torch.nn.Parameter(torch.randn(256, 256, device="cuda", dtype=torch.float16))
optimizer = torch.optim.SGD([weight], lr=0.1)
def layer(x):
    heads = (x @ weight).view(4, 128, 8, 32).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads, heads)
for _ in range(3):
    out = checkpoint(layer, torch.randn(4, 128, 256, device="cuda", dtype=torch.float16), use_reentrant=False)
    torch.autograd.backward(out.sum()) if "function" in sys.argv else out.sum().backward()
    optimizer.step()
    optimizer.zero_grad()
"""


@pytest.mark.slow
def test_a_pass_is_one_pass_however_it_is_called(tmp_path: Path, run: Run) -> None:
    """`torch.autograd.backward(loss)` and `loss.backward()`, with layers that are computed again."""
    method, function = (fits(run(CALLED, arguments=how), tmp_path) for how in ((), ("function",)))
    assert method["steps"] == function["steps"] == 3
    assert function["step_seconds"] == pytest.approx(method["step_seconds"], rel=0.01)


ROOM = """
import torch
torch.backends.cudnn.benchmark = True
held = torch.empty(13100 << 20, dtype=torch.uint8, device="cuda")
conv, x = torch.nn.Conv2d(64, 64, 3, padding=1).cuda(), torch.randn(8, 64, 256, 256, device="cuda")
for _ in range(2): conv(x).sum().backward()
torch.empty({asked} << 20, dtype=torch.uint8, device="cuda")
"""


@pytest.mark.slow
def test_a_convolution_goes_on_where_its_workspace_has_no_room(tmp_path: Path, run: Run) -> None:
    """A T4 that is nearly full: cuDNN takes another algorithm; what the script itself asks for still ends it."""
    status, found, errors = run(ROOM.replace("{asked}", "1"), "--gpu", "t4")
    assert (status, found["fits"]) in ((0, "yes"), (0, "tight")), (found, errors[-500:])
    status, found, errors = run(ROOM.replace("{asked}", "900"), "--gpu", "t4")
    assert found["fits"] == "no", (status, errors[-500:])
