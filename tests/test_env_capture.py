"""The capture as a process: in other environments, with things present and absent, and with secrets in real places."""
import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import jsonschema
import pytest
from conftest import package_alone

from fsdl_devinfra.core.results import json_schema
from fsdl_devinfra.env import Environment, capture, diff, environment
from fsdl_devinfra.env.difference import EnvironmentDiff
from fsdl_devinfra.env.job import variables
from fsdl_devinfra.env.packages import Package
from fsdl_devinfra.env.restoration import Restoration
from fsdl_devinfra.env.verification import Verification

REPO = package_alone()
CODE = "import sys; sys.path.insert(0, {!r}); from fsdl_devinfra.env import capture; print(capture({}).to_json())"


def captured(cwd, python=sys.executable, options="", before="", **variables):
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "SLURM_", "GIT_"))}
    done = subprocess.run([python, "-c", before + CODE.format(str(REPO), options)], capture_output=True, text=True, cwd=cwd, env=plain | variables, timeout=120)
    assert done.returncode == 0, done.stderr
    return Environment.from_dict(json.loads(done.stdout))


def cli(*argv, cwd=None, **variables):
    return subprocess.run([str(Path(sys.executable).parent / "fsdl-devinfra"), *map(str, argv)], capture_output=True, text=True, cwd=cwd, env=os.environ | variables, timeout=300)


def git(*args, cwd):
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "protocol.file.allow=always", *args], cwd=cwd, check=True, capture_output=True)


def test_every_capture_validates(tmp_path):
    schema = json_schema(Environment)
    for env in capture(), capture(folder="/"), capture(hide_home=True), captured(tmp_path, SLURM_JOB_ID="1", HF_TOKEN="hf_" + "a" * 34):
        jsonschema.validate(env.to_dict(), schema)
    for kind in EnvironmentDiff, Verification, Restoration: jsonschema.Draft202012Validator.check_schema(json_schema(kind))


def test_nothing_there(tmp_path):
    """No git, no repository, no variables, no programs at all."""
    env = captured(tmp_path, PATH="/nowhere")
    assert "source" in env.missing and env.packages and env.machine and env.accelerators["gpus"] == []
    assert env.job == {} and "locks" not in env.python


def test_slurm_kubernetes_and_trackers(tmp_path):
    env = captured(tmp_path, SLURM_JOB_ID="4711", SLURM_NODELIST="a[1-2]", WANDB_RUN_ID="abc", KUBERNETES_SERVICE_HOST="10.0.0.1", POD_NAME="train-0")
    assert env.job["slurm"]["slurm_job_id"] == "4711" and env.job["wandb"]["wandb_run_id"] == "abc" and env.job["kubernetes"]["pod_name"] == "train-0"
    assert env.container["kind"] == "kubernetes"


