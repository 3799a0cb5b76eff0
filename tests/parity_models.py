"Small models, and files of them as different people make them: for the studies of parity."
from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from fsdl_devinfra.parity.exporting import Capture, export_capture
from fsdl_devinfra.parity.inputs import call, example_inputs, free_dims

WIDTHS: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SMALL: dict[str, Any] = {"vocab_size": 60, "max_position_embeddings": 32}


def made(name: str, **config: Any) -> nn.Module:
    "A model of transformers with random weights."
    import transformers
    kind = {"LM": "ForCausalLM"}.get(name.split(":")[1], name.split(":")[1])
    prefix = name.split(":")[0]
    settings = getattr(transformers, prefix + "Config")(**config)
    return getattr(transformers, {"GPT2LM": "GPT2LMHeadModel"}.get(prefix + name.split(":")[1], prefix + kind))(settings)


TEXT: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: made("Bert:Model", **WIDTHS, **SMALL),
    "roberta": lambda: made("Roberta:ForSequenceClassification", **WIDTHS, vocab_size=60, max_position_embeddings=34),
    "distilbert": lambda: made("DistilBert:Model", dim=32, n_layers=2, n_heads=4, hidden_dim=64, **SMALL),
    "albert": lambda: made("Albert:Model", **WIDTHS, embedding_size=16, **SMALL),
    "electra": lambda: made("Electra:ForTokenClassification", **WIDTHS, embedding_size=16, **SMALL),
    "gpt2": lambda: made("GPT2:LM", n_embd=32, n_layer=2, n_head=4, n_positions=32, vocab_size=60, bos_token_id=0, eos_token_id=0),
    "llama": lambda: made("Llama:LM", **WIDTHS, num_key_value_heads=2, **SMALL),
    "mistral": lambda: made("Mistral:LM", **WIDTHS, num_key_value_heads=2, **SMALL),
    "qwen2": lambda: made("Qwen2:LM", **WIDTHS, num_key_value_heads=2, **SMALL),
    "gemma": lambda: made("Gemma:LM", **WIDTHS, num_key_value_heads=2, head_dim=8, **SMALL),
    "opt": lambda: made("OPT:LM", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, word_embed_proj_dim=32, **SMALL),
    "gpt_neox": lambda: made("GPTNeoX:LM", **WIDTHS, **SMALL),
    "t5": lambda: made("T5:ForConditionalGeneration", d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=60, decoder_start_token_id=0),
    "vit": lambda: made("ViT:ForImageClassification", **WIDTHS, image_size=16, patch_size=4),
    "convnext": lambda: made("ConvNext:ForImageClassification", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32, patch_size=2),
    "resnet": lambda: made("ResNet:ForImageClassification", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
}
OWN = ("convnet", "unet", "lstm", "mixer", "gated")
NAMES = (*TEXT, *OWN)


