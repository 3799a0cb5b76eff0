"""`cost --calibrate`: a list, a log and a trace narrow the range; what says nothing is one sentence."""
from __future__ import annotations

import json

import pytest

CONFIG = dict(model_type="llama", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336, vocab_size=128256, max_position_embeddings=131072)
RUN = ("--gpu", "h100", "--dp", "8", "--zero", "3", "--recompute", "full", "--tokens", "1e9", "--usd-per-gpu-hour", "2", "--json")


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def asked(cli, model, text):
    (model / "steps.log").write_text(text)
    return cli("cost", model, *RUN, "--calibrate", model / "steps.log")


@pytest.mark.parametrize("text", ["[9, 0.5, 0.52, 0.51]", "\n".join(f"iteration {i}/ 9 | elapsed time per iteration (ms): {x} | loss" for i, x in enumerate((9000, 500, 520, 510))),
                                  "1%| 1/9 [9.00s/it]\n2%| 2/9 [00:01<00:09, 0.50s/it]\n3%| [0.52s/it]\n4%| [0.51s/it]", "step 1 step_time: 9.0\nstep 2 step_time: 0.5\nstep 3 step_time: 0.52\nstep 4 step_time: 0.51"])
def test_three_steps_are_the_step(cli, model, text):
    before, after = cli("cost", model, *RUN).json, asked(cli, model, text).json
    assert after["step_seconds"] == pytest.approx({"value": 0.51, "low": 0.5, "high": 0.52})
    times = 0.51 / before["step_seconds"]["value"]
    for key in ("hours", "usd", "usd_per_million_tokens"): assert after[key] == pytest.approx(before[key] * times)
    assert after["mfu"] == pytest.approx(before["mfu"] / times) and sum(after["spent_seconds"].values()) == pytest.approx(0.51)
    assert after["tokens_per_second_per_gpu"]["value"] == pytest.approx(before["tokens_per_second_per_gpu"]["value"] / times)
    assert "do not say which part" in " ".join(after["assumptions"])


@pytest.mark.parametrize("slow,part", [("ncclDevKernel_AllGather", "communication"), ("nvjet_hsh_gemm", "computation")])
def test_a_trace_says_which_part_was_off(cli, model, slow, part):
    before = cli("cost", model, *RUN).json["spent_seconds"]
    usual = {"nvjet_hsh_gemm": sum(before.get(k, 0) for k in ("products", "attention", "elementwise", "optimizer")), "ncclDevKernel_AllGather": before.get("data", 0)}
    events = [dict(name=f"ProfilerStep#{i}", cat="user_annotation", dur=8e5) for i in range(3)]
    events += [dict(name=name, cat="kernel", dur=(seconds + 5 * (name == slow)) * 1e6) for name, seconds in usual.items() for _ in range(3)]
    after = asked(cli, model, json.dumps(dict(traceEvents=events))).json
    assert after["step_seconds"]["value"] == pytest.approx(0.8) and f"Most off: {part}" in " ".join(after["assumptions"])


@pytest.mark.parametrize("text", ["", "loss 2.3", "[]", "[-1, 0]", "{}", '{"traceEvents": []}'])
def test_a_log_without_steps_is_one_sentence(cli, model, text):
    ran = asked(cli, model, text)
    assert ran.status == 2 and "no step time" in ran.json["error"]
