"""GGUF files as MODEL: bytes from their own header, whatever the types; damaged files end in a sentence."""
import json
import random
import struct
import subprocess
import sys

import pytest

from fsdl_devinfra.core.errors import BadInput, CheckError
from fsdl_devinfra.memory import Architecture
from fsdl_devinfra.hub.header import GGUF_TYPES
from fsdl_devinfra.memory.gguf import GgufTensor, gguf_files, is_gguf, read_gguf
from fsdl_devinfra.memory.serving import ServeOptions, serve, weight_bytes

KEYS = {"general.architecture": "llama", "llama.block_count": 2, "llama.embedding_length": 512, "llama.feed_forward_length": 1024,
        "llama.attention.head_count": 8, "llama.attention.head_count_kv": 2, "llama.context_length": 2048,
        "tokenizer.ggml.tokens": ["a", "b"], "llama.rope.freq_base": 1e6}
BLOCK = {"attn_q": (512, 512), "attn_k": (128, 512), "attn_v": (128, 512), "attn_output": (512, 512), "ffn_gate": (1024, 512),
         "ffn_up": (1024, 512), "ffn_down": (512, 1024)}
EXPERTS = {"ffn_gate_exps": (8, 256, 512), "ffn_up_exps": (8, 256, 512), "ffn_down_exps": (8, 512, 256), "ffn_gate_inp": (8, 512)}
#: bits a weight as llama.cpp's documentation prints them
BITS = {"Q4_0": 4.5, "Q4_1": 5.0, "Q5_0": 5.5, "Q5_1": 6.0, "Q8_0": 8.5, "Q2_K": 2.625, "Q3_K": 3.4375, "Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625,
        "IQ1_S": 1.5625, "IQ1_M": 1.75, "IQ2_XXS": 2.0625, "IQ2_XS": 2.3125, "IQ2_S": 2.5625, "IQ3_XXS": 3.0625, "IQ3_S": 3.4375,
        "IQ4_NL": 4.5, "IQ4_XS": 4.25, "TQ1_0": 1.6875, "TQ2_0": 2.0625, "MXFP4": 4.25, "NVFP4": 4.5}


def text(words):
    return struct.pack("<Q", len(words.encode())) + words.encode()


def value(said):
    if isinstance(said, str): return struct.pack("<I", 8) + text(said)
    if isinstance(said, float): return struct.pack("<If", 6, said)
    if isinstance(said, list): return struct.pack("<IIQ", 9, 8, len(said)) + b"".join(map(text, said))
    return struct.pack("<II", 4, said)


def tensors(number=12, head=True, experts=False):
    found = [("token_embd.weight", number, (1000, 512)), ("output_norm.weight", 0, (512,))] + [("output.weight", 14, (1000, 512))] * head
    for layer in range(2):
        matrices = {k: v for k, v in BLOCK.items() if not (experts and k.startswith("ffn"))} | (EXPERTS if experts else {})
        found += [(f"blk.{layer}.{name}.weight", number, shape) for name, shape in matrices.items()]
        found += [(f"blk.{layer}.{name}.weight", 0, (512,)) for name in ("attn_norm", "ffn_norm")]
    return found


def write(path, keys=KEYS, held=None):
    held = tensors() if held is None else held
    body = b"GGUF" + struct.pack("<IQQ", 3, len(held), len(keys)) + b"".join(text(k) + value(v) for k, v in keys.items())
    for name, number, shape in held:
        body += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), number, 0)
    path.write_bytes(body)
    return path


def run(*words):
    found = subprocess.run([sys.executable, "-m", "fsdl_devinfra", "memory", *map(str, words), "--json"], capture_output=True, text=True)
    return found.returncode, json.loads(found.stdout), found.stderr


@pytest.mark.parametrize("name", BITS)
def test_bits_of_every_type(name):
    kind = next(t for t in GGUF_TYPES.values() if t.name == name)
    assert 8 * kind.size / kind.block == BITS[name]


@pytest.mark.parametrize("number", GGUF_TYPES)
def test_weights_of_every_type_are_the_bytes_of_the_file(tmp_path, number):
    path = write(tmp_path / "m.gguf", held=tensors(number))
    held = sum(t.bytes for t in read_gguf(path)[1])
    assert weight_bytes(Architecture.from_gguf(path), ServeOptions("llama.cpp")) == pytest.approx(held, abs=2)


