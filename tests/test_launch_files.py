"""Every file of every launcher: parsed by another reader, and the command line around it."""
from __future__ import annotations

import ast
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fsdl_devinfra.compute.planning import plan
from fsdl_devinfra.core.device_table import find_device
from fsdl_devinfra.core.errors import BadInput, CheckError
from fsdl_devinfra.launch import TARGETS, Job, launch
from fsdl_devinfra.launch.validation import LOADERS, read_by_loader
from fsdl_devinfra.memory import Architecture, Strategy, Workload

yaml = pytest.importorskip("yaml")
SMALL = Architecture.from_numbers(layers=12, hidden=768, heads=12, vocab=50257, gated=False, tied=True, name="org/small")
JOBS = {
    "one": Job("train-a", Strategy(), Workload(1024), "A100-SXM-40GB", 1, 8, ("train.py", "--note", "a 'quoted' \"word\"; $(x)")),
    "ddp": Job("train-a", Strategy(dp=8), Workload(1024, 2, 2), "A100-SXM-40GB", 8, 8, ("train.py",)),
    "fsdp": Job("train-a", Strategy(dp=16, zero=3, recompute="full", compile=True), Workload(1024), "H100-SXM-80GB", 16, 8, ("train.py",)),
    "zero": Job("train-a", Strategy(dp=16, zero=2, framework="deepspeed", offload="optimizer"), Workload(1024, 2, 3), "H100-SXM-80GB", 16, 8, ("train.py",)),
    "hsdp-tp": Job("train-a", Strategy(dp=8, tp=2, zero=3), Workload(1024), "H100-SXM-80GB", 16, 8, ("train.py",)),
    "3d": Job("train-a", Strategy(dp=2, tp=4, pp=4, framework="megatron", zero=1), Workload(1024, 1, 8), "H100-SXM-80GB", 32, 8, ("pretrain_gpt.py",)),
    "digits": Job("train-digits", Strategy(dp=2, zero=3), Workload(17), "T4-16GB", 2, 8),
}
CANNOT = {("deepspeed", "hsdp-tp"), ("deepspeed", "3d"), ("accelerate", "3d"), ("torchtitan", "3d"), ("trl", "hsdp-tp"), ("llama-factory", "hsdp-tp"),
          *((trainer, "3d") for trainer in ("trl", "axolotl", "llama-factory"))}


def documents(found) -> dict[str, object]:
    """Every emitted file, parsed by a reader that is not ours."""
    read = {}
    for f in found.files:
        if f.path.endswith(".yaml"): read[f.path] = list(yaml.safe_load_all(f.content))
        elif f.path.endswith(".json"): read[f.path] = json.loads(f.content)
        elif f.path.endswith(".py"): read[f.path] = ast.parse(f.content)
        elif f.path.endswith((".sh", ".sbatch")): read[f.path] = subprocess.run(["bash", "-n"], input=f.content, text=True, check=True)
        else: read[f.path] = f.content
    return read


@pytest.mark.slow  # the launchers' own loaders take seconds each
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", JOBS)
def test_every_file_of_every_launcher(target, name):
    if (target, name) in CANNOT:
        with pytest.raises(BadInput): launch(JOBS[name], target)
        return
    found = launch(JOBS[name], target)
    assert documents(found) and found.command and "own checks" in found.validated_by
    installed = target in LOADERS and __import__("importlib.util").util.find_spec(LOADERS[target][0])
    assert bool(installed) == (target in LOADERS and LOADERS[target][1] in found.validated_by)


