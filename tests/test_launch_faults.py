"""A fault in any value of any emitted file is noticed: every word and number of every file of every target, one at a time."""
from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from test_launch_files import CANNOT, JOBS

import fsdl_devinfra.launch.validation as validation
from fsdl_devinfra.core.errors import CheckError
from fsdl_devinfra.launch import TARGETS, Job, launch
from fsdl_devinfra.memory import Strategy, Workload

LORA = Job("train-a", Strategy(dp=4, zero=3, lora_rank=16, base_weights="nf4"), Workload(1024, 2, 2), "H100-SXM-80GB", 4, 8, ("train.py",))
JOBS_AND_ADAPTERS = {**JOBS, "lora": LORA}
_WORD = re.compile(r"""(?<![\w$.{/-])(?:"[^"\n]*"|'[^'\n]*'|[\w$][\w$./:+@-]*)""")
_OTHER = {"true": "false", "false": "true", "True": "False", "False": "True"}


def wrong(word: str) -> str:
    """Another value of the same kind: the next number, the other truth value, a text with a letter more."""
    bare = word.strip("\"'")
    if bare in _OTHER: return word.replace(bare, _OTHER[bare])
    if re.fullmatch(r"\d+", bare): return word.replace(bare, str(int(bare) + 1))
    if re.fullmatch(r"\d+\.\d+", bare): return word.replace(bare, str(float(bare) + 1))
    return f"{word[:-1]}x{word[-1]}" if word[-1] in "\"'" else word + "x"


def faults(text: str) -> Iterator[tuple[str, str]]:
    """Each word of a file and the file with that word wrong; comments of a shell are left alone, SLURM's directives are not."""
    for found in _WORD.finditer(text):
        begin = text.rfind("\n", 0, found.start()) + 1
        line = text[begin:].partition("\n")[0]
        if line.lstrip().startswith("#") and not line.startswith("#SBATCH"): continue
        yield found.group(), text[:found.start()] + wrong(found.group()) + text[found.end():]


def unnoticed(target: str, job: Job, every: int = 1, first: int = 0) -> tuple[int, list[str]]:
    """How many faults were put in, and those that no check of ours noticed; the untouched files pass."""
    files = {f.path: f.content for f in launch(job, target).files}
    validation.OWN[target](job, files)
    tried, blind = 0, []
    for path, text in files.items():
        for number, (word, broken) in enumerate(faults(text)):
            if number % every != first: continue
            tried += 1
            try: validation.OWN[target](job, {**files, path: broken})
            except CheckError: continue
            blind.append(f"{path}: {word}")
    return tried, blind


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Neither launchers' loaders nor a bash for each fault: what is counted is our own comparison."""
    monkeypatch.setattr(validation, "read_by_loader", lambda *_: None)
    monkeypatch.setattr(validation, "_shell", lambda text: None)


@pytest.mark.parametrize("target", TARGETS)
def test_a_fault_in_a_value_is_noticed(target):
    """Every fifth word, another fifth for each job; all of them in the slow test."""
    tried, blind = 0, []
    for number, (name, job) in enumerate(JOBS_AND_ADAPTERS.items()):
        if (target, name) in CANNOT or target == "deepspeed" and name in ("hsdp-tp", "3d"): continue
        some, missed = unnoticed(target, job, 5, number % 5)
        tried, blind = tried + some, blind + missed
    assert blind == [] and tried >= 20


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_a_fault_in_every_value_is_noticed(target):
    found = [unnoticed(target, job) for name, job in JOBS_AND_ADAPTERS.items() if (target, name) not in CANNOT]
    assert [word for _, blind in found for word in blind] == []
    print(f"{target}: {sum(tried for tried, _ in found)} faults, all noticed")


def test_a_file_without_its_last_value_is_noticed():
    job = JOBS["fsdp"]
    files = {f.path: f.content for f in launch(job, "accelerate").files}
    short = files["accelerate.yaml"].rsplit("\n", 2)[0] + "\n"
    with pytest.raises(CheckError, match="says"): validation.OWN["accelerate"](job, {"accelerate.yaml": short})


def test_an_emitter_that_is_wrong_is_noticed(monkeypatch):
    """The comparison shares no code with the emitters: one that shards differently is caught."""
    from fsdl_devinfra.launch import frameworks
    right = frameworks.fsdp_config
    monkeypatch.setattr(frameworks, "fsdp_config", lambda job: right(job) | {"fsdp_reshard_after_forward": False})
    with pytest.raises(CheckError, match="fsdp_reshard_after_forward"): launch(JOBS["fsdp"], "accelerate")
