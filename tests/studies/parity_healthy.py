"""Healthy files from many hands: none may raise an alarm.

python tests/studies/parity_healthy.py --seed 0 --files 100 --minutes 30

Ways: both exporters of torch (the newer with and without its own optimisation), ONNX Runtime's optimisation at three
levels written to a file, its transformers optimizer, fp16 with and without float inputs, the version converter of onnx,
other names, names and inputs as optimum writes them, masks padded on either side, and onnxslim and onnxsim where they
are installed.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import io
import json
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import parity_models as models

from fsdl_devinfra.core.errors import CheckError
from fsdl_devinfra.parity.checking import check
from fsdl_devinfra.parity.inputs import with_sizes

warnings.filterwarnings("ignore")
FUSED = {"bert": "bert", "roberta": "bert", "distilbert": "bert", "gpt2": "gpt2", "electra": "bert", "albert": "bert", "vit": "vit"}


class NotThisModel(Exception): "A way that does not apply, or a tool that refuses the model: no file, so no alarm either."


def half(source: Path, file: Path, keep: bool) -> Path:
    from onnxruntime.transformers.float16 import convert_float_to_float16
    onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=keep), file)
    return file


def fused(made: models.Made, source: Path, file: Path) -> Path:
    if made.name not in FUSED: raise NotThisModel
    from onnxruntime.transformers import optimizer
    config = made.module.config
    with contextlib.redirect_stdout(io.StringIO()):
        heads, width = getattr(config, "num_attention_heads", 4), getattr(config, "hidden_size", 32)
        model = optimizer.optimize_model(str(source), model_type=FUSED[made.name], num_heads=heads, hidden_size=width, opt_level=0)
    model.save_model_to_file(str(file))
    return file


def slimmed(source: Path, file: Path) -> Path:
    try: import onnxslim
    except ImportError as e: raise NotThisModel from e
    onnx.save(onnxslim.slim(onnx.load(source)), file)
    return file


def simplified(source: Path, file: Path) -> Path:
    try: import onnxsim
    except ImportError as e: raise NotThisModel from e
    onnx.save(onnxsim.simplify(onnx.load(source))[0], file)
    return file


def other_names(made: models.Made, file: Path) -> Path:
    "Inputs by other names, where type and shape tell which is which."
    if len(made.inputs) != 1: raise NotThisModel
    return models.torchscript(made.module, made.inputs, file, ["input.1"])


def output_names(made: models.Made, source: Path, file: Path) -> Path:
    "Outputs under other names."
    proto = onnx.load(source)
    names = {o.name: f"output_{i}" for i, o in enumerate(proto.graph.output)}
    for node in proto.graph.node:
        for i, v in enumerate(node.output): node.output[i] = names.get(v, v)
        for i, v in enumerate(node.input): node.input[i] = names.get(v, v)
    for o in proto.graph.output: o.name = names[o.name]
    onnx.save(proto, file)
    return file


def unoptimised(made: models.Made, file: Path) -> Path:
    "The newer exporter without its own optimisation."
    program = torch.onnx.export(made.captured.program, dynamo=True, optimize=False, verbose=False)
    assert program is not None
    with contextlib.redirect_stdout(io.StringIO()): program.save(str(file))
    proto = onnx.load(file)
    for info, name in zip(proto.graph.input, made.inputs): assert info.name == name
    return file


class FirstOutput(torch.nn.Module):
    "Only the first output, with all inputs by position."
    def __init__(self, module: torch.nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = module, names

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        out = self.model(**dict(zip(self.names, tensors)))
        return next(v for v in out.values() if isinstance(v, torch.Tensor))


def as_optimum(made: models.Made, file: Path) -> Path:
    "Inputs, dimensions and the one output as optimum names them; token types or positions are inputs where the model takes them."
    if made.name not in models.TEXT or "input_ids" not in made.inputs or made.name == "t5": raise NotThisModel
    ids, takes = made.inputs["input_ids"], inspect.signature(made.module.forward).parameters
    inputs = dict(made.inputs)
    if "token_type_ids" in takes: inputs["token_type_ids"] = torch.zeros_like(ids)
    elif "position_ids" in takes: inputs["position_ids"] = torch.arange(ids.shape[1]).expand_as(ids).contiguous()
    out = next(iter(models.call(made.module, made.inputs)))
    axes = {name: {0: "batch_size", 1: "sequence_length"} for name in [*inputs, out]}
    if made.name == "roberta": axes[out] = {0: "batch_size"}
    config = made.module.config
    cached, config.use_cache = getattr(config, "use_cache", None), False
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
            torch.onnx.export(FirstOutput(made.module, list(inputs)).eval(), tuple(inputs.values()), str(file), input_names=list(inputs), output_names=[out],
                              dynamic_axes=axes, opset_version=18, dynamo=False)
    finally: config.use_cache = cached
    return file


def padded(made: models.Made, side: str) -> models.Made:
    "The same model, with an example that is padded on one side."
    if "attention_mask" not in made.inputs: raise NotThisModel
    mask = torch.ones_like(made.inputs["attention_mask"])
    if side == "left": mask[1:, :3] = 0
    else: mask[1:, -3:] = 0
    return dataclasses.replace(made, inputs={**made.inputs, "attention_mask": mask})


WAYS: dict[str, Callable[[models.Made, Path], Path]] = {
    "dynamo": lambda m, d: m.files["dynamo"],
    "torchscript": lambda m, d: m.files["torchscript"],
    "torchscript opset 14": lambda m, d: models.torchscript(m.module, m.inputs, d / "ts14.onnx", opset=14),
    "dynamo, not optimised": lambda m, d: unoptimised(m, d / "plain.onnx"),
    "optimised": lambda m, d: models.optimised(m.files["dynamo"], d / "opt.onnx"),
    "optimised, basic": lambda m, d: models.optimised(m.files["dynamo"], d / "basic.onnx", "basic"),
    "optimised, all": lambda m, d: models.optimised(m.files["dynamo"], d / "all.onnx", "all"),
    "fp16, optimised": lambda m, d: models.optimised(half(m.files["torchscript"], d / "half.onnx", True), d / "half_opt.onnx"),
    "optimised torchscript": lambda m, d: models.optimised(m.files["torchscript"], d / "optts.onnx"),
    "fused": lambda m, d: fused(m, m.files["torchscript"], d / "fused.onnx"),
    "fused fp16": lambda m, d: half(fused(m, m.files["torchscript"], d / "fused.onnx"), d / "fused16.onnx", True),
    "fp16": lambda m, d: half(m.files["torchscript"], d / "half.onnx", False),
    "fp16 of dynamo": lambda m, d: half(m.files["dynamo"], d / "half2.onnx", False),
    "fp16, float inputs": lambda m, d: half(m.files["torchscript"], d / "keep.onnx", True),
    "converted to 21": lambda m, d: models.converted(m.files["torchscript"], d / "c21.onnx", 21),
    "without notes": lambda m, d: models.without_notes(models.converted(m.files["dynamo"], d / "c22.onnx", 22)),
    "other names": lambda m, d: other_names(m, d / "names.onnx"),
    "other output names": lambda m, d: output_names(m, m.files["dynamo"], d / "outputs.onnx"),
    "as optimum": lambda m, d: as_optimum(m, d / "optimum.onnx"),
    "as optimum, optimised": lambda m, d: models.optimised(as_optimum(m, d / "optimum.onnx"), d / "optimum_opt.onnx"),
    "padded left": lambda m, d: m.files["dynamo"],
    "padded right": lambda m, d: m.files["torchscript"],
    "onnxslim": lambda m, d: slimmed(m.files["torchscript"], d / "slim.onnx"),
    "onnxsim": lambda m, d: simplified(m.files["dynamo"], d / "sim.onnx"),
}


def one(made: models.Made, way: str, folder: Path) -> dict[str, Any] | None:
    "None where there is no such file."
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if way.startswith("padded"): made = padded(made, way.split()[1])
        file = WAYS[way](made, folder)
    except NotThisModel: return None
    except Exception as e: return {"model": made.name, "way": way, "verdict": "not made", "why": f"{type(e).__name__}: {str(e)[:160]}"}
    started = time.time()
    try: report = check(made.module, file, made.inputs, explain=False)
    except CheckError as e: return {"model": made.name, "way": way, "verdict": "alarm", "why": str(e)[:300]}
    except Exception as e: return {"model": made.name, "way": way, "verdict": "crash", "why": f"{type(e).__name__}: {str(e)[:300]}"}
    if report.verdict == "fail" and not runs_at_all(made, file): return {"model": made.name, "way": way, "verdict": "not made", "why": "ONNX Runtime refuses the file"}
    if report.verdict == "fail" and (sizes := broken_at(made, file)): return {"model": made.name, "way": way, "verdict": "broken by the tool", "why": f"ONNX Runtime runs the exporter's file at {sizes} and not this one"}
    why = next((f"{c.shapes} {o.name}: {o.why}" for c in report.cases for o in c.outputs if o.verdict == "fail"), "") or \
        next((str(c.notes[:2]) for c in report.cases if c.verdict != "pass"), "")
    return {"model": made.name, "way": way, "verdict": "pass" if report.verdict == "pass" else "alarm", "why": why, "seconds": round(time.time() - started, 1)}


def runs_at_all(made: models.Made, file: Path) -> bool:
    "Whether ONNX Runtime loads the file: some tools write files that it refuses."
    try: session(file)
    except Exception: return False
    return True


def session(file: Path) -> Any:
    "A session of ONNX Runtime that says nothing."
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def broken_at(made: models.Made, file: Path) -> dict[str, int]:
    "Free sizes at which ONNX Runtime runs the exporter's file and refuses the tool's: no code of ours has a say. Empty where there are none."
    both = session(made.files["dynamo"]), session(file)
    dims = {i.name: {a: d for a, d in enumerate(i.shape) if isinstance(d, str)} for i in both[0].get_inputs()}
    if set(dims) != {i.name for i in both[1].get_inputs()}: return {}
    names = sorted({d for axes in dims.values() for d in axes.values()})
    for size in (1, 3, 8):
        sizes = dict.fromkeys(names, size)
        feeds = {k: v.numpy() for k, v in with_sizes(made.inputs, dims, sizes).items() if k in dims}
        if runs_on(both[0], feeds) and not runs_on(both[1], feeds): return sizes
    return {}


def runs_on(made: Any, feeds: dict[str, Any]) -> bool:
    try: made.run(None, feeds)
    except Exception: return False
    return True


def study(seed: int, count: int, names: tuple[str, ...], say: Callable[[dict[str, Any]], None], minutes: float = float("inf")) -> list[dict[str, Any]]:
    "Pairs of model and way drawn at random, model by model in random order, until the count or the time is reached."
    rng, rows, end = random.Random(seed), [], time.monotonic() + 60 * minutes
    pairs = [(n, w) for n in names for w in WAYS]
    chosen = sorted(rng.sample(range(len(pairs)), min(count, len(pairs))))
    order = rng.sample(names, len(names))
    made: models.Made | None = None
    with tempfile.TemporaryDirectory() as folder:
        for name, way in sorted((pairs[i] for i in chosen), key=lambda pair: order.index(pair[0])):
            if time.monotonic() > end: break
            if made is None or made.name != name: made = models.build(name, Path(folder), ("dynamo", "torchscript"), seed)
            row = one(made, way, Path(folder) / name / way.replace(" ", "_"))
            if row is not None: rows.append(row); say(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--files", type=int, default=130, help="pairs of model and way that are drawn; some do not exist")
    parser.add_argument("--models", default=",".join(models.NAMES))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no new file is begun after this time")
    parser.add_argument("--json", type=Path, help="write every row here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    def say(row: dict[str, Any]) -> None:
        counts[row["verdict"]] += 1
        print(f"{sum(counts.values())} {row['model']} {row['way']}: {row['verdict']} in {row.get('seconds', 0)} s; so far {dict(counts)}", flush=True)
        if row["verdict"] != "pass": print(json.dumps(row), flush=True)
    rows = study(args.seed, args.files, tuple(args.models.split(",")), say, args.minutes)
    print(f"seed {args.seed}: {len(rows)} files: {dict(counts)}; ways: {dict(Counter(r['way'] for r in rows if r['verdict'] == 'pass'))}")
    if args.json: args.json.write_text(json.dumps(rows, indent=1))
    if counts["alarm"] or counts["crash"]: sys.exit(1)


if __name__ == "__main__": main()
