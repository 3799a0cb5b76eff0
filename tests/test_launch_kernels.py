"""The attention kernel of a trainer's file: what the class declares in Transformers, and what the plan counted."""
from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fsdl_devinfra.compute.cluster import cluster
from fsdl_devinfra.compute.planning import plan
from fsdl_devinfra.compute.throughput import throughput
from fsdl_devinfra.core import find_device
from fsdl_devinfra.hub.source import builtin_folder
from fsdl_devinfra.launch.commands import TARGETS
from fsdl_devinfra.launch.job import read_job
from fsdl_devinfra.memory.architecture import Architecture
from fsdl_devinfra.memory.footprint import REMEDIES, estimate
from fsdl_devinfra.memory.strategy import Strategy, Workload

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {
    "llama": dict(hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, intermediate_size=8192, vocab_size=32000),
    "bloom": dict(hidden_size=2048, n_layer=24, n_head=16, vocab_size=250880),
    "mpt": dict(d_model=2048, n_layers=24, n_heads=16, vocab_size=50432),
    "xglm": dict(d_model=1024, num_layers=24, attention_heads=16, ffn_dim=4096, vocab_size=256008),
    "gpt_neox": dict(hidden_size=2048, num_hidden_layers=24, num_attention_heads=16, intermediate_size=8192, vocab_size=50432),
}
WANTED = {"llama": "flash_attention_2", "gpt_neox": "flash_attention_2", "bloom": "eager", "mpt": "eager", "xglm": "eager"}
FILE = {"trl": "sft.yaml", "axolotl": "axolotl.yaml", "llama-factory": "train.yaml"}
FACTORY = {"flash_attention_2": "fa2", "sdpa": "sdpa", "eager": "disabled", None: "auto"}


def model_of(kind: str) -> Architecture:
    return Architecture.from_config(dict(CONFIGS[kind], model_type=kind))


def planned(kind: str, folder: Path, gpu: str = "h100", **said):
    """The report and the job that `launch` reads from the plan's file."""
    report = plan(model_of(kind), find_device(gpu), 2, Strategy(**said), Workload(1024))
    report.save(folder / "plan.json")
    return report, read_job(folder / "plan.json", (report.best or 0) + 1)


def said_in(job, target: str) -> str | None:
    yaml = pytest.importorskip("yaml")
    settings = yaml.safe_load(TARGETS[target](job).files[FILE[target]])
    return settings["flash_attn"] if target == "llama-factory" else settings.get("attn_implementation")


def module_of(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / f"{name}.py")
    assert spec and spec.loader
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shipped() -> dict[str, tuple[str, ...]]:
    """Model type → kernels of the table in the package; skipped where another Transformers is installed."""
    transformers = pytest.importorskip("transformers")
    document = json.loads(builtin_folder().with_name("attention_kernels.json").read_text(encoding="utf-8"))
    if transformers.__version__ != document["transformers"]: pytest.skip(f"the table is of {document['transformers']}")
    return {kind: tuple(names.split()) for names, kinds in document["kernels"].items() for kind in kinds}


@pytest.mark.slow  # imports every model of Transformers
def test_the_table_is_what_the_installed_transformers_declares():
    own, rows = module_of("make_attention_kernels"), shipped()
    classes = own.model_classes()
    assert rows == {kind: own.kernels_of(found) for kind, found in classes.items()} and len(rows) > 300


@pytest.mark.parametrize("kind", ["llama", "gemma2", "bloom", "mpt", "xglm", "t5", "mt5", "umt5", "longt5"])
def test_transformers_refuses_what_the_table_does_not_hold(kind):
    """Not by the script's own reading: the methods that refuse a kernel, asked of the class itself."""
    rows = shipped()
    from transformers.models.auto import modeling_auto
    names = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES | modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    cls = getattr(pytest.importorskip("transformers"), names[kind])
    blank = object.__new__(cls)
    blank.__dict__["config"] = type("config", (), {"_name_or_path": "", "dtype": None})()
    blank.__dict__["_flash_attn_import_error"] = lambda *a, **k: None  # flash-attn itself need not be here
    tried = {"flash_attention_2": lambda: blank._flash_attn_can_dispatch(2, True), "sdpa": lambda: blank._sdpa_can_dispatch(True)}
    def allowed(ask) -> bool:
        try: return bool(ask())
        except ValueError: return False
    assert tuple(name for name, ask in tried.items() if allowed(ask)) == rows[kind]


