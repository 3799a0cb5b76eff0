"""The environment in real trackers, offline, through accelerate; in both trainers; and in pytest."""
import importlib.util
import json
import os
import shlex
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


OWN = """
from pathlib import Path
from fsdl_devinfra.env import capture, log_environment
env = capture()
env.save("said.json")
{body}
"""


@pytest.mark.slow
@needs("wandb")
def test_a_run_of_wandb_itself(tmp_path):
    body = "import wandb\nrun = wandb.init(mode='offline', dir='.')\nrun.log({'loss': 1.0})\nlog_environment(run, env)\nprint(run.step, run.config['env/digest'])\nrun.finish()"
    said = run(OWN.format(body=body), tmp_path, WANDB_SILENT="true")
    env = Environment.load(tmp_path / "said.json")
    assert said.splitlines()[-1] == f"1 {env.digest}"  # no step was counted by us
    files = list(tmp_path.glob("wandb/offline-run-*/files/env.json"))
    assert len(files) == 1 and Environment.load(files[0]) == env


@pytest.mark.slow
@needs("mlflow", "sqlalchemy")
@pytest.mark.parametrize("what", ["mlflow", "active"])
def test_a_run_of_mlflow_itself(tmp_path, what):
    uri = f"sqlite:///{tmp_path}/m.db"
    body = f"""import mlflow, json
with mlflow.start_run() as active:
    mlflow.log_metric('loss', 1.0)
    log_environment({what}, env)
run = mlflow.MlflowClient().get_run(active.info.run_id)
print(json.dumps([run.data.params, run.data.metrics, run.info.artifact_uri]))"""
    params, metrics, artifacts = json.loads(run(OWN.format(body=body), tmp_path, MLFLOW_TRACKING_URI=uri).splitlines()[-1])
    env = Environment.load(tmp_path / "said.json")
    assert params["env/digest"] == env.digest and metrics == {"loss": 1.0} and set(settings(env)) <= set(params)
    assert Environment.load(Path(artifacts.removeprefix("file://")) / "env.json") == env


@pytest.mark.slow
@needs("tensorboard")
def test_a_summary_writer_itself(tmp_path):
    body = "from torch.utils.tensorboard import SummaryWriter\nw = SummaryWriter('tb')\nw.add_scalar('loss', 1.0, 3)\nlog_environment(w, env)\nw.close()"
    run(OWN.format(body=body), tmp_path)
    env = Environment.load(tmp_path / "said.json")
    code = """from tensorboard.backend.event_processing.event_accumulator import EventAccumulator as E
a = E('tb', size_guidance={'tensors': 0}); a.Reload()
print(a.Tags()['scalars'], a.Tensors('environment/text_summary')[0].tensor_proto.string_val[0].decode())"""
    said = run(code, tmp_path)
    assert env.digest in said and said.startswith("['loss']")


@pytest.mark.slow
@needs("trackio")
@pytest.mark.parametrize("what", ["trackio", "t"])
def test_a_run_of_trackio_itself(tmp_path, what):
    body = f"import trackio\nt = trackio.init(project='p')\nlog_environment({what}, env)\ntrackio.log({{'loss': 1.0}})\ntrackio.finish()"
    run(OWN.format(body=body), tmp_path, TRACKIO_DIR=str(tmp_path / "t"))
    env = Environment.load(tmp_path / "said.json")
    stored = b"".join(f.read_bytes() for f in (tmp_path / "t").rglob("*") if f.is_file())
    assert env.digest.encode() in stored and b"env/document" in stored


@pytest.mark.slow
@needs("comet_ml")
def test_an_experiment_of_comet_itself(tmp_path):
    body = "import comet_ml\ne = comet_ml.OfflineExperiment(project_name='p', offline_directory='c')\nlog_environment(e, env)\ne.end()"
    run(OWN.format(body=body), tmp_path, COMET_API_KEY="x" * 25, COMET_DISABLE_AUTO_LOGGING="1")
    env = Environment.load(tmp_path / "said.json")
    import zipfile
    content = b"".join(z.read(n) for a in (tmp_path / "c").glob("*.zip") for z in [zipfile.ZipFile(a)] for n in z.namelist())
    assert env.digest.encode() in content and b"env/packages.torch" in content


