"""The table of attention kernels, read off the installed Transformers: python tests/make_attention_kernels.py"""
from __future__ import annotations

import json
import warnings
from pathlib import Path

FILE = Path(__file__).resolve().parents[1] / "fsdl_devinfra" / "models" / "attention_kernels.json"
#: the class that a trainer loads of a model type: the first of these that has one
TASKS = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SPEECH_SEQ_2_SEQ", "MASKED_LM", "IMAGE_CLASSIFICATION")


def model_classes() -> dict[str, type]:
    """Model type → the class of the installed Transformers."""
    import transformers
    from transformers.models.auto import modeling_auto
    named: dict[str, str] = {}
    for task in TASKS:
        for kind, found in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").items():
            named.setdefault(kind, found if isinstance(found, str) else found[0])
    return {kind: getattr(transformers, name) for kind, name in sorted(named.items())}


def kernels_of(model: type) -> tuple[str, ...]:
    """What a class declares, as `attn_implementation` names it, beside eager. Some run only other builds of FlashAttention
    (gpt-oss), which Transformers would take instead, and which few have."""
    others = getattr(model, "_compatible_flash_implementations", None)
    flash = model._supports_flash_attn and (others is None or "flash_attention_2" in others)  # type: ignore[attr-defined]
    declared = {"flash_attention_2": flash, "sdpa": model._supports_sdpa}  # type: ignore[attr-defined]
    return tuple(name for name, holds in declared.items() if holds)


def table() -> dict[str, object]:
    """Version, and what is declared → the model types, sorted."""
    import transformers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        classes = model_classes()
    found: dict[str, list[str]] = {}
    for kind, model in classes.items(): found.setdefault(" ".join(kernels_of(model)), []).append(kind)
    return {"transformers": transformers.__version__, "kernels": dict(sorted(found.items()))}


if __name__ == "__main__":
    FILE.write_text(json.dumps(table(), indent=1) + "\n", encoding="utf-8")
    print(f"wrote {FILE}")
