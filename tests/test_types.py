"""The types that `py.typed` promises, seen from a user's side: his type checkers pass on the README's own examples."""
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, package_alone

BIN = Path(sys.executable).parent
pytestmark = pytest.mark.slow

PROMISES = """
from fsdl_devinfra.memory import Architecture, Strategy, Footprint
from fsdl_devinfra.compute import plan, PlanReport
from fsdl_devinfra.env import Environment, capture
from fsdl_devinfra.hub import ModelLock

reveal_type(Strategy.from_dict({"dp": 8}))
reveal_type(Architecture.from_config({}))
reveal_type(Architecture.from_numbers(layers=1, hidden=64, heads=1, vocab=8))
reveal_type(ModelLock.load("model.lock.json"))
reveal_type(capture())
reveal_type(plan)
"""


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> Path:
    """The README's Python examples, one after the other as a reader runs them, and a file that asks what some calls return."""
    folder = tmp_path_factory.mktemp("examples")
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert blocks, "the README has no Python example"
    (folder / "example.py").write_text("\n".join(blocks), encoding="utf-8")
    (folder / "promises.py").write_text(PROMISES, encoding="utf-8")
    # type checkers do not follow the import hook of an editable install
    (folder / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(package_alone())]}), encoding="utf-8")
    return folder


def pyright(folder: Path) -> list[dict]:
    command = [str(BIN / "pyright"), "--pythonpath", sys.executable, "--outputjson", "-p", str(folder)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    return json.loads(done.stdout)["generalDiagnostics"]


def test_pyright_passes_on_the_examples_of_the_readme(examples):
    errors = [d for d in pyright(examples) if d["severity"] == "error"]
    assert not errors, errors


def test_results_are_of_their_own_class(examples):
    told = [d["message"] for d in pyright(examples) if d["file"].endswith("promises.py") and d["severity"] == "information"]
    types = [re.findall(r'is "(.*)"', message)[0] for message in told]
    assert types[:5] == ["Strategy", "Architecture", "Architecture", "ModelLock", "Environment"]
    assert "PlanReport" in types[5]


def test_a_wrong_use_is_an_error(examples):
    """The healthy control: the checker does see the package's types."""
    (examples / "wrong.py").write_text("from fsdl_devinfra.memory import Strategy\nStrategy(dp='eight')\n", encoding="utf-8")
    try: assert any(d["severity"] == "error" and d["file"].endswith("wrong.py") for d in pyright(examples))
    finally: (examples / "wrong.py").unlink()


def test_mypy_passes_on_the_examples_of_the_readme(examples):
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--cache-dir", str(examples / "cache"), *map(str, [examples / "example.py"])]
    env = os.environ | {"MYPYPATH": str(package_alone())}
    done = subprocess.run(command, cwd=examples, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
