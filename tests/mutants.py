"""Deliberate faults in the lines that decide something: each must make a test fail.

    python tests/mutants.py [--sample N] [--seed S] [--only WORDS] [--list]

One fault at a time goes into a copy of the checkout: a comparison that is turned round, an `and` for an `or`, a verdict
for its opposite, a number that is one off or twice as large, a plus for a minus, a condition that is dropped. Then the
tests named beside the function run there. A fault that no test notices is a survivor, and is printed. `ACCEPTED` holds
those that change nothing that anybody could see, each with its reason.
"""
from __future__ import annotations

import argparse
import ast
import multiprocessing
import os
import random
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

from conftest import ROOT, copy_checkout

PACKAGE = "fsdl_devinfra"
os.environ["OMP_NUM_THREADS"] = "1"  # before the processes that the tests run in
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pytest", "numpy", "torch", "onnx"])
OPPOSITE = {"pass": "fail", "fail": "pass", "yes": "no", "no": "yes", "tight": "no", "same": "differs", "differs": "same",
            "numerics": "record", "performance": "record", "not-run": "pass", "fits": "no"}
COMPARISONS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
               ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult}


@dataclass(frozen=True)
class Target:
    """A function that decides something, and the tests that ought to notice a fault in it."""
    what: str
    module: str  # below the package
    function: str  # "name" or "Class.name"
    tests: str  # arguments of pytest


def of(what: str, module: str, word: str, *functions: str) -> list[Target]:
    """Functions of one module, and those of the quick tests whose names hold a word."""
    return [Target(what, module, name, f"tests/test_verdicts.py -k {word}") for name in functions]


