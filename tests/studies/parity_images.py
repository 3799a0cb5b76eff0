"""Image models of timm and torchvision: each exported and checked, with random weights. Needs timm and torchvision.

python tests/studies/parity_images.py --seed 0 --minutes 60 --json rows.json

Kinds take turns, so that a run that ends early has some of each; the same command goes on where it was stopped.
"""
from __future__ import annotations

import argparse
import inspect
import itertools
import json
import signal
import sys
import tempfile
import time
import warnings
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from parity_models import stir

warnings.filterwarnings("ignore")

#: kind → models of timm
TIMM = {
    "CNN": "resnet18 resnet26d resnext26ts regnetx_002 regnety_002 mobilenetv2_050 mobilenetv3_small_050 mobilenetv4_conv_small_050 efficientnet_b0 tf_efficientnetv2_b0 "
           "mnasnet_small ghostnet_100 densenet121 convnext_atto convnextv2_atto repvgg_a0 hardcorenas_a lcnet_050 tinynet_e dla46_c hrnet_w18_small inception_next_atto "
           "starnet_s1 repghostnet_050 mambaout_femto",
    "transformer": "vit_tiny_patch16_224 deit_tiny_patch16_224 eva02_tiny_patch14_224 swin_tiny_patch4_window7_224 pvt_v2_b0 cait_xxs24_224 xcit_nano_12_p16_224 crossvit_tiny_240 "
                   "hiera_tiny_224",
    "hybrid": "mobilevit_xxs mobilevitv2_050 edgenext_xx_small levit_128s efficientformer_l1 efficientformerv2_s0 fastvit_t8 coatnet_pico_rw_224 maxvit_rmlp_pico_rw_256 "
              "tiny_vit_5m_224 visformer_tiny vit_tiny_r_s16_p8_224 repvit_m0_9",
    "MLP": "mixer_s32_224 resmlp_12_224 poolformer_s12 poolformerv2_s12"}
#: kind → models of torchvision
TORCHVISION = {"CNN": "mobilenet_v2 shufflenet_v2_x0_5 squeezenet1_1 googlenet", "segmentation": "lraspp_mobilenet_v3_large deeplabv3_mobilenet_v3_large",
               "detection": "ssdlite320_mobilenet_v3_large fasterrcnn_mobilenet_v3_large_320_fpn"}
#: hybrids whose tables depend on the size
SIZED = ("levit", "efficientformer", "coatnet", "maxvit", "tiny_vit", "visformer", "vit_tiny_r")
GROUPS = [[(f"{library}:{name}", kind) for name in names.split()] for library, kinds in (("timm", TIMM), ("torchvision", TORCHVISION)) for kind, names in kinds.items()]
ALL = [pair for turn in itertools.zip_longest(*GROUPS) for pair in turn if pair is not None]


#: models that can be made for smaller images than their own → that size
SMALLER = {"vit_tiny_patch16_224": 112, "deit_tiny_patch16_224": 112, "eva02_tiny_patch14_224": 112, "cait_xxs24_224": 112, "mixer_s32_224": 128, "resmlp_12_224": 112}
#: how `fsdl_devinfra.parity.export` traces a model
EXPORTER = "torch.onnx, dynamo"


def versions() -> dict[str, str]:
    "Of everything that decides a row."
    return {name: version(name) for name in ("torch", "torchvision", "timm", "onnx", "onnxscript", "onnxruntime")}


class Detector(torch.nn.Module):
    "A model of torchvision that takes a list of images and gives a list of dictionaries, for one image."
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]: return self.model([image])[0]


