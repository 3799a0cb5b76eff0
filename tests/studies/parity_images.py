"""Image models of timm and torchvision: each exported and checked, with random weights. Needs timm and torchvision.

python tests/studies/parity_images.py --seed 0 --minutes 60 --json rows.json

Kinds take turns, so that a run that ends early has some of each.
"""
from __future__ import annotations

import argparse
import itertools
import json
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

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


def model_of(name: str, kind: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    "A model with random weights, and two images: of its size where that is fixed, else of 64 by 64."
    library, short = name.split(":")
    if library == "timm":
        import timm
        module = timm.create_model(short, pretrained=False)
        channels, *size = module.default_cfg["input_size"]
        fixed = module.default_cfg.get("fixed_input_size") or kind in ("transformer", "MLP") or short.startswith(SIZED)
        return module.eval(), {"x": torch.randn(2, channels, *(size if fixed else (64, 64)))}
    import torchvision
    extra = {"weights_backbone": None} if kind in ("segmentation", "detection") else {"init_weights": True} if short == "googlenet" else {}
    module = torchvision.models.get_model(short, weights=None, **extra).eval()
    if kind == "detection": return module, {"images": [torch.rand(3, 320, 320)]}
    first = "x" if kind == "CNN" else "input"
    return module, {first: torch.randn(2, 3, 64, 64)}


class TooLong(Exception): pass


def _stop(*_: Any) -> None: raise TooLong


def one(name: str, kind: str, folder: Path, seed: int, limit: int = 600) -> dict[str, Any]:
    "Export and check one model."
    from fsdl_devinfra.parity import check, export
    row: dict[str, Any] = {"model": name, "kind": kind}
    torch.manual_seed(seed)
    started, file = time.time(), folder / "model.onnx"
    signal.signal(signal.SIGALRM, _stop); signal.alarm(limit)
    try:
        module, inputs = model_of(name, kind)
        row["parameters"] = sum(p.numel() for p in module.parameters())
        export(module, inputs, file)
        row["exported"] = round(time.time() - started)
        report = check(module, file, inputs)
        outputs = [o for c in report.cases for o in c.outputs]
        row |= {"verdict": report.verdict, "cases": len(report.cases), "ratio": round(max((o.ratio for o in outputs), default=float("inf")), 2),
                "error": max((o.error for o in outputs), default=None), "notes": [n for c in report.cases for n in c.notes][:3] + [c.evidence[:200] for c in report.causes],
                "why": next((f"{o.name}: {o.why}" for o in outputs if o.verdict == "fail"), "")}
    except TooLong: row["verdict"] = f"not finished in {limit} s"
    except Exception as e: row |= {"verdict": "error", "notes": [f"{type(e).__name__}: {str(e)[:300]}"]}
    finally: signal.alarm(0)
    row["seconds"] = round(time.time() - started)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", default="", help="names with timm: or torchvision: before them")
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
    rows, end = [], time.monotonic() + 60 * args.minutes
    for name, kind in ALL:
        if name not in wanted: continue
        if time.monotonic() > end: break
        with tempfile.TemporaryDirectory() as folder: rows.append(one(name, kind, Path(folder), args.seed))
        print(json.dumps(rows[-1]), flush=True)
        if args.json: args.json.write_text(json.dumps(rows, indent=1))
    passed = sum(r["verdict"] == "pass" for r in rows)
    print(f"seed {args.seed}: {passed} of {len(rows)} pass")
    if any(r["verdict"] not in ("pass",) for r in rows): sys.exit(1)


if __name__ == "__main__": main()