TARGETS = [
    Target("whether it fits", "memory/footprint.py", "_fits", "tests/test_verdicts.py -k 'edges or footprint or three_verdicts or without_a_gpu'"),
    Target("verdict of preflight", "preflight.py", "PreflightReport.verdict", "tests/test_verdicts.py -k 'failed_step'"),
    Target("exit status of preflight", "preflight.py", "PreflightReport.status", "tests/test_verdicts.py -k 'failed_step'"),
    Target("bytes of a parameter", "memory/states.py", "recipe", "tests/test_verdicts.py -k 'trainable'"),
    Target("bytes of moments", "memory/states.py", "moments", "tests/test_verdicts.py -k 'trainable'"),
    Target("what ZeRO shards", "memory/states.py", "sharded_states", "tests/test_verdicts.py -k 'zero_shards or trainable'"),
    *[Target("the same outputs", "parity/rule.py", name, "tests/test_verdicts.py -k 'torch or nan or integers or shape or tolerance or allowed or measured or no_number'")
      for name in ("_as_a_whole", "_judgement", "_over_fixed", "_without_scale")],
    Target("the same integers", "parity/rule.py", "_exact", "tests/test_verdicts.py -k 'integers'"),
    Target("bytes on disk", "hub/verification.py", "is_right", "tests/test_verdicts.py -k 'verifies or damage or read_again or by_itself'"),
    *[Target("bytes on disk, from outside", "hub/verification.py", name, "tests/test_verdicts.py tests/test_hub_hostile.py")
      for name in ("seen_problem", "_size_problem", "_read_problem")],
    *of("DeepSpeed's file", "launch/frameworks.py", "launch", "deepspeed_config", "_deepspeed_can", "_zero_block"),
    *[Target("verdict of a step", "preflight.py", name, "tests/test_verdicts.py -k 'step'") for name in ("run_step", "_judged_step")],
    *of("launch values: accelerate", "launch/frameworks.py", "launch", "accelerate_config", "_accelerate_can", "_kind", "_processes",
        "fsdp_config", "_degrees"),
    *of("launch values: fine-tuning", "launch/finetuning.py", "launch", "trl_settings", "_trl_arguments", "_trl_adapters", "axolotl_settings",
        "_axolotl_arguments", "_axolotl_adapters", "_axolotl_fsdp", "_axolotl_shards", "llama_factory_settings", "_factory_arguments",
        "_factory_adapters", "_recomputes", "_held_in", "_on_gpu", "_attention", "_no_split"),
    *of("launch values: pretraining", "launch/pretraining.py", "launch", "titan_settings", "_titan_can", "_titan_shards", "_titan_parallelism",
        "_titan_training", "_titan_carries", "bridge_settings", "_bridge_parallelism", "_bridge_batch", "_bridge_recompute", "_bridge_sharding",
        "_bridge_adapters", "_bridge_choices", "_bridge_carries"),
    *of("bytes of activations", "memory/activations.py", "memory", "mlp_bytes", "core_bytes", "attention_bytes", "autocast", "logit_bytes"),
    *of("bytes of an engine", "memory/engines.py", "memory", "reduced_bytes", "_accumulated", "timeline", "megatron_weights", "megatron_gradients",
        "megatron_optimizer", "megatron_buffers", "megatron_settled", "megatron_spare", "_copies_for_step", "largest_gradient", "megatron_backward",
        "layer_leftovers", "activation_leftovers"),
    *of("tolerance of every channel", "parity/rule.py", "tolerance", "blocks", "_worst_index", "_least_room", "scale_of"),
    *of("excuse by padding", "parity/padding.py", "padding", "explained_by_padding", "hidden_positions", "with_hidden", "_attended", "_softened"),
    *of("what a cause needs", "parity/causes.py", "cause", "by_optimisation", "by_train_mode", "_put_back", "_one_by_one", "_all_at_once", "by_restoring", "_to_put_back",
        "by_fresh_export", "by_opset", "by_tf32", "by_evaluator", "by_trace", "_as_number", "by_switches", "by_exporter", "find_causes"),
    *of("what is numerics", "env/difference.py", "numerics", "diff", "_judge", "_same_setting", "_explained",
        "_mild", "_known_once", "_torch_on_one_side", "_same_data"),
    *of("what verify counts", "hub/verification.py", "left_out", "verify", "_compared", "_read_problems", "_to_read", "_not_locked",
        "_unlocked_problems", "_verification", "_is_as_skipped", "_is_single"),
    *of("what was signed", "hub/signing.py", "signed", "_compare"),
    *of("the cheapest price", "compute/prices.py", "price", "cheapest", "credible", "_rented"),
    *of("the plan shown first", "compute/planning.py", "headline", "_headline", "_near", "_rate", "_setting_up"),
]

#: (function, fault, which of its places in that function that read alike, from 1) → why nobody could see it
ACCEPTED: dict[tuple[str, str, int], str] = {
    ("run_step", "3 as 6", 1): "digits of the seconds that a step took; microseconds for milliseconds",
    ("_judged_step", "0.0 as 1", 1): "`run_step` puts the seconds in", ("_judged_step", "0.0 as 1", 2): "`run_step` puts the seconds in",
    ("_exact", "int(differ.sum()) - count with Add", 1): "shown only where the count is zero",
    ("verify", "True as False", 1): "`quiet`: there is progress on standard error only where it takes longer than 2 s",
    ("_read_problems", "8 as 16", 1): "how many threads read", ("_read_problems", "1 as 2", 1): "how many threads read",
    ("_read_problems", "os.cpu_count() or 1 joined by And", 1): "how many threads read",
    ("_size_problem", "size < SNIFF_BYTES compared with LtE", 1): "a pointer has some 130 bytes: none has just as many as are looked at",
    ("_is_single", "not isinstance(given, ModelLock) and (not lock.repo) joined by Or", 1): "of a lock of a repository no folder is recorded",
    ("_bridge_parallelism", "strategy.ep > 1 compared with GtE", 1): "without expert parallelism `expert_tp` is `tp` itself",
    ("_rate", "1 as 2", 1): "both sides of a comparison count twice where it is not about time; that of `1 - NEAR` is noticed",
}


