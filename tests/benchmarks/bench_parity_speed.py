"Parity against its peer, in turns, on this machine. Run: python tests/benchmarks/bench_parity_speed.py [localize|check|memory]… (about two minutes each)"
from __future__ import annotations

import contextlib
import io
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def _bert(layers: int, hidden: int) -> tuple[Any, dict[str, Any]]:
    import torch
    from transformers import BertConfig, BertModel
    torch.manual_seed(0)
    model = BertModel(BertConfig(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=max(2, hidden // 64), intermediate_size=4 * hidden, vocab_size=1000)).eval()
    return model, {"input_ids": torch.randint(5, 999, (2, 16)), "attention_mask": torch.ones(2, 16, dtype=torch.int64)}


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    value = run()
    return time.perf_counter() - start, value


@contextlib.contextmanager
def _hush() -> Iterator[None]:
    import logging
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore"); logging.disable(logging.ERROR)
        try: yield
        finally: logging.disable(logging.NOTSET)


def _program(model: Any, inputs: dict[str, Any]) -> Any:
    import torch
    with _hush(): return torch.onnx.export(model, (), kwargs=inputs, dynamo=True, verbose=False)


def localize_rows() -> Iterator[Row]:
    "Seconds a value: errors of all intermediate values, ours and verify_onnx_program(compare_intermediates=True) on the same exported program."
    from torch.onnx.verification import verify_onnx_program

    from fsdl_devinfra.parity.exporting import Capture
    from fsdl_devinfra.parity.localization import localize
    for layers, hidden, with_peer in (2, 64, True), (12, 768, False):
        model, inputs = _bert(layers, hidden)
        program = _program(model, inputs)
        captured = Capture(program.model, program.exported_program, "torch", {}, inputs)
        ours = []
        for _ in range(5):
            seconds, found = _timed(lambda: localize(program.model, captured, inputs))
            ours.append(seconds / len(found.values))
        row: Row = {"name": f"localize, BERT {layers} × {hidden}: seconds a value", "ours_s": statistics.median(ours), "peer_s": None, "ratio": None,
                    "spread": (min(ours), max(ours)), "note": f"{len(found.values)} operators, {statistics.median(ours) * len(found.values):.2f} s in all"}
        if with_peer:  # once: it takes minutes
            with _hush(): seconds, infos = _timed(lambda: verify_onnx_program(program, kwargs=inputs, compare_intermediates=True))
            worst = max(i.max_abs_diff for i in infos)
            assert worst < 1e-4 and max(v.cumulative for v in found.values) < 1e-3  # both did the work, and both find the file right
            row |= {"peer_s": seconds / len(infos), "ratio": seconds / len(infos) / row["ours_s"], "note": row["note"] + f"; peer: {len(infos)} values in {seconds:.1f} s"}
        yield row


def _plain(model: Any, path: str, inputs: dict[str, Any]) -> Any:
    "By hand: one torch forward, one session load and one run."
    import onnxruntime
    import torch
    arrays = {k: v.numpy() for k, v in inputs.items()}
    with torch.no_grad(): mine = model(**inputs).last_hidden_state.numpy()
    options = onnxruntime.SessionOptions(); options.log_severity_level = 4
    got = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, arrays)[0]
    return abs(got - mine).max()


def _check_row(layers: int, hidden: int, shape: tuple[int, int], times: int = 9) -> Row:
    "The output check of one case in turns with a plain run; says how often what rounding does was drawn."
    import importlib

    from fsdl_devinfra.parity import check, export
    module = importlib.import_module("fsdl_devinfra.parity.checking")
    model, inputs = _bert(layers, hidden)
    inputs = {k: v[:shape[0], :shape[1]].contiguous() for k, v in inputs.items()}
    real, draws, drawn = module.reference, module.rounding_draws, []
    def counted(*args: Any) -> Iterator[Any]:
        for draw in draws(*args): drawn.append(1); yield draw
    with tempfile.TemporaryDirectory() as folder:
        with _hush(): path = export(model, inputs, Path(folder) / "model.onnx").path
        truth = real(model, inputs)
        reference_s = statistics.median(_timed(lambda: real(model, inputs))[0] for _ in range(3))
        size = sum(f.stat().st_size for f in Path(folder).iterdir())
        ours, peer = [], []
        for i in range(times + 1):
            seconds, difference = _timed(lambda: _plain(model, path, inputs)); peer.append(seconds)
            drawn.clear()
            module.reference, module.rounding_draws = (lambda *_: truth), counted
            try: seconds, report = _timed(lambda: check(model, path, inputs, widen=False))  # the inputs that the plain run has, no others
            finally: module.reference, module.rounding_draws = real, draws
            ours.append(seconds)
            assert report.verdict == "pass" and difference < 1e-3, (report.verdict, difference)
            if i == 0: ours.clear(); peer.clear()  # warm-up
    ratios = [a / b for a, b in zip(ours, peer)]
    return {"name": f"output check of one case, BERT {layers} × {hidden}, inputs {shape[0]} × {shape[1]}", "ours_s": statistics.median(ours), "peer_s": statistics.median(peer),
            "ratio": statistics.median(ours) / statistics.median(peer), "spread": (min(ratios), max(ratios)),
            "note": f"a check is so many plain runs, {min(ours) / min(peer):.2f} by the fastest of each; files of {size / 2**20:.0f} MiB; {len(drawn)} draws of what rounding does; the float64 reference, counted apart, takes {reference_s:.2f} s"}


def check_rows() -> Iterator[Row]:
    "The output check without the float64 reference, against one torch forward, one session load and one run by hand. With one row of four tokens a channel holds few values, and what rounding does has to be drawn."
    for layers, hidden, shape in ((2, 128, (2, 16)), (6, 384, (2, 16)), (6, 384, (1, 4)), (12, 768, (2, 16)), (12, 768, (1, 4))): yield _check_row(layers, hidden, shape)


_MEMORY = """
import sys, torch, tempfile, resource, threading, time, warnings, contextlib, io, os
from pathlib import Path
from torch import nn
warnings.filterwarnings('ignore')
import fsdl_devinfra.parity.checking, onnx, onnxruntime, onnxscript
from fsdl_devinfra.parity import check, export
peak = [0]
def rss(): return int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE')
def watch():
    while True: peak[0] = max(peak[0], rss()); time.sleep(0.005)
threading.Thread(target=watch, daemon=True).start()
tiny = nn.Linear(4, 4)
room = tempfile.TemporaryDirectory()
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    export(tiny, {'input': torch.randn(2, 4)}, Path(room.name) / 'tiny.onnx'); check(tiny, Path(room.name) / 'tiny.onnx', {'input': torch.randn(2, 4)})
base = rss()
model = nn.Sequential(*[nn.Linear(4096, 4096, bias=False) for _ in range(8)]).eval()
x = torch.randn(2, 4096)
weights = sum(p.nbytes for p in model.parameters())
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    if sys.argv[1] == 'ours':
        path = Path(room.name) / 'big.onnx'
        export(model, {'input': x}, path); peak[0] = 0
        report = check(model, path, {'input': x}); assert report.verdict == 'pass'
    else:
        from torch.onnx.verification import verify_onnx_program
        program = torch.onnx.export(model, (x,), dynamo=True, verbose=False); peak[0] = 0
        infos = verify_onnx_program(program, (x,)); assert infos[0].max_abs_diff < 1e-4
time.sleep(0.02)
print((peak[0] - base) / weights, weights / 2**20)
"""


def memory_rows() -> Iterator[Row]:
    "Peak resident memory of a check of 512 MiB of weights above the base, in units of the weights. Not seconds."
    def one(which: str) -> float: return float(subprocess.run([sys.executable, "-c", _MEMORY, which], capture_output=True, text=True, check=True).stdout.split()[0])
    ours, peer = [], []
    for _ in range(3): ours.append(one("ours")); peer.append(one("peer"))
    yield {"name": "peak memory / weights, 512 MiB, check alone (not seconds)", "ours_s": statistics.median(ours), "peer_s": statistics.median(peer),
           "ratio": statistics.median(peer) / statistics.median(ours), "spread": (min(ours), max(ours)), "note": "peer: verify_onnx_program"}


ALL = {"localize": localize_rows, "check": check_rows, "memory": memory_rows}


def rows() -> Iterator[Row]:
    for part in ALL.values(): yield from part()


if __name__ == "__main__":
    for name in sys.argv[1:] or list(ALL):
        for row in ALL[name](): print(row, flush=True)