RANKS = """
import os, sys, torch
from fsdl_devinfra.env import capture, log_environment
from fsdl_devinfra.env.tracking import settings
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
if {odd} and rank == 2: torch.set_num_threads(7)
class Own:
    name = "own"
    def store_init_configuration(self, values): print("LOGGED", rank, {{k: v for k, v in values.items() if "ranks" in k}}, flush=True)
log_environment(Own(), ranks=True)
torch.distributed.destroy_process_group()
os._exit(0)  # before Python 3.14 a thread of gloo can abort the end of the interpreter
"""


@pytest.mark.slow
@pytest.mark.parametrize("odd", [False, True])
def test_all_ranks_and_what_differs_between_them(tmp_path, odd):
    (tmp_path / "a.py").write_text(RANKS.format(odd=odd))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3", "--master-port", "0", "--standalone", "a.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stdout.splitlines() if line.startswith("LOGGED")]
    assert len(lines) == 1, done.stdout + done.stderr[-2000:]
    if odd: assert "rank 2" in lines[0] and "threads" in lines[0] and "rank 1" not in lines[0]
    else: assert lines[0] == "LOGGED 0 {'env/ranks': 'alike'}"


def test_what_is_no_tracker_is_said():
    from fsdl_devinfra.core.errors import BadInput
    env = Environment("0" * 12, "2026-01-01T00:00:00Z", "0")
    for nothing in (None, [], [None]):
        with pytest.raises(BadInput, match="no tracker to log to"): log_environment(nothing, env)
    with pytest.raises(BadInput, match="no tracker that is known"): log_environment(7, env)


def test_other_processes_write_nothing(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    env = Environment("0" * 12, "2026-01-01T00:00:00Z", "0")
    assert log_environment(None, env) is env


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


ROOT = Path(__file__).parents[1]
PATH = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def test_hooks_for_other_repositories_run(tmp_path):
    """The commands of the hooks, as pre-commit starts them."""
    yaml = pytest.importorskip("yaml")
    hooks = {h["id"]: shlex.split(h["entry"]) + h.get("args", []) for h in yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())}
    def status(command): return subprocess.run([sys.executable, "-m", "fsdl_devinfra", *command[1:]], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True).returncode
    assert status(["fsdl-devinfra", "env", "capture", "-o", "env.json"]) == 0  # of a process of its own: this one has settings of other tests
    assert status(hooks["env-verify"]) == 0 and status(hooks["env-check"]) in (0, 1)
    document = json.loads((tmp_path / "env.json").read_text())
    document["packages"]["numpy"] = {"version": "0.0.1"}
    (tmp_path / "env.json").write_text(json.dumps(document))
    assert status(hooks["env-verify"]) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="the steps are for bash")
@pytest.mark.parametrize("other", [False, True])
def test_the_steps_of_the_action_run(tmp_path, other):
    """Every step of the composite action with its inputs, in a shell; a baseline that differs fails the job."""
    yaml = pytest.importorskip("yaml")
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    base = capture(folder=tmp_path).to_dict()
    if other: base["packages"]["numpy"] = {"version": "0.0.1"}
    (tmp_path / "base.json").write_text(json.dumps(base))
    given = {"output": "out.json", "baseline": "base.json", "probe": "false", "install": ""}
    statuses = []
    for step in action["runs"]["steps"][1:]:
        values = {k: given[v.removeprefix("${{ inputs.").removesuffix(" }}")] for k, v in step["env"].items()}
        quiet = {"GITHUB_STEP_SUMMARY": str(tmp_path / "summary"), "GITHUB_OUTPUT": str(tmp_path / "outputs"), "PYTHONPATH": str(ROOT)}
        statuses.append(subprocess.run(["bash", "-e", "-o", "pipefail", "-c", step["run"]], cwd=tmp_path, env=os.environ | PATH | values | quiet, capture_output=True).returncode)
    assert statuses == [0, int(other)] and f"verdict={'differs' if other else 'same'}" in (tmp_path / "outputs").read_text()
    assert Environment.load(tmp_path / "out.json").packages and (tmp_path / "summary").read_text().startswith("differs" if other else "same")
