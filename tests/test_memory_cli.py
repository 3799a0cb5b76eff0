"""`fsdl-devinfra memory` as users call it: documents, exit statuses, one sentence for what cannot be done, and the speed of a process."""
import json
import subprocess
import sys
import time
import pytest
from fsdl_devinfra.cli import main
from fsdl_devinfra.core.errors import CheckError
from fsdl_devinfra.memory import Architecture, Strategy, Workload, estimate

pytest.importorskip("fsdl_devinfra.hub")
LLAMA = dict(model_type="llama", architectures=["LlamaForCausalLM"], hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072, tie_word_embeddings=False)
KEYS = ("parameters", "gradients", "optimizer", "activations", "loss", "communication", "runtime", "reserve")

@pytest.fixture
def folder(tmp_path):
    def make(config=LLAMA):
        (tmp_path / "config.json").write_text(json.dumps(config) if not isinstance(config, str) else config)
        return str(tmp_path)
    return make

def said(capsys, *argv):
    status = main(["memory", *argv, "--json"])
    out = capsys.readouterr().out
    return status, json.loads(out)

def test_document(folder, capsys):
    status, d = said(capsys, folder(), "--dp", "8", "--zero", "3", "--recompute", "selective", "--seq-len", "8192", "--micro-batch", "2", "--gpu", "H100-SXM-96GB")
    assert status == 0 and d["model"]["parameters"] == 8_030_261_248
    assert tuple(d["per_gpu_bytes"]) == KEYS and set(d["peak_bytes"]) == {"value", "low", "high"}
    assert abs(d["peak_bytes"]["value"] / 2**30 - 82.4) < 2.5 and d["peak_phase"] == "loss"
    assert d["gpu"] == {"name": "H100-SXM-96GB", "memory_bytes": d["gpu"]["memory_bytes"]} and d["fits"] in ("yes", "tight")
    assert d["assumptions"] and d["host_bytes"] == 0 and d["strategy"]["zero"] == 3 and d["workload"]["seq_len"] == 8192

def test_exit_status_says_whether_it_fits(folder, capsys):
    assert said(capsys, folder(), "--gpu", "a100-40")[0] == 1
    assert said(capsys, folder(), "--gpu", "h200", "--dp", "8", "--zero", "3", "--recompute", "full")[0] == 0
    status, d = said(capsys, folder())
    assert status == 0 and d["fits"] is None and d["gpu"] is None

#: 4 × 4096 tokens of an 8B on eight H100 fit only with activation checkpointing; on A10G nothing helps, on B200 nothing is needed
OPEN = ("--gpus", "8", "--zero", "3", "--micro-batch", "4", "--seq-len", "4096", "--gpu")

@pytest.mark.parametrize("gpu, recompute, fits, status", [
    ("h100", [], "tight", 0), ("h100", ["--recompute", "none"], "no", 1), ("h100", ["--recompute", "full"], "yes", 0),
    ("a10g", [], "no", 1), ("a10g", ["--recompute", "full"], "no", 1), ("b200", [], "yes", 0), ("b200", ["--recompute", "none"], "yes", 0)])
def test_checkpointing_that_nobody_said_is_judged_alike(folder, capsys, gpu, recompute, fits, status):
    """`memory` and `cost` give one verdict and one figure; a verdict of tight is a range that straddles the limit."""
    asked = [*OPEN, gpu, *recompute]
    code, document = said(capsys, folder(), "--dp", "8", *asked[2:])
    assert (code, document["fits"]) == (status, fits)
    assert main(["cost", folder(), *asked, "--json"]) == status
    cost = json.loads(capsys.readouterr().out)
    assert (cost["fits"], cost["peak_bytes"]) == (fits, document["device_bytes"]["value"])
    whole, limit = document["device_bytes"], document["gpu"]["memory_bytes"]
    assert fits == ("yes" if whole["high"] <= limit else "no" if whole["low"] > limit else "tight")
    assert document["strategy"]["recompute"] == (recompute[1] if recompute else "none")
    assert sum("which was not said" in warning for warning in document["warnings"]) == (fits == "tight")

