"""What holds for any model and any strategy: more of something never takes less, and splitting never takes more of what it splits."""
import os
from dataclasses import replace
from hypothesis import HealthCheck, assume, given, settings, strategies as st
from fsdl_devinfra.memory import Architecture, Strategy, Workload, device_peak, estimate
from fsdl_devinfra.memory.engines import share, sharded, stages
from fsdl_devinfra.memory.strategy import CHOICES, refusal

@st.composite
def architectures(draw):
    heads, each = draw(st.sampled_from([8, 16, 32])), draw(st.sampled_from([64, 128]))
    config = dict(hidden_size=heads * each, num_attention_heads=heads, num_hidden_layers=draw(st.integers(2, 40)), vocab_size=draw(st.sampled_from([8192, 32000, 128256])),
                  intermediate_size=heads * each * draw(st.integers(2, 4)), tie_word_embeddings=draw(st.booleans()))
    kind = draw(st.sampled_from(["llama", "gpt2", "mixtral", "deepseek_v3", "mistral"]))
    if kind not in ("gpt2", "deepseek_v3"): config["num_key_value_heads"] = draw(st.sampled_from([1, 2, heads // 2, heads]))
    if kind == "mixtral": config |= dict(num_local_experts=8, num_experts_per_tok=2)
    if kind == "mistral": config |= dict(sliding_window=512)
    if kind == "deepseek_v3": config |= dict(n_routed_experts=16, num_experts_per_tok=4, n_shared_experts=1, moe_intermediate_size=512, first_k_dense_replace=1, kv_lora_rank=128,
                                             q_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64)
    return Architecture.from_config(dict(config, model_type=kind))

@st.composite
def strategies(draw):
    some = {name: draw(st.sampled_from(options)) for name, options in CHOICES.items() if name not in ("base_weights", "lora_targets")}
    lora = draw(st.sampled_from([None, None, 16]))
    degrees = {name: draw(st.sampled_from([1, 1, 2, 4])) for name in ("dp", "tp", "pp", "cp")}
    return Strategy(**some, **degrees, ep=draw(st.sampled_from([1, 1, 2])), vpp=draw(st.sampled_from([1, 1, 2])), zero=draw(st.sampled_from([0, 1, 2, 3])), lora_rank=lora,
                    base_weights=draw(st.sampled_from([None, "nf4", "int8"])) if lora else None, compile=some["kernels"] == "compile" or some["kernels"] != "torch" and draw(st.booleans()), optimizer_in_backward=draw(st.booleans()))

WORKLOADS = st.builds(Workload, seq_len=st.sampled_from([512, 2048, 8192]), micro_batch=st.sampled_from([1, 2, 4]), grad_accum=st.sampled_from([None, 1, 4, 8]))
#: examples a property; more of them to look further: MEMORY_EXAMPLES=1000 pytest tests/test_memory_properties.py
EXAMPLES = int(os.environ.get("MEMORY_EXAMPLES", "60"))
quick = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow], derandomize=True)

def runs(a, s, w): assume(refusal(a, s, w) is None)
def peak(a, s, w): return device_peak(a, s, w)
def never_less(small, big): assert big >= small * (1 - 1e-9), (small / 2**30, big / 2**30)

@quick
@given(architectures(), strategies(), WORKLOADS)
def test_longer_and_more_sequences(a, s, w):
    for more in (replace(w, seq_len=2 * w.seq_len), replace(w, micro_batch=2 * w.micro_batch)):
        runs(a, s, w); runs(a, s, more)
        never_less(peak(a, s, w), peak(a, s, more))

@quick
@given(architectures(), strategies(), WORKLOADS)
def test_more_micro_batches(a, s, w):
    assume(s.pp == 1)
    few, many = replace(w, grad_accum=2), replace(w, grad_accum=8)
    runs(a, s, few); runs(a, s, many)
    never_less(peak(a, s, few), peak(a, s, many))

@quick
@given(architectures(), strategies(), WORKLOADS)
def test_recomputing(a, s, w):
    "Of a few layers nothing is saved: the one that is recomputed is whole again."
    full, selective, none = (replace(s, recompute=r) for r in ("full", "selective", "none"))
    runs(a, s, w)
    assume(a.layers >= 4 * s.pp)
    never_less(peak(a, full, w), peak(a, none, w))
    never_less(peak(a, selective, w), peak(a, none, w))

@quick
@given(architectures(), strategies(), WORKLOADS)
def test_sharding(a, s, w):
    "The states; buffers of a stage may cost more than it saves."
    s = replace(s, states_only=True, offload="none", optimizer_in_backward=False, pp=1, vpp=1)
    runs(a, s, w)
    sizes = [peak(a, replace(s, zero=z, framework="fsdp"), w) for z in (3, 2, 1, 0)]
    for less, more in zip(sizes, sizes[1:]): never_less(less, more)
    for z in (1, 2, 3): never_less(peak(a, replace(s, zero=z, dp=2 * s.dp), w), peak(a, replace(s, zero=z), w))

@quick
@given(architectures(), strategies(), WORKLOADS)
def test_offloading(a, s, w):
    for more, less in (("none", "optimizer"), ("optimizer", "parameters"), ("none", "activations")):
        with_, without = replace(s, offload=less), replace(s, offload=more)
        if refusal(a, with_, w) or refusal(a, without, w): continue
        never_less(peak(a, with_, w), peak(a, without, w))

@quick
@given(architectures(), strategies(), WORKLOADS)
def test_splitting_splits_the_states(a, s, w):
    s = replace(s, states_only=True)
    runs(a, s, w)
    for wide in (replace(s, tp=2 * s.tp), replace(s, ep=2 * s.ep), replace(s, cp=2 * s.cp)):
        if refusal(a, wide, w): continue
        never_less(peak(a, wide, w), peak(a, s, w))

@quick
@given(architectures(), strategies(), WORKLOADS)
def test_tensor_parallel_activations(a, s, w):
    s = replace(s, loss="full", async_tp=False, pp=1, vpp=1)
    wide = replace(s, tp=2 * s.tp)
    runs(a, s, w); runs(a, wide, w)
    f, g = (estimate(a, x, w, advice=False).timeline["forward" if not s.inference else "prefill"]["activations"] for x in (s, wide))
    never_less(g, f)

@quick
@given(architectures(), strategies(), WORKLOADS)
def test_all_ranks_together_hold_every_parameter_once_or_more(a, s, w):
    runs(a, s, w)
    assume(s.pp <= 2 and s.framework == "fsdp")
    held = sum(share(a, s, w, stage).parameters for stage in stages(a, s)) * s.tp
    copies = [share(a, s, w, stage) for stage in stages(a, s)]
    experts = sum(x.layers * x.expert for x in copies) * s.tp
    assert held + experts * (s.ep - 1) >= a.parameters * (1 - 1e-9)
    for x in copies: assert sharded(x, s) <= x.parameters * (1 + 1e-9)

@quick
@given(architectures(), st.sampled_from([1, 2, 4]), st.sampled_from([1000, 4000]))
def test_a_longer_cache(a, tp, tokens):
    s = Strategy(inference=True, tp=tp)
    w = [Workload(4096, 1, kv_cache_tokens=t) for t in (tokens, 2 * tokens)]
    runs(a, s, w[0])
    never_less(peak(a, s, w[0]), peak(a, s, w[1]))

@quick
@given(architectures(), strategies(), WORKLOADS)
def test_fewer_bytes_an_element(a, s, w):
    "Except where eager PyTorch holds a copy in 16 bits beside the one in 32: of logits and of attention's probabilities."
    s = replace(s, base_weights=None, loss="fused", attention="flash")
    runs(a, s, w)
    never_less(peak(a, replace(s, precision="bf16"), w), peak(a, replace(s, precision="fp32"), w))

@quick
@given(architectures(), strategies(), WORKLOADS)
def test_optimizers_with_less_to_remember(a, s, w):
    runs(a, s, w)
    none, lion, adamw = (peak(a, replace(s, optimizer=o), w) for o in ("none", "lion", "adamw"))
    never_less(none, lion); never_less(lion, adamw)

def test_the_tests_see_something():
    "The random models and strategies are not all refused."
    counted = []
    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(architectures(), strategies(), WORKLOADS)
    def look(a, s, w): counted.append(refusal(a, s, w) is None)
    look()
    assert sum(counted) > 15
