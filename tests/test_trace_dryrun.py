"""Whole scripts, written after public documentation, run without a GPU and without memory."""
from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fsdl_devinfra.cli import main

pytest.importorskip("torch")
ROOT = Path(__file__).resolve().parents[1]
Run = Callable[..., tuple[int, dict, str]]

PLAIN = """
import json, os, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
if not torch.cuda.is_available(): raise SystemExit("a GPU is needed")
assert "A100" in torch.cuda.get_device_name(0) and torch.cuda.device_count() == 1
assert torch.cuda.get_device_properties(0).total_memory > 30 << 30
device = torch.device("cuda")
model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Dropout(0.1), nn.AdaptiveAvgPool2d(4),
                      nn.Flatten(), nn.Linear(1024, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
model.to(device)
scaler = torch.amp.GradScaler("cuda")
data = TensorDataset(torch.randn(256, 3, 32, 32), torch.randint(0, 10, (256,)))
loader = DataLoader(data, batch_size=64, shuffle=True, num_workers=2, pin_memory=True)
os.makedirs("out", exist_ok=True)
log = open("out/log.csv", "w")
for epoch in range(100):
    for x, y in loader:
        x, y = x.to(device, non_blocking=True), y.cuda()
        assert x.is_cuda and x.device.type == "cuda" and y.cpu().device.type == "cpu"
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            out = model(x)
            loss = nn.functional.cross_entropy(out, y)
        assert out.dtype == torch.float16
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        print(epoch, loss, loss.item(), f"{loss:.3f}", float(loss))
        if loss > 10: print("large")
        log.write(f"{loss.item()}\\n")
    model.eval()
    with torch.no_grad():
        right = sum((model(x.cuda()).argmax(1) == y.cuda()).sum().item() for x, y in loader)
    model.train()
    assert 0 < torch.cuda.max_memory_allocated() <= torch.cuda.max_memory_reserved()
    free, total = torch.cuda.mem_get_info()
    assert 0 < free < total
    torch.save(model.state_dict(), "out/model.pt")
    json.dump({"right": right}, open("out/result.json", "w"))
    assert os.path.exists("out/result.json")
"""

NET = """
import torch
from torch import nn
net = nn.Sequential(nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 4096)).cuda()
optimizer = torch.optim.AdamW(net.parameters())
def step(batch):
    optimizer.zero_grad()
    loss = net(torch.randn(batch, 4096, device="cuda")).pow(2).mean()
    loss.backward()
    optimizer.step()
    return loss
"""
DIES = NET + "for _ in range(10): step(1 << 21)\n"
HALVES = NET + """
batch, done = 1 << 21, 0
while done < 50:
    try:
        step(batch)
        done += 1
    except torch.cuda.OutOfMemoryError:
        batch //= 2
        torch.cuda.empty_cache()
"""
GROWS = NET + """
kept = []
for _ in range(1000):
    optimizer.zero_grad()
    loss = net(torch.randn(8192, 4096, device="cuda")).pow(2).mean()
    loss.backward(retain_graph=True)
    optimizer.step()
    kept.append(loss)
"""
STEADY = NET + "kept = []\nfor _ in range(1000): kept.append(step(8192).item())\n"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    "Status, document and standard error of `dryrun --json … -- train.py` in a folder of its own."
    def started(script: str, *options: str) -> tuple[int, dict, str]:
        (tmp_path / "train.py").write_text(script)
        monkeypatch.chdir(tmp_path)
        status = main(["dryrun", "--json", *options, "--", "train.py"])
        said = capfd.readouterr()
        return status, json.loads(said.out), said.err
    return started


def _check_snapshot(found: dict, result: dict) -> None:
    "The events add up to the peak, free what was allocated, and PyTorch's own reader takes the file."
    from torch.cuda import _memory_viz
    alive, peak = {}, 0
    for event in found["device_traces"][0]:
        if event["action"] == "alloc": alive[event["addr"]] = event["size"]
        if event["action"] == "free_completed": del alive[event["addr"]]
        peak = max(peak, sum(alive.values()))
    assert 0.98 * result["allocated_bytes"]["value"] <= peak <= result["allocated_bytes"]["value"]
    assert all(sum(b["size"] for b in s["blocks"]) == s["total_size"] for s in found["segments"])
    assert sum(s["total_size"] for s in found["segments"]) <= result["reserved_bytes"]["value"]
    assert "segments" in _memory_viz.segsum(found) and "snapshot.pickle" in _memory_viz.trace_plot(found)


