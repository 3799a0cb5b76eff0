"""Every rule, one by one: two environments that differ in one field of it differ with its effect, and the command exits accordingly."""
import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest

from fsdl_devinfra.cli import main
from fsdl_devinfra.env import Environment, Package, capture, diff
from fsdl_devinfra.env.difference import _SHOWN_BY
from fsdl_devinfra.env.rules import EFFECTS, RULES, rule_number, rule_of


def base():
    return Environment("", "2026-01-01T00:00:00Z", "0.1.0", machine={"os": "Ubuntu", "architecture": "x86_64", "cpu": {"model": "EPYC", "usable": 8}}, python={"version": "3.12.1"},
                       packages={"torch": Package("2.13.0")}, accelerators={"gpus": []}, numerics={"origin": "observed", "settings": {"threads": 8}}, source={"commit": "a" * 40})


def put(env, field, value):
    """`env` with a value at a dotted field; names that hold dots themselves are taken whole."""
    document = env.to_dict()
    top, _, rest = field.partition(".")
    if top == "packages":
        name, _, attribute = rest.rpartition(".")
        document["packages"].setdefault(name, {"version": "1.0"})[attribute] = value
    elif top in ("numerics",) and rest.startswith("settings."): document[top].setdefault("settings", {})[rest.removeprefix("settings.")] = value
    elif rest.startswith("untracked."):
        name, _, attribute = rest.removeprefix("untracked.").rpartition(".")
        document[top]["untracked"] = [{"path": name, attribute: value}]
    elif rest.startswith("submodules") or rest.startswith("locks"):
        list_name, _, attribute = rest.rpartition(".")
        document[top][list_name.split("x")[0].split(".")[0]] = [{"path" if top == "source" else "file": "x", attribute: value}]
    elif rest == "gpus": document[top]["gpus"] = [{"name": "GPU"}] * (1 if value == "3.11.0" else 2)
    elif rest.startswith("gpus."):
        attribute = rest.rpartition(".")[2]
        document[top]["gpus"] = [{"name": "GPU", attribute: value}]
    else:
        place, names = document[top], rest.split(".")
        for name in names[:-1]: place = place.setdefault(name, {})
        place[names[-1]] = value
    return Environment.from_dict(document)


FIELDS = [(f.replace("*", "x"), rule) for rule in RULES for f in rule.fields.split()
          if rule.source != "measured by both captures" and "." in f and not f.startswith(("removed", "missing", "numerics.meanings", "accelerators.gpus.x.name", "numerics.origin", "source.root"))]
#: decided together with another field, see the notebook Difference
TOGETHER = {"source.submodulesx.path", "accelerators.tpu.x"}


@pytest.mark.parametrize("field,rule", FIELDS, ids=[f for f, _ in FIELDS])
def test_rule(field, rule):
    if field in TOGETHER or field.endswith("x") and field.split(".")[0] == "source": pytest.skip("decided with another field")
    left, right = "3.11.0", "3.13.0"
    if field == "packages.fsdl-devinfra.x": field = "packages.fsdl-devinfra.version"
    if field == "packages.x" or field.startswith("numerics.x"): field = "packages.left-pad.installer" if field == "packages.x" else "numerics.settings.something"
    start = dataclasses.replace(base(), numerics={}) if field in _SHOWN_BY else base()  # what torch shows would decide
    a, b = put(start, field, left), put(start, field, right)
    found = [d for d in diff(a, b).differences]
    mine = [d for d in found if rule_number(d.field) == RULES.index(rule) or d.field == field]
    assert mine, (field, found)
    assert {d.effect for d in mine} == {rule.effect}
    assert diff(a, b).verdict == ("same" if all(d.effect == "record" for d in found) else "differs")


def test_worst_first():
    a = base()
    b = put(put(put(put(a, "packages.requests.version", "9"), "machine.cpu.model", "Xeon"), "packages.torch.version", "2.14.0"), "variables.NCCL_ALGO", "Ring")
    found = diff(a, b)
    order = [EFFECTS.index(d.effect) for d in found.differences]
    assert order == sorted(order) and found.differences[0].field == "packages.torch.version"
    assert "torch 2.13.0 → 2.14.0" in found.answer