def test_checkpointing_that_nobody_said_changes_no_figure(folder, capsys):
    documents = [said(capsys, folder(), "--dp", "8", *OPEN[2:], "h100", *more)[1] for more in ([], ["--recompute", "none"])]
    changed = {key for key in documents[0] if documents[0][key] != documents[1][key]}
    assert changed == {"fits", "peak_bytes", "device_bytes", "warnings"}
    for key in ("peak_bytes", "device_bytes"):
        assert [documents[0][key][end] == documents[1][key][end] for end in ("value", "high", "low")] == [True, True, False]

def test_a_trainers_file_says_whether_it_checkpoints(folder, capsys, tmp_path):
    file, asked = tmp_path / "trainer.json", [folder(), "--lora-rank", "16", "--seq-len", "4096", "--gpu", "a100-40"]
    for checkpointing, fits in ((False, "no"), (True, "tight")):
        file.write_text(json.dumps(dict(per_device_train_batch_size=1, gradient_checkpointing=checkpointing, bf16=True)))
        document = said(capsys, *asked, "--config", str(file))[1]
        assert document["fits"] == fits and not any("was not said" in w for w in document["warnings"])
    assert any("was not said" in w for w in said(capsys, *asked, "--framework", "hf")[1]["warnings"])

def test_fits_is_judged_on_the_device_figure(folder, capsys):
    documents = [said(capsys, folder(), "--gpu", "h100", "--dp", "8", "--zero", "3", "--as", m)[1] for m in ("allocated", "reserved", "device")]
    assert len({d["fits"] for d in documents}) == 1
    values = [d["peak_bytes"]["value"] for d in documents]
    assert values == sorted(values) and values[0] < values[2]

def test_sequence_length_defaults_to_the_configuration(folder, capsys):
    assert said(capsys, folder(LLAMA | dict(max_position_embeddings=1024)))[1]["workload"]["seq_len"] == 1024
    assert said(capsys, folder())[1]["workload"]["seq_len"] == 4096

def test_states_only_needs_no_model(capsys):
    status, d = said(capsys, "--params", "7.5e9", "--states-only", "--zero", "1", "--dp", "4", "--framework", "deepspeed")
    assert status == 0 and d["peak_bytes"]["value"] == round(52.5e9)
    assert said(capsys, "--params", "7.5B")[0] == 2

def test_built_in_model_counts_what_its_headers_count(capsys):
    from fsdl_devinfra.hub import inspect
    status, d = said(capsys)
    assert status == 0 and d["model"]["parameters"] == inspect("builtin:digits").tensors.parameters

@pytest.mark.parametrize("argv", [("--dp", "-8"), ("--tp", "0"), ("--precision", "fp7"), ("--zero", "4"), ("--optimizer", "adamx"), ("--gpu", "h1000"), ("--tp", "3"), ("--pp", "33"), ("--seq-len", "none"),
                                  ("--params", "1e30", "--states-only"), ("--params", "-1", "--states-only"), ("--base-weights", "nf4"), ("--ep", "2", "--dp", "2"), ("--dp", "99999999999"), ("--gpu", ""), ("--seq-len", "99999999999")])
def test_bad_arguments_are_one_sentence(argv, folder, capsys):
    model = () if argv[0] == "--params" else (folder(),)
    status, d = said(capsys, *model, *argv)
    assert status == 2 and set(d) >= {"error", "hint"} and d["hint"] and "Traceback" not in d["error"] and "\n" not in d["error"]

@pytest.mark.parametrize("change", [dict(hidden_size=None), dict(num_hidden_layers=-1), dict(num_hidden_layers="many"), dict(hidden_size=10**30), dict(num_attention_heads=0), dict(num_attention_heads=7), dict(vocab_size=1.5),
                                    dict(num_key_value_heads=5), dict(num_key_value_heads=-8), dict(intermediate_size=[1]), dict(vocab_size=True), dict(num_hidden_layers=0)])