@dataclass(frozen=True)
class Mutant:
    target: Target
    line: int
    fault: str  # what was changed, in words
    turn: int  # which of the places in its function where these words fit, from 1
    source: str  # of the whole module

    @property
    def key(self) -> tuple[str, str, int]: return self.target.function, self.fault, self.turn

    def __str__(self) -> str: return f"{self.target.module}:{self.line} {self.target.function}: {self.fault}"


def variants(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Faults for one node: what was changed, and the node that takes its place."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
        other = COMPARISONS[type(node.ops[0])]()
        yield f"{ast.unparse(node)} compared with {type(other).__name__}", ast.Compare(node.left, [other], node.comparators)
    if isinstance(node, ast.BoolOp):
        other_word = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield f"{ast.unparse(node)} joined by {type(other_word).__name__}", ast.BoolOp(other_word, node.values)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield f"{ast.unparse(node)} without its not", node.operand
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        other_operator = OPERATORS[type(node.op)]()
        yield f"{ast.unparse(node)} with {type(other_operator).__name__}", ast.BinOp(node.left, other_operator, node.right)
    if isinstance(node, ast.IfExp):
        yield f"{ast.unparse(node)} with its ends exchanged", ast.IfExp(node.test, node.orelse, node.body)
    if isinstance(node, ast.Constant):
        if isinstance(node.value, bool): yield f"{node.value} as {not node.value}", ast.Constant(not node.value)
        elif isinstance(node.value, (int, float)):
            changed = node.value * 2 if node.value else 1
            yield f"{node.value} as {changed}", ast.Constant(changed)
        elif node.value in OPPOSITE: yield f"{node.value!r} as {OPPOSITE[node.value]!r}", ast.Constant(OPPOSITE[node.value])


class Exchange(ast.NodeTransformer):
    """Puts one node in the place of another."""

    def __init__(self, old: ast.AST, new: ast.AST): self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return ast.copy_location(self.new, node) if node is self.old else self.generic_visit(node)


def function_in(tree: ast.Module, name: str) -> ast.AST | None:
    body: list[ast.stmt] = tree.body
    found: ast.AST | None = None
    for part in name.split("."):
        found = next((n for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == part), None)
        if found is None: return None
        body = found.body
    return found


def places(target: Target) -> list[tuple[Target, int]]:
    """Each fault of one function as a number: the faulty source is made when its turn comes."""
    text = (ROOT / PACKAGE / target.module).read_text(encoding="utf-8")
    function = function_in(ast.parse(text), target.function)
    if function is None: raise SystemExit(f"{target.module} has no {target.function}: bring TARGETS up to date")
    skipped = {id(n) for n in docstrings_and_annotations(function)}
    count = sum(1 for n in ast.walk(function) if id(n) not in skipped for _ in variants(n))
    return [(target, i) for i in range(count)]


def docstrings_and_annotations(function: ast.AST) -> Iterator[ast.AST]:
    for node in ast.walk(function):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant): yield node.value
        annotation = getattr(node, "annotation", None) or getattr(node, "returns", None)
        if annotation is not None: yield from ast.walk(annotation)


def nth_mutant(target: Target, number: int) -> Mutant:
    tree = ast.parse((ROOT / PACKAGE / target.module).read_text(encoding="utf-8"))
    function = function_in(tree, target.function)
    assert function is not None
    skipped = {id(n) for n in docstrings_and_annotations(function)}
    found = [(n, fault, new) for n in ast.walk(function) if id(n) not in skipped for fault, new in variants(n)]
    node, fault, new = found[number]
    turn = [words for _, words, _ in found[: number + 1]].count(fault)
    line = getattr(node, "lineno", 0)
    changed = ast.fix_missing_locations(Exchange(node, new).visit(tree))
    return Mutant(target, line, fault, turn, ast.unparse(changed))