def model_of(name: str, kind: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    "A model with random weights, and two images: of its size where that is fixed, of a smaller one where it can be chosen, else of 64 by 64."
    library, short = name.split(":")
    if library == "timm":
        import timm
        module = timm.create_model(short, pretrained=False, **({"img_size": SMALLER[short]} if short in SMALLER else {}))
        channels, *size = module.default_cfg["input_size"]
        if short in SMALLER: size = [SMALLER[short]] * 2
        fixed = module.default_cfg.get("fixed_input_size") or kind in ("transformer", "MLP") or short.startswith(SIZED)
        return module.eval(), {"x": torch.randn(2, channels, *(size if fixed else (64, 64)))}
    import torchvision
    extra = {"weights_backbone": None} if kind in ("segmentation", "detection") else {"init_weights": True} if short == "googlenet" else {}
    module = torchvision.models.get_model(short, weights=None, **extra).eval()
    if kind == "detection": return Detector(module).eval(), {"image": torch.rand(3, 320, 320)}
    first = next(iter(inspect.signature(module.forward).parameters))  # "x", or "input"
    return module, {first: torch.randn(2, 3, 64, 64)}


class TooLong(BaseException): "Not an exception that an exporter may catch."


def _stop(*_: Any) -> None: raise TooLong


def dynamic_of(kind: str, inputs: dict[str, Any], free: str) -> Any:
    "What may change in the file: all that can, or the batch alone. With free sizes of images torch's exporter takes up to ten times longer."
    if free == "all": return True
    return {name: {0: "batch"} for name in inputs} if kind != "detection" else False


def one(name: str, kind: str, folder: Path, seed: int, free: str, limit: int = 300) -> dict[str, Any]:
    "Export and check one model, within a time of the processor: the clock on the wall says more about the other programs."
    from fsdl_devinfra.parity import check
    from fsdl_devinfra.parity.exporting import export_capture
    row: dict[str, Any] = {"model": name, "kind": kind}
    torch.manual_seed(seed)
    started, began, file = time.time(), time.process_time(), folder / "model.onnx"
    signal.signal(signal.SIGPROF, _stop); signal.setitimer(signal.ITIMER_PROF, limit)
    try:
        module, inputs = model_of(name, kind)
        stir(module)
        row["parameters"] = sum(p.numel() for p in module.parameters())
        captured = export_capture(module, inputs, file, dynamic=dynamic_of(kind, inputs, free))[1]
        report = check(module, file, inputs, captured=captured)
        outputs = [o for c in report.cases for o in c.outputs]
        worst = max(outputs, key=lambda o: o.ratio)
        row |= {"verdict": report.verdict, "cases": len(report.cases), "outputs": len(outputs), "ratio": round(worst.ratio, 2),
                "error": worst.error, "torch_error": worst.reference_error, "notes": [n for c in report.cases for n in c.notes][:3] + [c.evidence[:200] for c in report.causes],
                "why": next((f"{o.name}: {o.why}" for o in outputs if o.verdict == "fail"), "")}
    except TooLong: row["verdict"] = f"not finished in {limit} s of the processor"
    except Exception as e: row |= {"verdict": "error", "notes": [f"{type(e).__name__}: {str(e)[:300]}"]}
    finally: signal.setitimer(signal.ITIMER_PROF, 0)
    return row | {"seconds": round(time.time() - started), "processor_seconds": round(time.process_time() - began)}


def document(rows: list[dict[str, Any]], seed: int, free: str) -> dict[str, Any]:
    "The rows, with what is needed to make them again."
    return {"date": f"{date.today()}", "seed": seed, "free": free, "exporter": EXPORTER, "versions": versions(), "rows": rows}


def begun(file: Path | None, seed: int, free: str) -> list[dict[str, Any]]:
    "The rows of a run that was stopped, if it was this one."
    if file is None or not file.exists(): return []
    there = json.loads(file.read_text())
    return there["rows"] if (there["seed"], there["free"], there["versions"]) == (seed, free, versions()) else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", default="", help="names with timm: or torchvision: before them")
    parser.add_argument("--free", default="batch", choices=["batch", "all"], help="dimensions of the file that may change")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no new model is begun after this time")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    try:
        import timm  # noqa: F401
        import torchvision  # noqa: F401
    except ImportError as e:
        print(f"not run: {e.name} is missing")
        return
    torch.set_num_threads(1)
    wanted = args.models.split(",") if args.models else [n for n, _ in ALL]
    rows, end = begun(args.json, args.seed, args.free), time.monotonic() + 60 * args.minutes
    for name, kind in ALL:
        if name not in wanted or any(r["model"] == name for r in rows): continue
        if time.monotonic() > end: break
        with tempfile.TemporaryDirectory() as folder: rows.append(one(name, kind, Path(folder), args.seed, args.free))
        print(json.dumps(rows[-1]), flush=True)
        if args.json: args.json.write_text(json.dumps(document(rows, args.seed, args.free), indent=1))
    passed = sum(r["verdict"] == "pass" for r in rows)
    print(f"seed {args.seed}: {passed} of {len(rows)} pass")
    if any(r["verdict"] not in ("pass",) for r in rows): sys.exit(1)


if __name__ == "__main__": main()