def test_every_family_that_is_counted_by_formula_has_a_row():
    """A model that plan can size is not left without a kernel because its type is missing; those without one are named."""
    from fsdl_devinfra.hub.popular import popular_models
    from fsdl_devinfra.memory.attention_kernels import attention_kernels
    kinds = {str(m.config["model_type"]) for m in popular_models() if m.config.get("model_type")}
    missing = sorted(kind for kind in kinds if attention_kernels(kind) is None)
    print(f"{len(kinds) - len(missing)} of {len(kinds)} types have a row; without: {missing}")
    assert set(missing) <= REMOTE


#: types of the popular table whose classes are not in Transformers, and so with the model's own code
REMOTE = {"internlm2", "kimi_k2", "mimo", "minimax_m3"}


@pytest.mark.parametrize("target", FILE)
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_file_names_what_the_class_runs(kind, target, tmp_path):
    _, job = planned(kind, tmp_path)
    wanted = WANTED[kind]
    assert said_in(job, target) == (FACTORY[wanted] if target == "llama-factory" else wanted)
    notes = " ".join(TARGETS[target](job).notes)
    assert ("has eager attention alone" in notes) == (wanted == "eager")  # the plan for fsdp counted flash, and that is said


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_plan_for_the_trainer_counts_the_kernel_of_the_file(kind, tmp_path):
    report, job = planned(kind, tmp_path, framework="hf")
    attention = "eager" if WANTED[kind] == "eager" else "flash"
    assert {p.strategy.attention for p in report.plans} == {attention} == {job.strategy.attention}
    notes = TARGETS["trl"](job).notes
    assert not any("attention" in note for note in notes), notes
    # cost, plan and memory to the digit, also where flash was asked for
    best = report.headline
    assert best is not None
    asked = replace(best.strategy, attention="flash")
    device = find_device("h100")
    speed = throughput(model_of(kind), asked, best.workload, cluster("h100", best.gpus))
    held = estimate(model_of(kind), asked, best.workload, device)
    assert speed.strategy == best.strategy == held.strategy
    assert held.device_bytes.value == best.peak_bytes and speed.step_seconds.value == best.step_seconds.value
    assert any(note.startswith("Attention: eager") for note in held.assumptions) == (attention == "eager")
    assert any(note.startswith("Attention: eager") for note in speed.assumptions) == (attention == "eager")
    assert any(note.startswith("Attention: eager") for note in report.assumptions) == (attention == "eager")


def test_eager_attention_costs_memory_and_time_where_it_runs():
    """The kernel matters: a plan that counted the other one would be wrong by this much."""
    model, work, device = model_of("bloom"), Workload(2048, 4), find_device("h100")
    trainer, own = (Strategy(framework=name, attention="flash") for name in ("hf", "fsdp"))
    eager, flash = (estimate(model, s, work, device).peak_bytes.value for s in (trainer, own))
    assert eager > 1.3 * flash
    slow, fast = (throughput(model, s, work, cluster("h100", 1)).step_seconds.value for s in (trainer, own))
    assert slow > 1.1 * fast
    remedy = next(r for r in REMEDIES if r.name == "flash attention")
    asked = Strategy(framework="hf", attention="eager")
    assert [remedy.applies(model_of(kind), asked, work) for kind in ("llama", "bloom")] == [True, False]


def test_a_class_that_nobody_knows_is_left_to_transformers(tmp_path):
    odd = replace(model_of("llama"), model_type="a-model-of-mine")
    plan(odd, find_device("h100"), 2, Strategy(), Workload(1024)).save(tmp_path / "plan.json")
    job = read_job(tmp_path / "plan.json")
    assert job.attention_kernels is None
    for target in FILE:
        assert said_in(job, target) == ("auto" if target == "llama-factory" else None)
        notes = " ".join(TARGETS[target](job).notes)
        assert "is not known" in notes and "flash attention" in notes
    # a plan of before this table is such a one
    document = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    del document["attention_kernels"]
    (tmp_path / "plan.json").write_text(json.dumps(document), encoding="utf-8")
    assert read_job(tmp_path / "plan.json").attention_kernels is None


@pytest.mark.parametrize("gpu,said,wanted", [("v100", {}, "sdpa"), ("t4", {}, "sdpa"), ("a100", {}, "flash_attention_2"), ("a100", {"precision": "fp32"}, "sdpa")])
def test_flash_attn_needs_sixteen_bits_and_a_gpu_that_is_new_enough(gpu, said, wanted, tmp_path):
    report = plan(replace(model_of("llama"), layers=4), find_device(gpu), 1, Strategy(lora_rank=8, **said), Workload(512))
    report.save(tmp_path / "plan.json")
    assert said_in(read_job(tmp_path / "plan.json"), "trl") == wanted
