"""The matrix provider × precision × TF32 over the zoo, as JSON. Stands ready for a machine with a GPU:

    python tests/benchmarks/bench_parity_matrix.py --provider cuda --provider tensorrt -o parity-matrix.json

It has been run on CPUs only so far. TF32 sticks in a process once CUDA is up, so each setting is a process of its own."""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))


def measure(names: list[str], providers: list[str], precisions: list[str], tf32: bool) -> list[dict[str, Any]]:
    "All cases of one TF32 setting, in this process."
    import torch
    from test_parity_zoo import ZOO

    from fsdl_devinfra.parity import check, example_inputs, export
    found: list[dict[str, Any]] = []
    for name in names:
        torch.manual_seed(1)
        module, inputs = ZOO[name]()
        inputs = example_inputs(module) if inputs is None else inputs
        if any(p != "cpu" for p in providers) and torch.cuda.is_available():
            module, inputs = module.cuda(), {k: v.cuda() for k, v in inputs.items()}
        with tempfile.TemporaryDirectory() as folder:
            path = export(module, inputs, Path(folder) / "model.onnx").path
            report = check(module, path, inputs, providers, precisions, explain=False, tf32=tf32)
        found += [{"model": name, "tf32": tf32, "provider": c.provider, "provider_used": c.provider_used, "share": c.share, "precision": c.precision, "verdict": c.verdict,
                   "ratio": max((o.ratio for o in c.outputs), default=None), "notes": c.notes} for c in report.cases]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--provider", action="append")
    parser.add_argument("--precision", action="append")
    parser.add_argument("--model", action="append")
    parser.add_argument("--tf32", choices=["on", "off"], help="this setting alone, in this process")
    parser.add_argument("-o", "--output", default="parity-matrix.json")
    args = parser.parse_args()
    from test_parity_zoo import ZOO
    names, providers, precisions = args.model or list(ZOO), args.provider or ["cpu"], args.precision or ["fp32", "fp16", "bf16"]
    if args.tf32:
        rows = measure(names, providers, precisions, args.tf32 == "on")
        Path(args.output).write_text(json.dumps(rows, default=str))
        return 0
    from fsdl_devinfra.parity.export import versions
    rows = []
    for setting in ("off", "on") if "cpu" not in providers or len(providers) > 1 else ("off",):
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / "part.json"
            flags = [f"--{k}={v}" for k, values in (("model", names), ("provider", providers), ("precision", precisions)) for v in values]
            subprocess.run([sys.executable, __file__, *flags, f"--tf32={setting}", "-o", str(part)], check=True, env=os.environ | {"NVIDIA_TF32_OVERRIDE": "1" if setting == "on" else "0"})
            rows += json.loads(part.read_text())
    Path(args.output).write_text(json.dumps({"versions": versions(), "cases": rows}, indent=1))
    for row in rows: print(row["model"], row["provider"], row["provider_used"], row["precision"], "tf32" if row["tf32"] else "", row["verdict"], row["ratio"])
    return 0


if __name__ == "__main__": sys.exit(main())