def test_words_survive_the_shell(tmp_path):
    """What the user wrote after -- reaches the script as it was, in a real shell."""
    text = launch(JOBS["one"], "torchrun").files[0].content if shutil.which("bash") else ""
    (tmp_path / "torchrun").write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    (tmp_path / "torchrun").chmod(0o755)
    (tmp_path / "run.sh").write_text(text)
    done = subprocess.run(["bash", "run.sh"], cwd=tmp_path, capture_output=True, text=True, check=True, env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
    assert json.loads(done.stdout)[2:] == list(JOBS["one"].script)


def test_loaders_refuse_what_is_wrong():
    """The loaders are really asked: a file that they must refuse is refused."""
    good = launch(JOBS["fsdp"], "accelerate").files[0].content
    with pytest.raises(CheckError, match="refuses"): read_by_loader("accelerate", {"accelerate.yaml": good + "nonsense: 1\n"})
    with pytest.raises(CheckError, match="fsdp_nonsense"): read_by_loader("accelerate", {"accelerate.yaml": good.replace("  fsdp_version: 2", "  fsdp_version: 2\n  fsdp_nonsense: 1")})


def test_kubernetes_job_has_the_fields_of_its_api():
    service, job = documents(launch(JOBS["fsdp"], "kubernetes"))["job.yaml"]
    pod = job["spec"]["template"]["spec"]
    assert job["apiVersion"] == "batch/v1" and job["spec"]["completionMode"] == "Indexed" and pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == job["spec"]["template"]["metadata"]["labels"]
    assert pod["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert all(isinstance(e["value"], str) for e in pod["containers"][0]["env"])  # numbers are refused by the API


@pytest.fixture
def plan_file(tmp_path):
    return plan(SMALL, find_device("a100-40"), 2, workload=Workload(1024)).save(tmp_path / "plan.json")


def test_command_writes_and_reports(cli, plan_file, tmp_path):
    ran = cli("launch", plan_file, "--to", "slurm", "-o", tmp_path / "job", "--json", "--", "my.py", "--json", "--pick", "9")
    assert ran.status == 0, ran.err
    assert {"target", "files", "command", "validated_by"} <= ran.json.keys() and ran.json["files"][0]["path"] == "job.sbatch"
    assert "my.py --json --pick 9" in (tmp_path / "job" / "job.sbatch").read_text()


@pytest.mark.parametrize("args,why", [(["--pick", "99"], "no number 99"), (["--to", "nonsense"], "cannot be"), (["--pick", "0"], "less than 1")])
def test_mistakes_are_one_sentence(cli, plan_file, args, why):
    ran = cli("launch", plan_file, *(["--to", "slurm"] if "--to" not in args else []), *args)
    assert ran.status == 2 and why in ran.sentence()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": "fsdl-devinfra/plan/1", "plans": []}', '{"schema": "fsdl-devinfra/plan/1", "gpu": "h100", "plans": [{"strategy": 3}]}', "\x00\x01"])
def test_broken_plans_are_one_sentence(cli, tmp_path, content):
    (tmp_path / "p.json").write_text(content)
    ran = cli("launch", tmp_path / "p.json", "--to", "torchrun")
    assert ran.status == 2 and ran.sentence()


def test_no_torch_is_imported(plan_file):
    code = f"import sys; from fsdl_devinfra.cli import main; main(['launch', {str(plan_file)!r}, '--to', 'slurm', '--json']); sys.exit(3 if {{'torch', 'transformers', 'numpy'}} & set(sys.modules) else 0)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


#: torchrun's parser as three releases of torch wrote it: alone; with an action of its own (2.14, which every launch refused); with a helper
PARSERS = {
    "alone": "",
    "with an action": "class _Shown(_Action):\n    def __call__(self, parser, *_): parser.exit()\n",
    "with a helper": "def _shells(): return ['bash']\n",
}
MADE = """from argparse import Action as _Action, ArgumentParser, REMAINDER
from torch.distributed.argparse_util import env
{more}
def get_args_parser():
    parser = ArgumentParser()
    parser.add_argument("--standalone", action="store_true")
    parser.add_argument("--nproc-per-node", action=env, default="1")
    {use}
    parser.add_argument("script")
    parser.add_argument("rest", nargs=REMAINDER)
    return parser
"""
USES = {"alone": "pass", "with an action": "parser.add_argument('--shown', action=_Shown, nargs=0)", "with a helper": "parser.add_argument('--shell', choices=_shells())"}


@pytest.mark.parametrize("kind", PARSERS)
def test_torchrun_of_any_torch_reads_its_line(kind, tmp_path, monkeypatch):
    real = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
    made = tmp_path / "torch" / "distributed"
    made.mkdir(parents=True)
    for folder in (made.parent, made): (folder / "__init__.py").write_text("")
    (made / "argparse_util.py").write_text((real / "distributed" / "argparse_util.py").read_text())
    (made / "run.py").write_text(MADE.format(more=PARSERS[kind], use=USES[kind]))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    line = "exec torchrun --standalone --nproc-per-node=2 train.py --lr 1\n"
    assert read_by_loader("torchrun", {"run.sh": line})
    with pytest.raises(CheckError, match="--nonsense"): read_by_loader("torchrun", {"run.sh": line.replace("--standalone", "--nonsense")})
