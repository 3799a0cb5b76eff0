"""Serving engines, the largest that fits, and the overview: as the command says them."""
import json
import pytest
from fsdl_devinfra.cli import main
from fsdl_devinfra.core.device_table import find_device
from fsdl_devinfra.core.errors import BadInput
from fsdl_devinfra.memory import Architecture, ServeOptions, Strategy, Workload, estimate, overview, serve

LLAMA = dict(model_type="llama", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
             intermediate_size=14336, vocab_size=128256, max_position_embeddings=131072)
KEYS = {"weights_bytes", "activation_peak_bytes", "kv_cache_bytes", "kv_bytes_per_token", "kv_tokens", "max_concurrency"}

@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return str(tmp_path)

def run(capsys, *args):
    code = main(["memory", *args, "--json"])
    return code, json.loads(capsys.readouterr().out)

@pytest.mark.parametrize("engine", ["vllm", "sglang", "llama.cpp"])
def test_serve_has_the_keys_whether_it_fits_or_not(folder, capsys, engine):
    code, said = run(capsys, folder, "--serve", engine, "--gpu", "h100", "--max-model-len", "8192")
    assert code == 0 and said["fits"] == "yes" and said["serving"].keys() >= KEYS
    assert said["serving"]["kv_bytes_per_token"] == pytest.approx(said["serving"]["kv_cache_bytes"] / said["serving"]["kv_tokens"], rel=1e-6)
    code, said = run(capsys, folder, "--serve", engine, "--gpu", "t4", "--max-model-len", "8192")
    assert code == 1 and said["fits"] == "no" and said["serving"].keys() >= KEYS

def test_an_eight_bit_cache_takes_twice_the_tokens():
    a, card = Architecture.from_config(LLAMA), find_device("h100")
    wide, narrow = (serve(a, ServeOptions(kv_cache_dtype=t), card)[0] for t in ("auto", "fp8"))
    assert narrow.kv_tokens == pytest.approx(2 * wide.kv_tokens, rel=1e-3)

def test_tensor_parallelism_divides_heads_but_not_latent_caches():
    latent = LLAMA | dict(model_type="deepseek_v3", kv_lora_rank=512, q_lora_rank=1536, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
    def each(config, tp): return serve(Architecture.from_config(config), ServeOptions(tp=tp, max_model_len=4096))[0].kv_bytes_per_token
    assert each(LLAMA, 2) == each(LLAMA, 1) / 2 and each(latent, 2) == each(latent, 1) == 32 * 576 * 2

def test_states_of_a_hybrid_are_apart_from_its_cache():
    config = dict(model_type="qwen3_next", hidden_size=2048, num_hidden_layers=8, num_attention_heads=16, num_key_value_heads=2, head_dim=256,
                  intermediate_size=5632, vocab_size=1000, max_position_embeddings=8192)
    found, _ = serve(Architecture.from_config(config), ServeOptions(max_model_len=4096))
    assert found.kv_bytes_per_token == 2 * 2 * 2 * 256 * 2 and found.state_bytes > 0  # two of eight layers attend

def test_a_request_longer_than_the_model_is_refused():
    with pytest.raises(BadInput, match="positions"): serve(Architecture.from_config(LLAMA), ServeOptions(max_model_len=200_000))

def test_a_sequence_longer_than_the_model_is_said(folder):
    a = Architecture.from_config(LLAMA | {"max_position_embeddings": 2048})
    longer, fine = (estimate(a, Strategy(), Workload(n)) for n in (4096, 2048))
    assert "positions" in longer.verdict() and not fine.warnings

def test_solve(folder, capsys):
    code, said = run(capsys, folder, "--solve", "seq-len", "--lora-rank", "8", "--recompute", "full", "--gpu", "a100-80")
    assert code == 0 and said["fits"] == "yes" and said["solve"]["largest"] == said["workload"]["seq_len"]
    assert main(["memory", folder, "--solve", "seq-len"]) == 2

def test_overview_without_options(folder, capsys):
    code, said = run(capsys, folder)
    assert code == 0 and said["fits"] is None and {r["use"] for r in said["overview"]} == {"inference", "QLoRA", "LoRA", "full training"}
    _, said = run(capsys, folder, "--lora-rank", "8")
    assert "overview" not in said
    assert all(r.peak_bytes > 0 for r in overview(Architecture.from_config(LLAMA)))

def test_changing_lengths_widen_what_is_reserved_alone():
    a, w = Architecture.from_config(LLAMA), Workload(8192)
    longest, fixed = (estimate(a, Strategy(framework="hf", lora_rank=8, recompute="full", padding=p), w) for p in ("longest", "fixed"))
    assert longest.peak_bytes.value == fixed.peak_bytes.value and longest.peak_bytes.high > fixed.peak_bytes.high
    sure = [estimate(a, Strategy(framework="hf", lora_rank=8, padding=p), w, measure="allocated").peak_bytes for p in ("longest", "fixed")]
    assert sure[0] == sure[1]

def test_the_gate_of_fine_tuning_and_serving_can_fail(monkeypatch):
    from pathlib import Path
    from fsdl_devinfra.memory import engines
    from fsdl_devinfra.validation import tuning_accuracy as accuracy
    folder = Path(__file__).parent / "data" / "ground_truth"
    assert accuracy.missed_gates(accuracy.group_scores(accuracy.judged_rows(folder))) == []
    monkeypatch.setitem(engines.FROZEN, "nf4", 2.0)
    assert accuracy.missed_gates(accuracy.group_scores(accuracy.judged_rows(folder)))

def test_a_trainers_file_stands_for_options(folder, tmp_path, capsys):
    path = tmp_path / "args.json"
    path.write_text(json.dumps(dict(per_device_train_batch_size=2, max_length=1024, bf16=True, gradient_checkpointing=True, lora_r=16)))
    code, said = run(capsys, folder, "--config", str(path))
    assert code == 0 and said["workload"]["micro_batch"] == 2 and said["workload"]["seq_len"] == 1024
    assert (said["strategy"]["framework"], said["strategy"]["recompute"], said["strategy"]["lora_rank"]) == ("hf", "full", 16)
    path.write_text("[]")
    assert main(["memory", folder, "--config", str(path)]) == 2

def test_a_log_says_what_was_held(tmp_path, capsys):
    path = tmp_path / "start.log"
    path.write_text("INFO Model loading took 14.96 GiB and 3.2 seconds\nINFO Available KV cache memory: 3.81 GiB\nGPU KV cache size: 31,232 tokens\n")
    code, said = run(capsys, "check-log", str(path))
    assert code == 0 and said["kv_tokens"] == 31232 and [h["part"] for h in said["held"]] == ["weights", "KV cache"]
    path.write_text("nothing of interest")
    assert main(["memory", "check-log", str(path)]) == 2
    assert main(["memory", "builtin:digits", str(path)]) == 2

def test_an_offloaded_optimizer_of_fsdp_stays_in_host_memory():
    a = Architecture.from_config(LLAMA)
    found = estimate(a, Strategy(dp=8, zero=3, offload="optimizer"), Workload(128))
    assert found.timeline["optimizer"]["optimizer"] == 0
