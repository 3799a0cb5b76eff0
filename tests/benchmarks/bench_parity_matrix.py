"""The matrix provider × precision × TF32 over the zoo, as JSON. One call on a machine with a GPU, from the top of the repository:

    python tests/benchmarks/bench_parity_matrix.py --provider cuda --provider tensorrt --seconds 540 -o parity-matrix.json

It needs torch for CUDA, onnx, onnxscript, onnxruntime-gpu, hypothesis and this package on the path; models whose library is missing are listed as skipped.
What is done is written after every model, so a run that is cut off leaves its part. The file is small and names the GPU, its driver and all versions.
It has been run on CPUs only so far. TF32 sticks in a process once CUDA is up, so each setting is a process of its own."""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))


def measure(name: str, providers: list[str], precisions: list[str], tf32: bool) -> list[dict[str, Any]]:
    "All cases of one model in one TF32 setting, in this process."
    import torch
    from test_parity_zoo import ZOO

    from fsdl_devinfra.parity import check, example_inputs, export
    torch.manual_seed(1)
    module, inputs = ZOO[name]()
    inputs = example_inputs(module) if inputs is None else inputs
    on_gpu = any(p != "cpu" for p in providers) and torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        path = export(module, inputs, Path(folder) / "model.onnx").path
        if on_gpu: module, inputs = module.cuda(), {k: v.cuda() for k, v in inputs.items()}
        report = check(module, path, inputs, providers, precisions, explain=False, tf32=tf32)
    return [{"model": name, "tf32": tf32, "torch_on": "cuda" if on_gpu else "cpu", "provider": c.provider, "provider_used": c.provider_used, "share": c.share, "precision": c.precision, "verdict": c.verdict,
             "error": max((o.error for o in c.outputs), default=None), "torch_error": max((o.reference_error for o in c.outputs), default=None),
             "ratio": max((o.ratio for o in c.outputs), default=None), "notes": c.notes} for c in report.cases]


def machine() -> dict[str, Any]:
    "What the figures were measured on: GPU, driver, versions; no name or path of the machine."
    import platform

    import torch

    from fsdl_devinfra.parity.backends import versions
    found: dict[str, Any] = {"python": platform.python_version(), "versions": versions(), "gpu": None, "cuda": torch.version.cuda, "driver": None}
    if torch.cuda.is_available(): found |= {"gpu": torch.cuda.get_device_name(0), "compute_capability": list(torch.cuda.get_device_capability(0)), "cudnn": torch.backends.cudnn.version()}
    try:
        import pynvml
        pynvml.nvmlInit()
        found["driver"] = pynvml.nvmlSystemGetDriverVersion()
    except Exception: pass
    return found


def part(names: list[str], args: argparse.Namespace, tf32: bool) -> None:
    "One TF32 setting: written after every model."
    rows: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    end = time.monotonic() + args.seconds
    for name in names:
        try:
            if time.monotonic() > end: skipped[name] = "no time left"
            else: rows += measure(name, args.provider, args.precision, tf32)
        except Exception as e: skipped[name] = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
        Path(args.output).write_text(json.dumps({"machine": machine(), "cases": rows, "skipped": skipped}, default=str))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--provider", action="append")
    parser.add_argument("--precision", action="append")
    parser.add_argument("--model", action="append")
    parser.add_argument("--tf32", choices=["on", "off"], help="this setting alone, in this process")
    parser.add_argument("--seconds", type=float, default=3000, help="for all; models that are not begun by then are skipped")
    parser.add_argument("-o", "--output", default="parity-matrix.json")
    args = parser.parse_args()
    from test_parity_zoo import ZOO
    args.provider, args.precision = args.provider or ["cpu"], args.precision or ["fp32", "fp16", "bf16"]
    names = args.model or list(ZOO)
    if args.tf32:
        part(names, args, args.tf32 == "on")
        return 0
    settings = ("off", "on") if set(args.provider) - {"cpu", "reference"} else ("off",)
    found: dict[str, Any] = {"machine": machine(), "cases": [], "skipped": {}}
    for setting in settings:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "part.json"
            flags = [f"--{k}={v}" for k, values in (("model", names), ("provider", args.provider), ("precision", args.precision if setting == "off" else ["fp32"])) for v in values]
            limit = args.seconds / len(settings)
            try: subprocess.run([sys.executable, __file__, *flags, f"--tf32={setting}", f"--seconds={limit}", "-o", str(file)], check=False, timeout=limit + 60, env=os.environ | {"NVIDIA_TF32_OVERRIDE": "1" if setting == "on" else "0"})
            except subprocess.TimeoutExpired: pass
            part_of = json.loads(file.read_text()) if file.is_file() else {"cases": [], "skipped": {f"tf32 {setting}": "the process ended before its first model"}}
            found["cases"] += part_of["cases"]; found["skipped"] |= {f"{k} (tf32 {setting})": v for k, v in part_of["skipped"].items()}
        Path(args.output).write_text(json.dumps(found, indent=1))
    for row in found["cases"]: print(row["model"], row["provider"], row["provider_used"], row["precision"], "tf32" if row["tf32"] else "", row["verdict"], row["ratio"])
    for name, why in found["skipped"].items(): print("skipped", name, why)
    return 0


if __name__ == "__main__": sys.exit(main())