def test_symmetric():
    a, b = base(), put(put(base(), "packages.numpy.version", "2"), "variables.OMP_NUM_THREADS", "1")
    assert {(d.field, d.effect) for d in diff(a, b).differences} == {(d.field, d.effect) for d in diff(b, a).differences}


def test_every_rule_has_a_reason():
    for rule in RULES:
        assert rule.effect in EFFECTS and (rule.why or rule.effect == "record"), rule


def test_real_capture_falls_under_rules():
    for field in capture().flat(): assert rule_of(field).effect in EFFECTS


@pytest.mark.parametrize("change,status,verdict", [({}, 0, "same"), ({"packages": {"torch": Package("2.13.0"), "rich": Package("1.0")}}, 0, "same"), ({"packages": {"torch": Package("2.14.0")}}, 1, "differs"),
                                                   ({"machine": {"os": "Debian", "architecture": "x86_64", "cpu": {"model": "EPYC", "usable": 8}}}, 0, "same"),
                                                   ({"machine": {"os": "Ubuntu", "architecture": "x86_64", "cpu": {"model": "EPYC", "usable": 4}}}, 1, "differs")])
def test_exit_status(tmp_path, capsys, change, status, verdict):
    base().save(tmp_path / "a.json"); dataclasses.replace(base(), **change).save(tmp_path / "b.json")
    assert main(["env", "diff", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--json"]) == status
    document = json.loads(capsys.readouterr().out)
    assert document["verdict"] == verdict
    for d in document["differences"]: assert set(d) == {"field", "left", "right", "effect", "why"}


def test_not_a_capture(tmp_path, capsys):
    (tmp_path / "a.json").write_text("{}"); (tmp_path / "b.json").write_text("[")
    assert main(["env", "diff", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 2
    assert main(["env", "diff", str(tmp_path / "b.json"), str(tmp_path / "a.json"), "--json"]) == 2
    assert set(json.loads(capsys.readouterr().out)) == {"error", "hint"}


@pytest.mark.slow
def test_verdicts_agree_with_the_bits():
    """Settings run really; tests/studies/env_bits.py runs all. One that changes bits is called numerics, one that does nothing is not."""
    spec = importlib.util.spec_from_file_location("env_bits", Path(__file__).parent / "studies" / "env_bits.py")
    bits = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bits)
    changing = ["ATEN_CPU_CAPABILITY=default", "torch.set_flush_denormal(True)", 'torch.set_autocast_enabled("cpu", True)']
    quiet = ["TRITON_PRINT_AUTOTUNING=1", "torch.backends.cudnn.benchmark = True"]
    found = bits.study(0, 0, changing + quiet)
    assert found["operators"] >= 60 and not found["not run"] and not found["faults"], found
    assert [k for k, r in found["rows"].items() if r["changed"]] == changing
    assert not found["false alarms"], found["rows"]


VARIABLES = {"GLIBC_TUNABLES": ("glibc.malloc.arena_max=2", "glibc.cpu.hwcaps=-AVX2"), "XLA_FLAGS": ("--xla_dump_to=/tmp/x", "--xla_cpu_enable_fast_math=true"),
             "OMP_DYNAMIC": ("false", "true"), "NUMBA_NUM_THREADS": ("", "1")}


@pytest.mark.parametrize("name", VARIABLES)
def test_the_value_decides(name):
    """Measured by tests/studies/env_bits.py: one value of a variable does nothing, another may change numbers."""
    mild, real = VARIABLES[name]
    def effects(value, installed=()):
        packages = {"torch": Package("2.13.0+cpu"), "jax": Package("0.9")} | {p: Package("1.0") for p in installed}
        sides = [dataclasses.replace(base(), packages=packages, libraries={"torch": {"version": "2.13.0+cpu"}}, variables=v) for v in ({}, {name: value} if value else {})]
        return {d.effect for d in diff(*sides).differences}
    assert "numerics" not in effects(mild)
    if name == "NUMBA_NUM_THREADS": assert effects(real) == {"record"} and effects(real, ["numba"]) == {"numerics"}
    else: assert effects(real) == {"numerics"}