def is_noticed(mutant: Mutant, checkout: Path, limit: int) -> bool:
    """Do the tests fail (or never end) with this fault?"""
    module = checkout / PACKAGE / mutant.target.module
    original = module.read_text(encoding="utf-8")
    module.write_text(mutant.source, encoding="utf-8")
    try: status = status_of(mutant.target.tests, checkout, limit)
    finally: module.write_text(original, encoding="utf-8")
    if status not in (0, 1, 2): raise SystemExit(f"pytest ended with {status} for {mutant}: are its tests still called so?")
    return status != 0


def status_of(tests: str, checkout: Path, limit: int) -> int:
    """What pytest ends with in a copy of the checkout; 1 where it never ends. The libraries are imported once, before the fork."""
    process = FORKS.Process(target=run_tests, args=(tests, str(checkout)))
    process.start()
    process.join(limit)
    if process.exitcode is not None: return abs(process.exitcode)
    process.kill()
    process.join()
    return 1


def run_tests(tests: str, checkout: str) -> None:
    """In a process of its own: the tests of a copy, silently."""
    silence = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2): os.dup2(silence, stream)
    os.environ.update(PYTHONPATH=checkout, HYPOTHESIS_DATABASE_FILE="none")
    sys.dont_write_bytecode = True
    os.chdir(checkout)
    ours = str(ROOT / "tests")
    sys.path[:] = [checkout, *(p for p in sys.path if p not in (ours, str(ROOT)))]
    for name, module in list(sys.modules.items()):  # those of the checkout that starts us
        if (getattr(module, "__file__", None) or "").startswith(ours) or name.split(".")[0] == PACKAGE: del sys.modules[name]
    import pytest
    status = pytest.main(["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", *shlex.split(tests)])
    os._exit(int(status))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, help="so many faults, drawn by chance (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="targets whose words hold this")
    parser.add_argument("--list", action="store_true", help="print the faults and run nothing")
    parser.add_argument("--limit", type=int, default=300, help="seconds that the tests of one fault may take")
    args = parser.parse_args()
    chosen = [t for t in TARGETS if args.only in f"{t.what} {t.module} {t.function}"]
    every = [place for target in chosen for place in places(target)]
    if args.sample and args.sample < len(every): every = random.Random(args.seed).sample(every, args.sample)
    faults = [nth_mutant(target, number) for target, number in every]
    if args.list:
        print(*faults, sep="\n")
        return 0
    return report(faults, args.limit)


def report(faults: list[Mutant], limit: int) -> int:
    start, survivors = time.monotonic(), []
    workers = max(1, min(os.cpu_count() or 1, 4))
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        free: Queue[Path] = Queue()
        for i in range(workers): free.put(copy_checkout(Path(folder) / str(i)))

        healthy = free.get()
        for tests in dict.fromkeys(m.target.tests for m in faults):  # the control: what fails without a fault notices nothing
            status = status_of(tests, healthy, limit)
            if status: raise SystemExit(f"without any fault, pytest {tests} ends with {status}")
        free.put(healthy)

        def run(mutant: Mutant) -> bool:
            checkout = free.get()
            try: return is_noticed(mutant, checkout, limit)
            finally: free.put(checkout)

        with ThreadPoolExecutor(workers) as pool:
            for mutant, noticed in zip(faults, pool.map(run, faults)):
                if not noticed: survivors.append(mutant)
                print(f"{'noticed ' if noticed else 'SURVIVED'} {mutant}", flush=True)
    accepted = [m for m in survivors if m.key in ACCEPTED]
    for m in accepted: print(f"accepted {m}: {ACCEPTED[m.key]}")
    print(f"{len(faults)} faults, {len(faults) - len(survivors)} noticed, {len(survivors)} survived "
          f"({len(accepted)} accepted), {time.monotonic() - start:.0f} s")
    return len(survivors) > len(accepted)


if __name__ == "__main__":
    shutil.which("git") or sys.exit("git is needed")
    sys.exit(main())