def test_absurd_configurations_are_one_sentence(change, folder, capsys):
    status, d = said(capsys, folder({k: v for k, v in (LLAMA | change).items() if v is not None}))
    assert status == 2 and d["hint"] and "unexpected" not in d["error"], d

@pytest.mark.parametrize("change", [dict(intermediate_size=0), dict(head_dim=10**9), dict(num_hidden_layers=10**9), dict(num_local_experts=2, num_experts_per_tok=9), dict(num_experts=4, decoder_sparse_step=-3),
                                    dict(kv_lora_rank=-5, qk_nope_head_dim=1, qk_rope_head_dim=1, v_head_dim=1), dict(model_type="zamba2"), dict(num_experts=4, mlp_only_layers=10**9), dict(architectures=5)])
def test_dimensions_that_no_model_has(change, folder, capsys):
    status, d = said(capsys, folder(LLAMA | change))
    assert status == 2 and d["hint"] and "unexpected" not in d["error"], d

@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"a": NaN}', "\x00"])
def test_broken_config_files(text, folder, capsys):
    status, d = said(capsys, folder(text))
    assert status == 2 and "unexpected" not in d["error"], d

def test_any_garbage_in_a_configuration_ends_in_a_sentence():
    "Every field replaced by nonsense: either an answer or a CheckError, never another exception."
    nonsense = [None, -1, 0, 1.5, "x", "", [], {}, True, 10**40, float("inf"), float("nan"), [1, 2], {"a": 1}]
    configs = [LLAMA, dict(model_type="mixtral", num_local_experts=8, num_experts_per_tok=2, **{k: v for k, v in LLAMA.items() if k != "model_type"}),
               dict(model_type="deepseek_v2", kv_lora_rank=512, q_lora_rank=None, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6, first_k_dense_replace=1, moe_intermediate_size=1408,
                    hidden_size=2048, intermediate_size=10944, num_hidden_layers=27, num_attention_heads=16, vocab_size=102400),
               dict(model_type="mpt", d_model=512, n_layers=4, n_heads=8, expansion_ratio=4, vocab_size=1000, attn_config={"alibi": True}), dict(model_type="t5", d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8, vocab_size=32128),
               dict(model_type="vit", hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, image_size=224, patch_size=16, num_labels=10, num_channels=3)]
    for config in configs:
        for key in config:
            for value in nonsense:
                try: estimate(Architecture.from_config({**config, key: value}), Strategy(), Workload(128, 1))
                except CheckError as e: assert e.hint

def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit): main(["memory", "--help"])
    assert "fsdl-devinfra memory" in capsys.readouterr().out.split("examples:")[1]

def test_as_a_process_and_without_heavy_libraries(folder):
    code = f"import sys; from fsdl_devinfra.cli import main; s = main(['memory', {folder()!r}, '--gpu', 'h100', '--json']); assert not {{'torch', 'numpy', 'transformers'}} & set(sys.modules); sys.exit(s)"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and json.loads(done.stdout)["fits"] == "no" and time.monotonic() - start < 10

def test_the_size_of_the_pictures_is_heard(capsys):
    "Activations of a vision transformer grow with its patches: (384 / 224)² as many."
    held = {}
    for size in (224, 384):
        assert main(["memory", "google/vit-base-patch16-224", "--image-size", str(size), "--json"]) == 0
        held[size] = json.loads(capsys.readouterr().out)["per_gpu_bytes"]["activations"]
    assert held[384] > 1.5 * held[224]


@pytest.mark.parametrize("how", [[], ["--gpu", "h100"], ["--serve", "vllm"], ["--states-only"]])
@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_is_no_model(capsys, name, how):
    status, document = said(capsys, name, *how)
    assert status == 2 and "is empty" in document["error"] and document["hint"]

def test_a_name_left_out_is_the_embedded_model(capsys):
    status, document = said(capsys, "--gpu", "h100")
    assert status == 0 and document["model"]["name"] == "builtin:digits"
