"""The official client and Transformers against our server, and on what we pulled."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fsdl_devinfra.hub.locks import lock
from fsdl_devinfra.hub.pulling import pull
from fsdl_devinfra.hub.server import LoopbackHub

OFFICIAL = """
import sys, huggingface_hub as h
from huggingface_hub import errors as e
api, repo = h.HfApi(), "org/plain"
folder = h.snapshot_download(repo)
info = api.model_info(repo, files_metadata=True)
assert folder.endswith(info.sha) and all(s.size is not None for s in info.siblings)
assert h.snapshot_download(repo, revision=info.sha) == folder
meta = api.get_safetensors_metadata(repo)
print("tensors", sum(len(f.tensors) for f in meta.files_metadata.values()), "sharded", meta.sharded)
names = [s.rfilename for s in info.siblings]
assert sorted(f.path for f in api.list_repo_tree(repo, recursive=True) if isinstance(f, h.hf_api.RepoFile)) == sorted(names)
assert [p.path for p in api.get_paths_info(repo, names[:2])] == names[:2]
assert api.list_repo_refs(repo).branches[0].target_commit == info.sha
assert api.list_repo_commits(repo)[0].commit_id == info.sha
if hasattr(api, "verify_repo_checksums"): print("verified", api.verify_repo_checksums(repo).mismatches)
def raises(kind, function):
    try: function()
    except kind: return
    raise SystemExit(f"{kind.__name__} was not raised")
raises(e.EntryNotFoundError, lambda: h.hf_hub_download(repo, "none.json"))
raises(e.RevisionNotFoundError, lambda: h.hf_hub_download(repo, "config.json", revision="v9"))
raises(e.RepositoryNotFoundError, lambda: api.model_info("org/none"))
raises(e.GatedRepoError, lambda: h.hf_hub_download("org/gated", "config.json"))
raises(e.EntryNotFoundError, lambda: h.hf_hub_download(repo, "..%2f..%2fetc%2fpasswd"))
"""
TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **({"revision": sys.argv[2]} if len(sys.argv) > 2 else {})).eval()
print("logits", [round(v, 4) for v in model(torch.arange(8)[None]).logits[0, -1, :4].tolist()])
"""


def python(code: str, *args: str, **env: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *args], env=os.environ | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"} | env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return "\n".join(line for line in done.stdout.splitlines() if line.startswith(("logits", "tensors", "verified")))


def write_shards(folder: Path, shards: int = 4) -> None:
    """A sharded safetensors repository by hand."""
    folder.mkdir(parents=True); weight_map = {}
    for i in range(1, shards + 1):
        name, tensor = f"model-{i:05}-of-{shards:05}.safetensors", f"layers.{i}.weight"; weight_map[tensor] = name
        text = json.dumps({tensor: {"dtype": "F32", "shape": [64, 64], "data_offsets": [0, 16384]}}).encode()
        (folder / name).write_bytes(len(text).to_bytes(8, "little") + text + os.urandom(16384))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 16384 * shards}, "weight_map": weight_map}))
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128}')


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    shelf = tmp_path_factory.mktemp("shelf")
    write_shards(shelf / "org" / "plain"); (shelf / "org" / "gated").mkdir(); (shelf / "org" / "gated" / "config.json").write_text("{}")
    return shelf


@pytest.fixture(scope="module")
def llama(shelf) -> Path:
    transformers = pytest.importorskip("transformers"); import torch
    torch.manual_seed(0)
    config = transformers.LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=128)
    transformers.LlamaForCausalLM(config).save_pretrained(shelf / "org" / "llama", max_shard_size="200KB")
    assert len(list((shelf / "org" / "llama").glob("*.safetensors"))) > 2
    return shelf / "org" / "llama"


@pytest.fixture(params=[True, False], ids=["redirected", "direct"])
def hub(shelf, tmp_path, monkeypatch, request):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE"): monkeypatch.delenv(name, raising=False)
    with LoopbackHub(shelf, redirect=request.param, page=3, tokens={"org/gated": "hf_other"}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def test_the_official_client_is_served_whole(hub):
    assert python(OFFICIAL).startswith("tensors 4 sharded True")
    assert not [s for s in hub.seen if s.status >= 500]


@pytest.mark.slow
def test_transformers_is_served_and_loads_offline_what_we_pulled(llama, hub, shelf, tmp_path, monkeypatch):
    here = python(TRANSFORMERS, str(shelf / "org" / "llama"))
    assert here == python(TRANSFORMERS, "org/llama", HF_HOME=str(tmp_path / "theirs"))
    locked = lock("org/llama"); pull(locked); asked = len(hub.seen)
    assert here == python(TRANSFORMERS, "org/llama", locked.commit, HF_HUB_OFFLINE="1")
    assert len(hub.seen) == asked
    pull("org/llama")
    assert here == python(TRANSFORMERS, "org/llama", HF_HUB_OFFLINE="1")


@pytest.mark.slow
def test_a_pulled_cache_can_be_served_in_turn(llama, hub, shelf, tmp_path, monkeypatch):
    if not hub.blob_url: pytest.skip("once is enough")
    locked = lock("org/llama"); pull(locked)
    with LoopbackHub(tmp_path / "home" / "hub") as second:
        monkeypatch.setenv("HF_ENDPOINT", second.url)
        assert lock("org/llama").to_json() == locked.to_json()
        assert python(TRANSFORMERS, "org/llama", HF_HOME=str(tmp_path / "third")) == python(TRANSFORMERS, str(shelf / "org" / "llama"))


def test_no_path_leaves_the_shelf(hub, shelf):
    import http.client
    (shelf.parent / "secret.txt").write_text("secret"); link = shelf / "org" / "plain" / "link.txt"
    link.symlink_to(shelf.parent / "secret.txt")
    try:
        host, port = hub.url.removeprefix("http://").split(":")
        for path in ("/org/plain/resolve/main/../../../secret.txt", "/org/plain/resolve/main/%2e%2e/%2e%2e/%2e%2e/secret.txt", "/org/plain/resolve/main/..%2f..%2f..%2fsecret.txt",
                     "/blobs/org/plain/main/../../../../secret.txt", "/org/../secret.txt", "/org/plain/resolve/main/link.txt", "//secret.txt", "/org/plain/resolve/main//etc/passwd",
                     "/api/models/org/plain/tree/main/..%2f..", "/api/models/..%2f/llama"):
            connection = http.client.HTTPConnection(host, int(port), timeout=10)
            connection.putrequest("GET", path, skip_host=False); connection.endheaders()
            reply = connection.getresponse(); body = reply.read(); connection.close()
            assert reply.status >= 400 and b"secret" not in body.replace(b"secret.txt", b""), path
    finally: link.unlink()


@pytest.mark.parametrize("header", ["bytes=0-", "bytes=-5", "bytes=5-9", "bytes=999999-", "bytes=9-5", "bytes=0-1,3-4", "lines=1-2", "bytes=abc"])
def test_ranges(hub, shelf, header):
    import http.client
    data = (shelf / "org" / "plain" / "config.json").read_bytes()
    host, port = hub.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    connection.request("GET", "/org/plain/resolve/main/config.json", headers={"Range": header}); reply = connection.getresponse(); body = reply.read()
    expected = {"bytes=0-": (206, data), "bytes=-5": (206, data[-5:]), "bytes=5-9": (206, data[5:10]), "bytes=999999-": (416, b"")}
    assert (reply.status, body) == expected.get(header, (200, data))