@pytest.mark.slow
def test_nvidia_smi_that_hangs(tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nsleep 60\n"); (tmp_path / "nvidia-smi").chmod(0o755)
    start = time.monotonic()
    captured(tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert time.monotonic() - start < 20


def test_nvidia_smi(tmp_path):
    """Where NVML finds nothing, the program is asked."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA A100-SXM4-40GB, 40960, 550.54.15, 8.0, Disabled, 400.00, 92.00.45'\n"); (tmp_path / "nvidia-smi").chmod(0o755)
    env = captured(tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}")
    if not Path("/dev/nvidiactl").exists(): assert env.accelerators["driver"] == "550.54.15" and env.accelerators["gpus"][0]["name"] == "NVIDIA A100-SXM4-40GB"


def test_nvml(tmp_path):
    """A stand-in for the driver's library."""
    fake = ("import sys, types; nv = types.ModuleType('pynvml'); nv.nvmlInit = nv.nvmlShutdown = lambda: None; nv.nvmlDeviceGetCount = lambda: 1; nv.nvmlDeviceGetHandleByIndex = lambda i: i;"
            "nv.nvmlSystemGetDriverVersion = lambda: '570.1'; nv.nvmlDeviceGetName = lambda h: 'NVIDIA H200'; sys.modules['pynvml'] = nv;")
    env = captured(tmp_path, before=fake)
    assert env.accelerators == {"driver": "570.1", "gpus": [{"name": "NVIDIA H200"}]}


def test_git_that_hangs(tmp_path):
    (tmp_path / "git").write_text("#!/bin/sh\nexec sleep 60\n"); (tmp_path / "git").chmod(0o755)
    start = time.monotonic()
    env = captured(tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert "source" in env.missing and time.monotonic() - start < 30


def test_dirty_repository_in_a_process(tmp_path):
    inner, outer = tmp_path / "inner", tmp_path / "outer"
    for repo in inner, outer:
        repo.mkdir(); git("init", "-q", "-b", "main", cwd=repo); (repo / "a.py").write_text("x = 1\n"); git("add", ".", cwd=repo); git("commit", "-qm", "1", cwd=repo)
    git("submodule", "add", "-q", str(inner), "lib", cwd=outer); git("commit", "-qm", "2", cwd=outer)
    (outer / "a.py").write_text('x = 2\napi_key = "hunter2hunter2"\n'); (outer / "losses.py").write_text("y = 1\n"); (outer / "with space.txt").write_text("z")
    env = captured(outer)
    assert env.source["dirty"] and "+x = 2" in env.source["diff"] and "hunter2" not in env.to_json()
    assert [f["path"] for f in env.source["untracked"]] == ["losses.py", "with space.txt"] and env.source["submodules"][0]["path"] == "lib"
    assert [r.field for r in env.removed] == ["source.diff"]


def test_secrets_in_real_places(tmp_path):
    """A token in the remote, one on the command line, one in the environment, one in the origin of a package, one in the environment's proxy."""
    token = "glpat-" + "aB3dE6gH9jK2mN5pQ8rS"
    git("init", "-q", cwd=tmp_path); git("remote", "add", "origin", f"https://oauth2:{token}@gitlab.com/me/x.git", cwd=tmp_path)
    site = tmp_path / "site" / "x-1.0.dist-info"; site.mkdir(parents=True)
    (site / "direct_url.json").write_text(json.dumps({"url": f"https://oauth2:{token}@gitlab.com/me/x.git", "vcs_info": {"vcs": "git", "commit_id": "a" * 40}}))
    code = f"import sys; sys.path[:0] = [{str(REPO)!r}, {str(site.parent)!r}]; from fsdl_devinfra.env import capture; print(capture().to_json())"
    done = subprocess.run([sys.executable, "-c", code, "--hub_token", token, f"--url=https://me:{token}@h/x"], capture_output=True, text=True, cwd=tmp_path, check=True,
                          env=os.environ | {"HF_TOKEN": token, "PIP_INDEX_URL": f"https://me:{token}@mirror/simple", "TORCH_NOTE": f"see {token}"})
    env = Environment.from_dict(json.loads(done.stdout))
    assert token not in done.stdout and token[6:] not in done.stdout
    assert {r.field.split(".")[0] for r in env.removed} >= {"python", "variables", "source", "packages"}
    assert env.packages["x"].commit == "a" * 40


@pytest.mark.slow
def test_observed_where_torch_is_imported(tmp_path):
    env = captured(tmp_path, before="import torch; torch.backends.cuda.matmul.allow_tf32 = True; torch.set_num_threads(3); torch.manual_seed(7);")
    settings = env.numerics["settings"]
    assert env.numerics["origin"] == "observed" and (settings["threads"], settings["seed"], settings["allow_tf32.matmul"]) == (3, 7, True)
    assert "versions" in env.libraries
    from fsdl_devinfra.env import diff
    plain = captured(tmp_path, before="import torch;")
    found = diff(plain, env)
    assert found.verdict == "differs" and {"numerics.settings.threads", "numerics.settings.allow_tf32.matmul", "numerics.settings.seed"} <= {d.field for d in found.of("numerics")}
    assert "TF32 on" in found.answer


def test_fresh_python_without_anything(tmp_path):
    """A virtual environment without pip, as uv makes them: no dependency of ours is there, and the capture works all the same."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "v"], check=True)
    (tmp_path / "v/pyvenv.cfg").write_text((tmp_path / "v/pyvenv.cfg").read_text() + "uv = 0.9.1\n")
    env = captured(tmp_path, python=str(tmp_path / "v/bin/python"))
    assert env.python["manager"] == "uv" and env.missing.keys() <= {"source", "accelerators"} and not env.numerics
    assert "pip" not in env.packages


def test_conda_prefix(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "v"], check=True)
    meta = tmp_path / "v/conda-meta"; meta.mkdir()
    (meta / "cudnn-9.1.0-h123_0.json").write_text("{}"); (meta / "python-3.12.1-h1_cpython.json").write_text("{}")
    env = captured(tmp_path, python=str(tmp_path / "v/bin/python"))
    assert env.python["manager"] == "conda" and env.python["conda"]["cudnn"] == "9.1.0 h123_0"


def test_command(tmp_path):
    done = cli("env", "capture", "-o", "env.json", cwd=tmp_path)
    assert done.returncode == 0 and "written to env.json" in done.stdout and done.stderr == ""
    env = Environment.load(tmp_path / "env.json")
    done = cli("env", "capture", "--json", cwd=tmp_path)
    document = json.loads(done.stdout)
    assert document["schema"] == "fsdl-devinfra/env/1" and document["digest"] == env.digest and "environment" in document


def test_command_data_and_errors(tmp_path):
    (tmp_path / "d").mkdir(); (tmp_path / "d/x").write_text("1")
    assert json.loads(cli("env", "capture", "--data", "d", "--json", cwd=tmp_path).stdout)["data"]["d"]["files"] == 1
    done = cli("env", "capture", "--data", "nothing", "--json", cwd=tmp_path)
    assert done.returncode == 2 and set(json.loads(done.stdout)) == {"error", "hint"}


@pytest.mark.slow
def test_probe(tmp_path):
    one, two = (cli("env", "capture", "--probe", "-o", n, cwd=tmp_path, **v) for n, v in (("a.json", {}), ("b.json", {"ATEN_CPU_CAPABILITY": "default"})))
    assert one.returncode == two.returncode == 0
    env = Environment.load(tmp_path / "a.json")
    assert env.numerics["origin"] == "observed" and "cpu float32" in env.fingerprint
    done = cli("env", "diff", "a.json", "b.json", "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert done.returncode == 1 and "numerics.settings.cpu_capability" in [d["field"] for d in found["differences"]] and "fingerprints prove it" in found["answer"]
    assert cli("env", "verify", "a.json", cwd=tmp_path).returncode == 0
    assert cli("env", "verify", "b.json", cwd=tmp_path).returncode == 1


def test_help_shows_examples():
    for parts in (), ("capture",), ("diff",), ("verify",), ("restore",):
        done = cli("env", *parts, "--help")
        assert done.returncode == 0 and "examples:" in done.stdout and "fsdl-devinfra env" in done.stdout


def test_in_threads_and_twice_the_same():
    assert capture().digest == capture().digest


def test_what_the_fingerprint_sets_is_not_a_variable_of_the_run(monkeypatch):
    """The first optimizer of a process sets TORCHINDUCTOR_CACHE_DIR; beside it, slow variables were asked too late."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    asked, probed = threading.Event(), []

    def probe():
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "set-by-the-fingerprint")
        probed.append(asked.is_set())
        return {}

    def slow_variables():
        time.sleep(0.3)
        found = variables()
        asked.set()
        return found
    monkeypatch.setattr(environment, "_probe", probe)
    monkeypatch.setattr(environment, "variables", slow_variables)
    env = capture(probe=True)
    assert probed == [True] and "TORCHINDUCTOR_CACHE_DIR" not in env.variables
    assert capture(probe=True).variables["TORCHINDUCTOR_CACHE_DIR"]  # control: now the run itself has it


def test_memory_that_a_host_takes_back_is_no_other_machine():
    env = capture()
    for taken, verdict in (0, "same"), (64 << 20, "same"), (env.machine["memory_bytes"] // 4, "differs"):
        other = dataclasses.replace(env, machine=env.machine | {"memory_bytes": env.machine["memory_bytes"] - taken})
        assert diff(env, other).verdict == diff(other, env).verdict == verdict, taken


def test_package_round_trip():
    env = capture()
    assert all(isinstance(p, Package) for p in Environment.from_dict(env.to_dict()).packages.values())