def test_plain_loop_fits_and_writes_nothing(tmp_path: Path, run: Run) -> None:
    report, snapshot = tmp_path / "report.html", tmp_path / "memory.pickle"
    status, found, errors = run(PLAIN, "--gpu", "a100-40", "-o", str(report),
                                "--snapshot", str(snapshot))
    assert (status, found.get("fits")) == (0, "yes"), (found, errors)
    assert found["script_exit"] == 0 and found["out_of_memory"] is None and found["growth_bytes_per_step"] == 0
    assert found["peak_bytes"] == found["reserved_bytes"] and found["allocated_bytes"]["value"] <= found["reserved_bytes"]["value"]
    assert found["peak"]["source"].startswith("train.py:") and found["largest"][0].keys() == {"bytes", "module", "source", "kind"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["memory.pickle", "report.html", "train.py"]
    _check_snapshot(pickle.loads(snapshot.read_bytes()), found)
    page = report.read_text()
    assert "Fits A100-SXM-40GB" in page and "<polygon" in page and "kernels of one step" in page and found["largest"][0]["source"] in page
    assert any("judged" in line and "bounds" in line for line in found["assumptions"])


def test_dies_where_the_card_ends(tmp_path: Path, run: Run) -> None:
    status, found, errors = run(DIES, "--gpu", "a100-40")
    assert (status, found.get("fits")) == (1, "no"), (found, errors)
    assert found["out_of_memory"]["step"] == 1 and found["out_of_memory"]["source"] == "train.py:8"
    assert found["peak_bytes"]["value"] > 40 << 30


def test_a_caught_error_is_no_failure(tmp_path: Path, run: Run) -> None:
    status, found, errors = run(HALVES, "--gpu", "a100-40")
    assert status == 0 and found["out_of_memory"] is None, (found, errors)
    assert found["peak_bytes"]["value"] < 40 << 30


def test_growth_is_found_and_projected(tmp_path: Path, run: Run) -> None:
    status, found, errors = run(GROWS, "--gpu", "a100-40")
    assert status == 0 and found["fits"] == "yes", (found, errors)
    assert found["growth_bytes_per_step"] >= 3 * 8192 * 4096 * 4
    assert found["out_of_memory"]["projected"] is True and 40 < found["out_of_memory"]["step"] < 140


@pytest.mark.slow
def test_without_the_kept_graph_nothing_grows(tmp_path: Path, run: Run) -> None:
    status, found, errors = run(STEADY, "--gpu", "a100-40")
    assert status == 0 and found["growth_bytes_per_step"] == 0 and found["out_of_memory"] is None, (found, errors)


@pytest.mark.slow
def test_without_a_card_there_is_no_verdict(tmp_path: Path, run: Run) -> None:
    status, found, _ = run(STEADY)
    assert status == 0 and found["gpu"] is None and found["fits"] is None and found["step_seconds"] is None


VALIDATES = """
import torch
from torch import nn
net = nn.Linear(1024, 1024).cuda()
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
batches = torch.utils.data.DataLoader(torch.randn(4096, 1024), batch_size=64)
for epoch in range(1000):
    for x in batches:
        x = x.cuda()
        loss = net(x[x[:, 0] > 0]).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()
    with torch.no_grad():
        large = net(torch.randn(1 << 18, 1024, device="cuda"))
    net.train()
"""


def test_first_validation_is_reached_and_a_mask_keeps_all_rows(tmp_path: Path, run: Run) -> None:
    status, found, errors = run(VALIDATES, "--gpu", "RTX-3080-10GB")
    assert status == 0 and found["peak"]["source"] == "train.py:16", (found, errors)
    assert 2 << 30 <= found["allocated_bytes"]["value"] < 2.1 * 2**30
    assert any("multiprocessors of RTX-3080-10GB are not in our table" in line for line in found["assumptions"])
    assert any("boolean masks" in line for line in found["assumptions"])


NEEDS_VALUE = """
import torch
x = torch.randint(0, 9, (64,)).cuda()
counts = torch.bincount(x)
"""
DOWNLOADS = """
import urllib.request
try: urllib.request.urlopen("http://data.example/set.tar", timeout=5)
except OSError as error: raise RuntimeError("the data set is not there") from error
"""
HUB = """
from huggingface_hub import hf_hub_download
hf_hub_download("nobody/nothing-like-this", "config.json")
"""


def _one_sentence(found: dict, says: str) -> None:
    assert says in found["error"] and "\n" not in found["error"] and found["hint"]


def test_a_value_that_decides_a_shape_is_named_with_its_line(tmp_path: Path, run: Run) -> None:
    status, found, errors = run(NEEDS_VALUE)
    assert status == 2 and "Traceback" not in errors
    _one_sentence(found, "train.py cannot be followed at train.py:4: bincount needs the values of a tensor")
    assert [p.name for p in tmp_path.iterdir()] == ["train.py"]


@pytest.mark.parametrize("script", [DOWNLOADS, pytest.param(HUB, marks=pytest.mark.slow)])
def test_a_download_is_called_a_download(tmp_path: Path, run: Run, script: str) -> None:
    status, found, _ = run(script)
    assert status == 2
    _one_sentence(found, "train.py wanted to download something at train.py:")
    assert "a dry run downloads nothing" in found["error"] and "cache" in found["hint"]


@pytest.mark.parametrize(("name", "near"), [("h100-pcie-90", "H100-PCIe-80GB"), ("rtx 9090", "RTX-5090-32GB")])
def test_an_unknown_card_is_answered_with_the_nearest(tmp_path: Path, run: Run, name: str, near: str) -> None:
    status, found, _ = run("raise SystemExit('not started')", "--gpu", name)
    assert status == 2 and near in found["hint"] and "no GPU is called" in found["error"]


@pytest.mark.slow
@pytest.mark.parametrize(("script", "says"), [
    ("raise ValueError('no data here')", "no data here"), ("import sys\nsys.exit(3)", "status 3"),
    ("import torch\nprint('nothing')", "without a backward pass"), ("import subprocess\nsubprocess.run(['ls'])", "no other process")])
def test_one_sentence_and_status_2(tmp_path: Path, run: Run, script: str, says: str) -> None:
    status, found, _ = run(script)
    assert status == 2
    _one_sentence(found, says)


FRAMEWORKS = {
    "accelerate": """
import torch
from torch import nn
from accelerate import Accelerator
a=Accelerator(mixed_precision="fp16")
m=nn.Sequential(nn.Linear(784,512),nn.ReLU(),nn.Linear(512,10)); o=torch.optim.AdamW(m.parameters())
d=torch.utils.data.TensorDataset(torch.randn(512,784),torch.randint(0,10,(512,)))
m,o,dl=a.prepare(m,o,torch.utils.data.DataLoader(d,64))
for e in range(3):
    for x,y in dl:
        with a.accumulate(m):
            o.zero_grad(); l=nn.functional.cross_entropy(m(x),y); a.backward(l); o.step()
        a.print(l.item())
a.save_state("ck")
""",
    "peft": """
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
class Tokens(torch.utils.data.Dataset):
    def __len__(self): return 64
    def __getitem__(self, i):
        ids = torch.randint(0, 1000, (128,))
        return dict(input_ids=ids, labels=ids)
m=LlamaForCausalLM(LlamaConfig(vocab_size=1000,hidden_size=256,num_hidden_layers=2,num_attention_heads=4,intermediate_size=512))
m=get_peft_model(m,LoraConfig(r=8,target_modules=["q_proj","v_proj"],task_type="CAUSAL_LM"))
t=Trainer(m,TrainingArguments("out",per_device_train_batch_size=8,num_train_epochs=3,bf16=True,report_to=[],logging_steps=1),train_dataset=Tokens())
t.train(); m.save_pretrained("adapter")
""",
    "transformers": """
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
class D(torch.utils.data.Dataset):
    def __len__(s): return 64
    def __getitem__(s,i): return dict(input_ids=torch.randint(0,1000,(128,)),attention_mask=torch.ones(128,dtype=torch.long),labels=torch.tensor(i%2))
m=BertForSequenceClassification(BertConfig(vocab_size=1000,hidden_size=128,num_hidden_layers=2,num_attention_heads=2,intermediate_size=256))
t=Trainer(m,TrainingArguments("out",per_device_train_batch_size=8,num_train_epochs=3,eval_strategy="epoch",fp16=True,report_to=[],logging_steps=1),train_dataset=D(),eval_dataset=D())
t.train(); t.save_model("final")
""",
    "pytorch_lightning": """
import torch, pytorch_lightning as pl
from torch import nn
class M(pl.LightningModule):
    def __init__(s): super().__init__(); s.net=nn.Sequential(nn.Linear(784,512),nn.ReLU(),nn.Linear(512,10))
    def training_step(s,b,i):
        x,y=b; l=nn.functional.cross_entropy(s.net(x),y); s.log("train_loss",l,prog_bar=True); return l
    def validation_step(s,b,i):
        x,y=b; s.log("val",nn.functional.cross_entropy(s.net(x),y))
    def configure_optimizers(s): return torch.optim.Adam(s.parameters(),1e-3)
d=torch.utils.data.TensorDataset(torch.randn(512,784),torch.randint(0,10,(512,)))
dl=torch.utils.data.DataLoader(d,64,num_workers=2)
pl.Trainer(max_epochs=2,accelerator="gpu",devices=1).fit(M(),dl,dl)
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("library", FRAMEWORKS)
def test_a_framework_trains_and_leaves_nothing(tmp_path: Path, run: Run, library: str) -> None:
    pytest.importorskip(library)
    status, found, errors = run(FRAMEWORKS[library], "--gpu", "a100-40")
    assert (status, found.get("fits")) == (0, "yes"), (found, errors[-3000:])
    assert found["script_exit"] == 0 and found["steps"] >= 4
    kinds = {h["kind"] for h in found["largest"]}
    assert "parameters" in kinds or "activations" in kinds
    assert [p.name for p in tmp_path.iterdir()] == ["train.py"]


@pytest.mark.slow
def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    import signal
    import time
    (tmp_path / "train.py").write_text("import time, torch\nopen('begun', 'w').write('x')\nprint('begun', flush=True)\ntime.sleep(100)")
    (tmp_path / "scratch").mkdir()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = os.environ | {"PYTHONPATH": path, "TMPDIR": str(tmp_path / "scratch")}
    process = subprocess.Popen([sys.executable, "-m", "fsdl_devinfra", "dryrun", "--json", "--", "train.py"], cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    for line in process.stderr:
        if line.strip() == "begun": break
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=60)
    time.sleep(0.2)
    assert process.returncode == 130 and "interrupted" in json.loads(text)["error"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scratch", "train.py"] and not list((tmp_path / "scratch").iterdir())
