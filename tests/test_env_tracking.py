"""The environment in real trackers, offline, through accelerate; in both trainers; and in pytest."""
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fsdl_devinfra.env import Environment, capture, log_environment, settings

REPO = Path(__file__).parents[1]


def there(*modules): return all(importlib.util.find_spec(m) for m in modules)


def needs(*modules): return pytest.mark.skipif(not there(*modules), reason=f"{' and '.join(modules)} not installed")


def run(code, cwd, **variables):
    """A process of its own: trackers keep global state."""
    import os
    quiet = {"ACCELERATE_USE_CPU": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "HOME": str(cwd)}
    done = subprocess.run([sys.executable, "-c", "import sys; sys.path.insert(0, {!r})\n".format(str(REPO)) + code], capture_output=True, text=True, cwd=cwd, timeout=280, env=os.environ | quiet | variables)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


LOG = """
from accelerate import Accelerator
from fsdl_devinfra.env import log_environment
accelerator = Accelerator(log_with={name!r}, project_dir='.', cpu=True)
accelerator.init_trackers('project', init_kwargs={kwargs!r})
env = log_environment(accelerator)
accelerator.log({{'loss': 1.0}}, step=1)
{after}
accelerator.end_training()
env.save('said.json')
"""


@pytest.mark.slow
@needs("accelerate", "mlflow", "sqlalchemy")
def test_mlflow(tmp_path):
    uri = f"sqlite:///{tmp_path}/m.db"
    run(LOG.format(name="mlflow", kwargs={}, after=""), tmp_path, MLFLOW_TRACKING_URI=uri)
    env = Environment.load(tmp_path / "said.json")
    code = f"import mlflow, json; c = mlflow.MlflowClient({uri!r}); r = c.search_runs([e.experiment_id for e in c.search_experiments()])[0]; print(json.dumps([r.data.params, r.info.artifact_uri]))"
    params, artifacts = json.loads(run(code, tmp_path, MLFLOW_TRACKING_URI=uri).splitlines()[-1])
    assert params["env/digest"] == env.digest and params["env/packages.torch"] == env.packages["torch"].version
    assert set(settings(env)) <= set(params)
    assert Environment.load(Path(artifacts.removeprefix("file://")) / "env.json") == env


@pytest.mark.slow
@needs("accelerate", "wandb")
def test_wandb_offline(tmp_path):
    run(LOG.format(name="wandb", kwargs={"wandb": {"mode": "offline", "dir": str(tmp_path)}}, after="print(dict(accelerator.get_tracker('wandb').tracker.config)['env/digest'])"), tmp_path, WANDB_MODE="offline", WANDB_SILENT="true")
    env = Environment.load(tmp_path / "said.json")
    files = list(tmp_path.glob("wandb/offline-run-*/files/env.json"))
    assert len(files) == 1 and Environment.load(files[0]) == env
    assert any(env.digest.encode() in f.read_bytes() for f in tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.slow
@needs("accelerate", "tensorboard")
def test_tensorboard(tmp_path):
    run(LOG.format(name="tensorboard", kwargs={}, after=""), tmp_path)
    env = Environment.load(tmp_path / "said.json")
    code = "from tensorboard.backend.event_processing.event_accumulator import EventAccumulator as E\na = E('project', size_guidance={'tensors': 0}); a.Reload()\nprint(a.Tensors('environment/text_summary')[0].tensor_proto.string_val[0].decode())"
    assert env.digest in run(code, tmp_path)
    import yaml
    assert yaml.safe_load(next(tmp_path.glob("project/*/hparams.yml")).read_text())["env/digest"] == env.digest


@pytest.mark.slow
@needs("accelerate", "trackio")
def test_trackio(tmp_path):
    run(LOG.format(name="trackio", kwargs={}, after=""), tmp_path, TRACKIO_DIR=str(tmp_path / "t"))
    env = Environment.load(tmp_path / "said.json")
    stored = b"".join(f.read_bytes() for f in (tmp_path / "t").rglob("*") if f.is_file())
    assert env.digest.encode() in stored and b"env/document" in stored


@pytest.mark.slow
@needs("accelerate", "comet_ml")
def test_comet_offline(tmp_path):
    kwargs = {"comet_ml": {"online": False, "experiment_config": None}}
    run(LOG.format(name="comet_ml", kwargs=kwargs, after=""), tmp_path, COMET_OFFLINE_DIRECTORY=str(tmp_path / "c"), COMET_API_KEY="x" * 25, COMET_DISABLE_AUTO_LOGGING="1")
    env = Environment.load(tmp_path / "said.json")
    import zipfile
    archives = list((tmp_path / "c").glob("*.zip"))
    assert archives
    content = b"".join(z.read(n) for a in archives for z in [zipfile.ZipFile(a)] for n in z.namelist())
    assert env.digest.encode() in content and b"env/packages.torch" in content


def test_an_unknown_tracker_gets_the_settings():
    pytest.importorskip("accelerate")
    class Own:
        name = "own"
        def store_init_configuration(self, values): self.values = values
    own, env = Own(), capture()
    log_environment([own], env)
    assert own.values == settings(env)


@pytest.mark.slow
@needs("transformers", "accelerate")
def test_trainer_callback(tmp_path):
    run("""
import torch
from transformers import Trainer, TrainingArguments
from fsdl_devinfra.env import trainer_callback
class Net(torch.nn.Module):
    def __init__(self): super().__init__(); self.w = torch.nn.Linear(2, 1)
    def forward(self, x, labels): return {'loss': (self.w(x) - labels).square().mean()}
data = [{'x': torch.ones(2), 'labels': torch.ones(1)}] * 4
args = TrainingArguments('out', max_steps=1, report_to=[], use_cpu=True, seed=1234, save_strategy='no', disable_tqdm=True)
Trainer(Net(), args, train_dataset=data, callbacks=[trainer_callback()]).train()
""", tmp_path)
    env = Environment.load(tmp_path / "out/env.json")
    assert env.numerics["origin"] == "observed" and env.numerics["settings"]["seed"] == 1234


@pytest.mark.slow
@pytest.mark.skipif(not there("pytorch_lightning") and not there("lightning"), reason="Lightning is not installed")
def test_lightning_callback(tmp_path):
    run("""
try: import lightning.pytorch as pl
except ImportError: import pytorch_lightning as pl
import torch
from fsdl_devinfra.env import lightning_callback
class Net(pl.LightningModule):
    def __init__(self): super().__init__(); self.w = torch.nn.Linear(2, 1)
    def training_step(self, batch, i): return self.w(batch).sum()
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), 0.1)
pl.seed_everything(77)
pl.Trainer(max_steps=1, accelerator='cpu', logger=False, enable_checkpointing=False, enable_progress_bar=False, default_root_dir='out', callbacks=[lightning_callback()]).fit(Net(), torch.utils.data.DataLoader(torch.ones(2, 2)))
""", tmp_path)
    assert Environment.load(tmp_path / "out/env.json").numerics["settings"]["seed"] == 77


def test_pytest_plugin(tmp_path):
    (tmp_path / "test_it.py").write_text("def test_it(): pass\n")
    done = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tmp_path)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "environment: fsdl-devinfra" in done.stdout and not (tmp_path / "env.json").exists()
