"""Any module, counted on fake tensors: against the closed form where there is one, and as a command where there is none."""
import json

import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
import torch  # noqa: E402

from fsdl_devinfra.memory import Architecture, Strategy, Workload, estimate  # noqa: E402
from fsdl_devinfra.memory.modules import estimate_module, inputs_of, module_of  # noqa: E402

# the default activation of GPT-2, gelu_new, is written out in Python and keeps three more tensors than a kernel does
GPT2 = transformers.GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, n_layer=4, activation_function="gelu_pytorch_tanh", use_cache=False).to_dict() | {"architectures": ["GPT2LMHeadModel"]}
VIT = transformers.ViTConfig(num_hidden_layers=4).to_dict() | {"architectures": ["ViTForImageClassification"], "num_labels": 1000}
LLAMA = transformers.LlamaConfig(hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16, vocab_size=32000, use_cache=False).to_dict() | {"architectures": ["LlamaForCausalLM"]}


def next_token_loss(result):
    return torch.nn.functional.cross_entropy(result.logits.float().flatten(0, 1), torch.zeros(result.logits.shape[0] * result.logits.shape[1], dtype=torch.long))


CASES = {"gpt2": (GPT2, 4, 1024, next_token_loss), "vit": (VIT, 16, 197, None), "llama": (LLAMA, 2, 1024, next_token_loss)}
FAST = (("gpt2", "fp32"), ("vit", "bf16-mixed"), ("llama", "bf16-mixed"))
SLOW = (("gpt2", "bf16-mixed"), ("vit", "fp32"), ("llama", "fp32"))


def case(name, precision, marks=()): return pytest.param(*CASES[name], precision, id=f"{precision}-{name}", marks=marks)


@pytest.mark.parametrize("config, batch, length, loss, precision", [*(case(*c) for c in FAST), *(case(*c, pytest.mark.slow) for c in SLOW)])
def test_agrees_with_the_closed_form(config, batch, length, loss, precision):
    module = module_of(config)
    counted = estimate_module(module, inputs_of(module, config, batch, length), Strategy(precision=precision), measure="allocated", loss=loss)
    closed = estimate(Architecture.from_config(config), Strategy(precision=precision), Workload(seq_len=length, micro_batch=batch), measure="allocated")
    assert counted.peak_bytes.value == pytest.approx(closed.peak_bytes.value, rel=0.08)


def test_a_cnn_as_a_command(cli, tmp_path):
    folder = tmp_path / "resnet"; folder.mkdir()
    config = transformers.ResNetConfig(num_labels=10, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic").to_dict() | {"architectures": ["ResNetForImageClassification"]}
    (folder / "config.json").write_text(json.dumps(config))
    small, large = (cli("memory", folder, "--micro-batch", n, "--gpu", "t4", "--json").json for n in (1, 64))
    assert small["model"]["parameters"] == sum(p.numel() for p in transformers.ResNetForImageClassification(transformers.ResNetConfig.from_dict(config)).parameters())
    assert 55 < large["per_gpu_bytes"]["activations"] / small["per_gpu_bytes"]["activations"] < 65 and large["fits"] == "yes"
    refused = cli("memory", folder, "--tp", 2, "--json")
    assert refused.status == 2 and "tp" in refused.json["error"]


def test_tied_weights_count_once():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(1000, 64), torch.nn.Linear(64, 1000, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x): return self.head(self.embed(x))

    found = estimate_module(Tied(), torch.zeros(2, 8, dtype=torch.long), Strategy(precision="fp32"))
    assert found.model.parameters == 64_000 and found.per_gpu_bytes["parameters"] == 256_000


def test_data_parallel_ranks_keep_buckets():
    one, four = (estimate_module(torch.nn.Linear(512, 512), torch.zeros(4, 512), Strategy(dp=n)) for n in (1, 4))
    step = four.timeline["optimizer step"]
    assert one.timeline["optimizer step"]["communication"] == 0 and step["communication"] == step["gradients"] > 0