def test_rows_are_whole_blocks():
    assert GgufTensor("x", GGUF_TYPES[2], (3, 40)).bytes == 3 * 2 * 18


def test_experts_and_heads(tmp_path):
    keys = KEYS | {"llama.expert_count": 8, "llama.expert_used_count": 2}
    a = Architecture.from_gguf(write(tmp_path / "moe.gguf", keys, tensors(experts=True)))
    assert (a.experts, a.experts_per_token, a.parts.expert) == (8, 2, 2 * 3 * 8 * 256 * 512)
    assert not a.tied and Architecture.from_gguf(write(tmp_path / "tied.gguf", held=tensors(head=False))).tied
    tied = Architecture.from_gguf(tmp_path / "tied.gguf")
    assert tied.parts.head == 0 and tied.parameters == a.parameters - a.parts.expert - a.parts.head - 2 * 8 * 512 + 2 * 3 * 512 * 1024


def test_cache_of_a_file_is_that_of_its_config(tmp_path):
    found, _ = serve(Architecture.from_gguf(write(tmp_path / "m.gguf")), ServeOptions("llama.cpp", max_model_len=1024))
    assert found.kv_bytes_per_token == 2 * 2 * 2 * 64 * 2


def test_split_files_and_folders(tmp_path):
    held = tensors()
    write(tmp_path / "m-00001-of-00002.gguf", held=held[:4])
    write(tmp_path / "m-00002-of-00002.gguf", {"split.no": 1}, held[4:])
    write(tmp_path / "mmproj-m.gguf")
    whole = Architecture.from_gguf(write(tmp_path / "whole" if (tmp_path / "whole").mkdir() else tmp_path / "whole" / "m.gguf"))
    assert Architecture.from_gguf(tmp_path).parameters == Architecture.from_gguf(tmp_path / "m-00002-of-00002.gguf").parameters == whole.parameters
    assert is_gguf(tmp_path) and len(gguf_files(tmp_path)) == 2
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(BadInput, match="1 of 2 parts"): Architecture.from_gguf(tmp_path)


def test_a_folder_with_a_config_is_no_gguf_model(tmp_path):
    write(tmp_path / "m.gguf")
    (tmp_path / "config.json").write_text("{}")
    assert not is_gguf(tmp_path)


def test_command(tmp_path):
    path = write(tmp_path / "m.gguf")
    code, found, _ = run(path, "--serve", "llama.cpp", "--max-model-len", 1024, "--gpu", "rtx-4090")
    assert code == 0 and found["fits"] == "yes" and found["model"]["source"] == "headers"
    assert found["serving"]["weights_bytes"] == pytest.approx(sum(t.bytes for t in read_gguf(path)[1]), abs=2)
    assert any("GGUF, Q4_K" in note for note in found["assumptions"])
    assert run(tmp_path, "--inference")[1]["model"] == run(path, "--inference")[1]["model"] | {"name": str(tmp_path)}
    path.write_bytes(path.read_bytes()[:200])
    code, found, _ = run(path, "--inference")
    assert code == 2 and found["hint"]


def test_every_damage_ends_in_a_sentence(tmp_path):
    good, chance = write(tmp_path / "good.gguf").read_bytes(), random.Random(3)
    assert isinstance(Architecture.from_gguf(tmp_path / "good.gguf"), Architecture)
    for _ in range(300):
        data = bytearray(good[:chance.randrange(len(good))] if chance.random() < 0.4 else good)
        for _ in range(chance.randrange(1, 6)):
            if data: data[chance.randrange(len(data))] = chance.randrange(256)
        (tmp_path / "bad.gguf").write_bytes(data)
        try: Architecture.from_gguf(tmp_path / "bad.gguf")
        except CheckError: pass


def test_from_model_reads_a_file_too(tmp_path):
    file = write(tmp_path / "m.gguf")
    assert Architecture.from_model(str(file)) == Architecture.from_gguf(file)
    with pytest.raises(BadInput, match="the name of the model is empty"): Architecture.from_model(" ")