def model_of(
    name: str,  # of NAMES, "timm:NAME", or "zoo:FAMILY" of Transformers
    seed: int = 1,
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    "A model in eval mode whose weights are all away from zero and one, and an example."
    torch.manual_seed(seed)
    module, inputs = _built(name)
    stir(module)
    return module.eval(), example_inputs(module, seed=seed) if inputs is None else inputs


def stir(module: nn.Module) -> None:
    "Move all weights away from zero and one: an untrained model has branches and heads that are zero, and hide what is before them."
    with torch.no_grad():
        for p in module.parameters(): p.add_(0.1 * torch.randn_like(p) * (p.std() if p.numel() > 1 and p.std() > 0 else 1))
        for b in module.modules():
            if isinstance(b, nn.BatchNorm2d): b.running_mean.normal_(0, 0.1); b.running_var.uniform_(0.5, 2)


def _built(name: str) -> tuple[nn.Module, dict[str, torch.Tensor] | None]:
    if name.startswith("timm:"):
        import timm
        module = timm.create_model(name.removeprefix("timm:"), pretrained=False)
        return module, {"x": torch.randn(2, *module.default_cfg["input_size"])}
    if name.startswith("zoo:"): return _of_zoo(name.removeprefix("zoo:")), None
    if name in TEXT: return TEXT[name](), None
    from test_parity_zoo import ZOO
    return ZOO[name]()


def _of_zoo(family: str) -> nn.Module:
    "A tiny model of any family of the installed transformers."
    import sys
    sys.path.insert(0, str(Path(__file__).resolve().parent / "studies"))
    import hub_zoo
    config = hub_zoo.config_of(family, 1)
    return hub_zoo.class_of(config).from_config(config)


class Positional(nn.Module):
    "A model with its inputs by position and its outputs as a tuple."
    def __init__(self, module: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = module, names

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = self.model(**dict(zip(self.names, tensors)))
        kept = [v for v in (out.values() if isinstance(out, Mapping) else out if isinstance(out, (tuple, list)) else [out]) if isinstance(v, torch.Tensor)]
        return tuple(kept)


@dataclass(frozen=True)
class Made:
    "One model and its files."
    name: str
    module: nn.Module
    inputs: dict[str, torch.Tensor]
    files: dict[str, Path]  # exporter → file
    captured: Capture


def dynamo(module: nn.Module, inputs: dict[str, torch.Tensor], file: Path) -> Capture:
    return export_capture(module, inputs, file)[1]


def torchscript(module: nn.Module, inputs: dict[str, torch.Tensor], file: Path, names: list[str] | None = None, opset: int = 17) -> Path:
    "The old exporter, with the free dimensions of the model."
    dims = free_dims(module, inputs)
    axes = {k: {i: f"{d}" for i, d in v.items()} for k, v in dims.items()}
    outputs = list(call(module, inputs))
    configs = [c for c in (getattr(m, "config", None) for m in module.modules()) if c is not None and getattr(c, "use_cache", None)]
    for c in configs: c.use_cache = False
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            wrapped = Positional(module, list(inputs)).eval()
            torch.onnx.export(wrapped, tuple(inputs.values()), str(file), input_names=list(inputs), output_names=outputs, dynamic_axes=axes,
                              opset_version=opset, dynamo=False)
    finally:
        for c in configs: c.use_cache = True
    if names:
        from fsdl_devinfra.parity.feeding import renamed
        from fsdl_devinfra.parity.graph import load_graph
        onnx.save(renamed(load_graph(file), dict(zip(inputs, names))).proto, file)
    return file


def optimised(source: Path, file: Path, level: str = "extended") -> Path:
    "As ONNX Runtime writes a file after its own fusions, which drops the notes of the exporter."
    import onnxruntime as ort
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_ENABLE_{level.upper()}")
    options.optimized_model_filepath, options.log_severity_level = str(file), 4
    ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    return without_notes(file)


def without_notes(file: Path) -> Path:
    "Without what the exporter wrote about the origin of nodes."
    proto = onnx.load(file)
    for node in proto.graph.node: del node.metadata_props[:]
    onnx.save(proto, file)
    return file


def converted(source: Path, file: Path, opset: int) -> Path:
    "Through the version converter of the onnx package."
    onnx.save(onnx.version_converter.convert_version(onnx.load(source), opset), file)
    return file


def build(name: str, folder: Path, exporters: tuple[str, ...] = ("dynamo", "torchscript", "optimised"), seed: int = 1) -> Made:
    "A model with a file by each exporter."
    module, inputs = model_of(name, seed)
    stem = name.replace(":", "_")
    files = {"dynamo": folder / f"{stem}.dynamo.onnx"}
    captured = dynamo(module, inputs, files["dynamo"])
    if "torchscript" in exporters: files["torchscript"] = torchscript(module, inputs, folder / f"{stem}.torchscript.onnx")
    if "optimised" in exporters: files["optimised"] = optimised(files["dynamo"], folder / f"{stem}.optimised.onnx")
    return Made(name, module, inputs, {k: files[k] for k in exporters}, captured)
