"""Does `hub.load` give what `from_pretrained` gives? Tiny random models of every family of the installed Transformers, in three dtypes, bit by bit.

python tests/studies/hub_zoo.py --seed 1 --count 120

A family counts where its tiny configuration can be built and Transformers itself loads what it saved; how many could not be built is
printed too. Compared are names, dtypes, shapes, values and ties of all parameters and all buffers.
"""
from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import logging
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fsdl_devinfra.core.errors import CheckError
from fsdl_devinfra.hub.loading import load

DTYPES = ["float32", "bfloat16", "float16"]
MOST_PARAMETERS = 12_000_000
AUTO = ["AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModelForImageTextToText", "AutoModelForImageClassification",
        "AutoModelForSpeechSeq2Seq", "AutoModelForCTC", "AutoModelForObjectDetection", "AutoModelForSemanticSegmentation", "AutoModelForDepthEstimation",
        "AutoModelForAudioClassification", "AutoModelForTextToWaveform", "AutoModelForSequenceClassification", "AutoModel"]
#: families whose sizes have names or bounds of their own
OWN: dict[str, dict[str, Any]] = {
    "mamba2": {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2}, "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}, "convnext": {"hidden_sizes": [8, 16], "depths": [1, 1]},
    "convnextv2": {"hidden_sizes": [8, 16], "depths": [1, 1]}, "swin": {"embed_dim": 24, "depths": [1, 1], "num_heads": [2, 2], "image_size": 32, "patch_size": 4, "window_size": 4},
    "segformer": {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 1, 1], "decoder_hidden_size": 8}, "rwkv": {"attention_hidden_size": 32},
    "longformer": {"attention_window": 4}, "albert": {"embedding_size": 16}, "electra": {"embedding_size": 16}, "falcon": {"new_decoder_architecture": False},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48}, "regnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 8, "layer_type": "x"},
}
_SPEECH = {"conv_dim": (8, 8), "conv_kernel": (3, 3), "conv_stride": (2, 2), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
OWN |= {name: _SPEECH for name in ("wav2vec2", "hubert", "unispeech", "unispeech-sat", "wavlm", "sew", "data2vec-audio")}


def sizes(rng: random.Random) -> dict[str, Any]:
    """Small values for the names that configurations use; drawn anew for every family."""
    heads, layers = rng.choice([2, 4]), rng.choice([1, 2, 3])
    hidden = heads * rng.choice([8, 16])
    return {
        "hidden_size": hidden, "d_model": hidden, "n_embd": hidden, "dim": hidden, "embed_dim": hidden, "hidden_dim": 2 * hidden, "intermediate_size": 2 * hidden, "d_ff": 2 * hidden,
        "ffn_dim": 2 * hidden, "encoder_ffn_dim": 2 * hidden, "decoder_ffn_dim": 2 * hidden, "dff": 2 * hidden, "n_inner": 2 * hidden, "d_kv": 8, "attention_dim": hidden,
        "num_hidden_layers": layers, "num_layers": layers, "n_layer": layers, "n_layers": layers, "encoder_layers": layers, "decoder_layers": layers, "num_decoder_layers": layers,
        "num_attention_heads": heads, "num_heads": heads, "n_head": heads, "n_heads": heads, "attention_heads": heads, "encoder_attention_heads": heads,
        "decoder_attention_heads": heads, "num_key_value_heads": rng.choice([1, heads]), "vocab_size": 64 + 8 * rng.randrange(4), "max_position_embeddings": rng.choice([64, 2048]),
        "n_positions": rng.choice([64, 2048]), "max_source_positions": 16, "max_target_positions": 16, "rotary_dim": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "decoder_start_token_id": 1, "image_size": 32, "patch_size": 8, "num_mel_bins": 8, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8,
        "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "n_shared_experts": 1, "projection_dim": 16, "embedding_size": 16, "num_labels": 3,
        "tie_word_embeddings": rng.random() < 0.5, "state_size": 4, "time_step_rank": 4, "mamba_d_state": 4, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1,
    }


def fields_of(made: type) -> set[str]:
    return set(inspect.signature(made.__init__).parameters) | {f.name for f in dataclasses.fields(made)} if dataclasses.is_dataclass(made) else set(inspect.signature(made.__init__).parameters)


def small(made: type, values: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The arguments that make a configuration, and those inside it, small."""
    known = fields_of(made) | set(getattr(made, "attribute_map", {}))
    found = {k: v for k, v in (values | own).items() if k in known and not (k in getattr(made, "sub_configs", {}))}
    head = values["hidden_size"] // values["num_attention_heads"]
    if "head_dim" in known and "head_dim" not in found: found["head_dim"] = head
    for name, inner in getattr(made, "sub_configs", {}).items():
        if inner is not transformers.AutoConfig and name in known: found[name] = small(inner, values, {})
    return found


def config_of(name: str, seed: int) -> Any:
    rng = random.Random(f"{seed} {name}")
    made = CONFIG_MAPPING[name]
    kwargs = small(made, sizes(rng), OWN.get(name, {}))
    try: return made(**kwargs)
    except Exception:
        kwargs.pop("head_dim", None)
        return made(**kwargs)


def class_of(config: Any) -> Any:
    for auto in AUTO:
        found = getattr(transformers, auto, None)
        if found is not None and type(config) in found._model_mapping.keys(): return found
    raise LookupError("no automatic class")


def made(name: str, seed: int, dtype: str, folder: Path) -> Any:
    """Save a tiny model of random weights. Returns its automatic class."""
    config = config_of(name, seed)
    auto = class_of(config)
    with torch.device("meta"): count = sum(p.numel() for p in auto.from_config(config).parameters())
    if count > MOST_PARAMETERS: raise OverflowError(f"{count} parameters")
    torch.manual_seed(seed)
    model = auto.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point(): p.normal_(0, 0.05)
        for n, b in model.named_buffers():
            if b.is_floating_point() and "running" in n: b.uniform_(0.5, 1)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return auto


def differences(ours: Any, theirs: Any) -> list[str]:
    """What is not the same: names, dtypes, shapes, values, ties."""
    found = []
    for kind in "named_parameters", "named_buffers":
        a, b = (dict(getattr(m, kind)(remove_duplicate=False)) for m in (ours, theirs))
        found += [f"{n}: only one has it" for n in sorted(a.keys() ^ b.keys())]
        for n in sorted(a.keys() & b.keys()):
            if (a[n].dtype, a[n].shape) != (b[n].dtype, b[n].shape): found.append(f"{n}: {a[n].dtype} {tuple(a[n].shape)} for {b[n].dtype} {tuple(b[n].shape)}")
            elif not torch.equal(a[n].contiguous().view(-1).view(torch.uint8), b[n].contiguous().view(-1).view(torch.uint8)): found.append(f"{n}: other values")
    return found + (["other ties"] if ties(ours) != ties(theirs) else [])


def ties(model: Any) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for n, p in model.named_parameters(remove_duplicate=False): groups.setdefault(id(p), []).append(n)
    return sorted(sorted(g) for g in groups.values() if len(g) > 1)


def judged(name: str, seed: int, dtype: str, asked: str | None = None) -> str:
    """"equal", or what is not; "not built: …" where the tiny model or Transformers' own loading fails."""
    with tempfile.TemporaryDirectory(prefix="hub-zoo-") as folder:
        try:
            auto = made(name, seed, dtype, Path(folder))
            theirs = auto.from_pretrained(folder, **({"dtype": getattr(torch, asked)} if asked else {}))
        except Exception as e: return f"not built: {type(e).__name__} {str(e)[:80]}"
        try: ours = load(folder, auto, dtype=asked)
        except CheckError as e: return f"refused: {e}"[:300]
        except Exception as e: return f"crash: {type(e).__name__} {str(e)[:200]}"
        found = differences(ours, theirs)
        if found and not unlike_files(Path(folder), ours, found): return f"Transformers changes what the file holds: {'; '.join(found[:3])}"
        return f"{len(found)} differ: {'; '.join(found[:3])}" if found else "equal"


def unlike_files(folder: Path, ours: Any, found: list[str]) -> list[str]:
    """Of the tensors that differ in value, those that are not what the files hold: some classes write into weights after they were loaded."""
    stored = {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
    state = ours.state_dict()
    names = [said.partition(": ")[0] for said in found if said.endswith(": other values")]
    def held(name: str) -> bool:
        """True where a file holds this value, under the module's name or one with a prefix more."""
        return any(n.endswith(name) and t.shape == state[name].shape and torch.equal(t.to(state[name].dtype), state[name]) for n, t in stored.items())
    return [n for n in names if not held(n)] + [said for said in found if not said.endswith(": other values")]


def quiet() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def families(seed: int) -> list[str]:
    found = sorted(CONFIG_MAPPING.keys())
    random.Random(seed).shuffle(found)
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=120, help="families that can be built")
    parser.add_argument("--only", nargs="*", default=[])
    args = parser.parse_args()
    quiet()
    kinds: Counter[str] = Counter()
    equal = compared = skipped = changed = 0
    started = time.monotonic()
    for name in args.only or families(args.seed):
        if compared == args.count: break
        found = {dtype: judged(name, args.seed, dtype, random.Random(f"{args.seed} {name} {dtype}").choice([None, None, *DTYPES])) for dtype in DTYPES}
        if any(said.startswith("not built") for said in found.values()):
            skipped += 1
            kinds["not built"] += 1
            if args.only: print(name, found)
            continue
        compared += 1
        equal += all(said == "equal" for said in found.values())
        changed += any(said.startswith("Transformers changes") for said in found.values())
        if any(said != "equal" for said in found.values()): print(json.dumps({"family": name, **found}), flush=True)
    print(json.dumps({"seed": args.seed, "compared": compared, "equal": equal, "changed by Transformers": changed, "not built": skipped, "seconds": round(time.monotonic() - started)}))
    return int(equal + changed < compared)


if __name__ == "__main__": sys.exit(main())
