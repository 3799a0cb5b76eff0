"""Captures that are damaged, differences factor by factor and in pairs, and machines on which programs hang or lie."""
import copy
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fsdl_devinfra.core.errors import BadInput
from fsdl_devinfra.env import capture
from fsdl_devinfra.env.difference import diff
from fsdl_devinfra.env.environment import Environment
from fsdl_devinfra.env.rules import EFFECTS

GPU = {"name": "NVIDIA H100 80GB HBM3", "compute_capability": "9.0", "multiprocessors": 132, "power_limit_w": 700}
OLDER_GPU = GPU | {"name": "NVIDIA A100-SXM4-80GB", "compute_capability": "8.0", "multiprocessors": 108}
BASE = {'schema': 'fsdl-devinfra/env/1',
 'digest': '000000000000',
 'captured_at': '2026-01-01T00:00:00Z',
 'made_by': '0.1',
 'machine': {'os': 'Ubuntu 24.04',
             'kernel': '6.8',
             'architecture': 'x86_64',
             'libc': 'glibc 2.39',
             'cpu': {'model': 'EPYC', 'vendor': 'AuthenticAMD', 'usable': 16, 'flags': ['avx2', 'fma']},
             'memory_bytes': 274877906944},
 'accelerators': {'driver': '570.86.15',
                  'driver_supports_cuda': '12.8',
                  'gpus': [GPU,
                           GPU],
                  'topology': {'0-1': 'NVLink'}},
 'libraries': {'torch': {'version': '2.12.1+cu128', 'cuda': '12.8', 'commit': 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa'},
               'wheels': {'nvidia-cudnn-cu12': '9.1.0', 'nvidia-cublas-cu12': '12.8.4'},
               'loaded': {'cudnn': 'libcudnn.so.9', 'openblas': 'libopenblas.so.0'},
               'versions': {'blas': 'oneAPI Math Kernel Library Version 2024', 'nccl': '2.27.3', 'cudnn': '91002'}},
 'python': {'version': '3.12.4', 'implementation': 'cpython', 'argv': ['python', 't.py'], 'manager': 'pip'},
 'packages': {'torch': {'version': '2.12.1+cu128', 'record': 'r1'},
              'numpy': {'version': '2.3.1'},
              'requests': {'version': '2.32'},
              'nvidia-cudnn-cu12': {'version': '9.1.0'}},
 'numerics': {'origin': 'observed',
              'settings': {'threads': 16,
                           'cpu_capability': 'AVX512',
                           'allow_tf32.matmul': False,
                           'allow_tf32.cudnn': True,
                           'matmul_precision': 'highest',
                           'fp32_precision.cuda.matmul': 'none',
                           'cudnn.benchmark': False,
                           'cudnn.deterministic': False,
                           'cudnn.enabled': True,
                           'deterministic_algorithms': False,
                           'seed': 42,
                           'default_dtype': 'float32',
                           'interop_threads': 16}},
 'variables': {},
 'source': {'commit': 'cccccccccccccccccccccccccccccccccccccccc', 'branch': 'main', 'dirty': False}}
#: one factor → (where it stands, its other value, its effect)
FACTORS = {
    'threads': (('numerics', 'settings', 'threads'), 8, 'numerics'),
    'OMP': (('variables', 'OMP_NUM_THREADS'), '8', 'record'),
    'OPENBLAS': (('variables', 'OPENBLAS_NUM_THREADS'), '8', 'numerics'),
    'cap': (('numerics', 'settings', 'cpu_capability'), 'AVX2', 'numerics'),
    'tf32': (('numerics', 'settings', 'allow_tf32.matmul'), True, 'numerics'),
    'matmul': (('numerics', 'settings', 'matmul_precision'), 'medium', 'numerics'),
    'bench': (('numerics', 'settings', 'cudnn.benchmark'), True, 'numerics'),
    'det': (('numerics', 'settings', 'cudnn.deterministic'), True, 'numerics'),
    'detalg': (('numerics', 'settings', 'deterministic_algorithms'), True, 'numerics'),
    'cublas': (('variables', 'CUBLAS_WORKSPACE_CONFIG'), ':4096:8', 'numerics'),
    'driver minor': (('accelerators', 'driver'), '570.124.06', 'performance'),
    'driver major': (('accelerators', 'driver'), '580.65', 'performance'),
    'blas': (('libraries', 'versions', 'blas'), 'OpenBLAS 0.3.27', 'numerics'),
    'nccl': (('libraries', 'versions', 'nccl'), '2.28', 'numerics'),
    'openblas file': (('libraries', 'loaded', 'openblas'), 'libopenblas.so.1', 'numerics'),
    'mkl loaded': (('libraries', 'loaded', 'mkl_core'), 'libmkl_core.so.2', 'numerics'),
    'torch minor': (('packages', 'torch', 'version'), '2.13.0+cu128', 'numerics'),
    'torch patch': (('packages', 'torch', 'version'), '2.12.2+cu128', 'numerics'),
    'torch local': (('packages', 'torch', 'version'), '2.12.1+cpu', 'numerics'),
    'numpy': (('packages', 'numpy', 'version'), '2.4.0', 'numerics'),
    'hashseed': (('variables', 'PYTHONHASHSEED'), '0', 'numerics'),
    'nccl algo': (('variables', 'NCCL_ALGO'), 'Tree', 'numerics'),
    'nccl proto': (('variables', 'NCCL_PROTO'), 'LL', 'numerics'),
    'autocast env': (('variables', 'ACCELERATE_MIXED_PRECISION'), 'bf16', 'numerics'),
    'accel dynamo': (('variables', 'ACCELERATE_DYNAMO_BACKEND'), 'INDUCTOR', 'numerics'),
    'accel other': (('variables', 'ACCELERATE_DEBUG_MODE'), '1', 'record'),
    'fsdp': (('variables', 'FSDP_SHARDING_STRATEGY'), '1', 'performance'),
    'torch_compile disable': (('variables', 'TORCH_COMPILE_DISABLE'), '1', 'numerics'),
    'PYTORCH_JIT': (('variables', 'PYTORCH_JIT'), '0', 'performance'),
    'PYTORCH_NVFUSER': (('variables', 'PYTORCH_NVML_BASED_CUDA_CHECK'), '1', 'performance'),
    'TORCH_CUDNN_V8': (('variables', 'TORCH_CUDNN_V8_API_DISABLED'), '1', 'numerics'),
    'TORCH_LOGS': (('variables', 'TORCH_LOGS'), '+dynamo', 'record'),
    'NVTF32': (('variables', 'NVIDIA_TF32_OVERRIDE'), '0', 'numerics'),
    'container': (('container',), {'kind': 'docker'}, 'record'),
    'limits': (('container',), {'limits': {'memory_bytes': 8589934592}}, 'performance'),
    'locale': (('variables', 'LC_ALL'), 'de_DE.UTF-8', 'record'),
    'kernel': (('machine', 'kernel'), '6.9', 'record'),
    'libc': (('machine', 'libc'), 'glibc 2.28', 'numerics'),
    'cpu model same vendor': (('machine', 'cpu', 'model'), 'EPYC 2', 'performance'),
    'py patch': (('python', 'version'), '3.12.9', 'record'),
    'py minor': (('python', 'version'), '3.13.0', 'numerics'),
    'unknown pkg': (('packages', 'zzz'), {'version': '1'}, 'numerics'),
    'seed': (('numerics', 'settings', 'seed'), 43, 'numerics'),
    'dtype': (('numerics', 'settings', 'default_dtype'), 'float64', 'numerics'),
    'interop': (('numerics', 'settings', 'interop_threads'), 2, 'performance'),
    'numpy invalid': (('packages', 'numpy', 'version'), 'unknown-version', 'numerics'),
    'cudnn wheel': (('packages', 'nvidia-cudnn-cu12', 'version'), '9.5.0', 'numerics'),
    'topology': (('accelerators', 'topology'), {'0-1': 'SYS'}, 'numerics'),
    'argv': (('python', 'argv'), ['python', 'u.py'], 'numerics'),
    'CUDA_VISIBLE': (('variables', 'CUDA_VISIBLE_DEVICES'), '0', 'numerics'),
    'alloc conf': (('variables', 'PYTORCH_CUDA_ALLOC_CONF'), 'expandable_segments:True', 'performance'),
    'TOKPAR': (('variables', 'TOKENIZERS_PARALLELISM'), 'false', 'performance'),
    'NCCL_NVLS': (('variables', 'NCCL_NVLS_ENABLE'), '0', 'numerics'),
    'KMP det': (('variables', 'KMP_DETERMINISTIC_REDUCTION'), '1', 'record'),
    'branch': (('source', 'branch'), 'dev', 'record'),
    'commit': (('source', 'commit'), 'dddddddddddddddddddddddddddddddddddddddd', 'numerics'),
    'XLA': (('variables', 'XLA_FLAGS'), '--x', 'numerics'),
    'JAX': (('variables', 'JAX_ENABLE_X64'), '1', 'numerics'),
    'MKL_CBWR': (('variables', 'MKL_CBWR'), 'COMPATIBLE', 'numerics'),
    'NUMEXPR': (('variables', 'NUMEXPR_NUM_THREADS'), '1', 'performance'),
    'TORCHINDUCTOR_CACHE_DIR': (('variables', 'TORCHINDUCTOR_CACHE_DIR'), '/x', 'record'),
    'TRITON_CACHE_DIR': (('variables', 'TRITON_CACHE_DIR'), '/x', 'record'),
    'CUDNN_LOGDEST': (('variables', 'CUDNN_LOGDEST_DBG'), 'stdout', 'record'),
    'TORCH_NCCL': (('variables', 'TORCH_NCCL_BLOCKING_WAIT'), '1', 'performance'),
    'TF32DNNL': (('variables', 'ONEDNN_VERBOSE'), '1', 'record'),
    "gpu model": (("accelerators", "gpus"), [OLDER_GPU] * 2, "numerics"),
    "gpu count": (("accelerators", "gpus"), [GPU], "numerics"),
    "gpu power": (("accelerators", "gpus"), [GPU | {"power_limit_w": 350}] * 2, "performance"),
}


def changed(*names):
    document = copy.deepcopy(BASE)
    for name in names:
        *above, last = FACTORS[name][0]
        place = document
        for key in above: place = place[key]
        place[last] = FACTORS[name][1]
    return Environment.from_dict(document)


def judged(found):
    return [(d.field, d.effect, d.why) for d in found.differences]


def ranked(found):
    effects = [EFFECTS.index(d.effect) for d in found.differences]
    return effects == sorted(effects)


@pytest.mark.parametrize("name", FACTORS)
def test_one_factor_has_its_effect_both_ways(name):
    there, back = diff(changed(), changed(name)), diff(changed(name), changed())
    assert there.differences[0].effect == FACTORS[name][2]
    assert judged(there) == judged(back) and [(d.left, d.right) for d in there.differences] == [(d.right, d.left) for d in back.differences]
    assert there.verdict == back.verdict == ("same" if FACTORS[name][2] == "record" else "differs")
    assert ranked(there) and all(d.why for d in there.differences)
    assert diff(changed(name), changed(name)).differences == []


def test_two_factors_are_both_named():
    alone = {name: {d.field for d in diff(changed(), changed(name)).differences} for name in FACTORS}
    for one, two in itertools.combinations(FACTORS, 2):
        if FACTORS[one][0] == FACTORS[two][0]: continue
        if "CUDA_VISIBLE" in (one, two) and {one, two} & {"gpu model", "gpu count", "gpu power", "topology"}: continue  # it picks among them
        found = diff(changed(), changed(one, two))
        assert ranked(found) and alone[one] | alone[two] <= {d.field for d in found.differences}, (one, two)


# ---- damaged captures
DAMAGED = {
    "empty": b"", "text": b"hello", "list": b"[]", "null": b"null", "binary": bytes(range(256)), "too deep": b"[" * 100_000, "cut off": json.dumps(BASE).encode()[:500],
    "another schema": json.dumps(BASE | {"schema": "fsdl-devinfra/env/2"}).encode(), "another noun": json.dumps(BASE | {"schema": "fsdl-devinfra/plan/1"}).encode(),
    "no digest": json.dumps({k: v for k, v in BASE.items() if k != "digest"}).encode(),
    **{f"{k} is {v!r}": json.dumps(BASE | {k: v}).encode() for k, v in {"machine": [1], "packages": ["a"], "source": "x", "missing": ["a"], "numerics": {"settings": [1]}}.items()},
    "package is text": json.dumps(BASE | {"packages": {"a": "1.0"}}).encode(), "gpus are text": json.dumps(BASE | {"accelerators": {"gpus": "none"}}).encode(),
    "gpus are numbers": json.dumps(BASE | {"accelerators": {"gpus": [1]}}).encode(), "fingerprint is a number": json.dumps(BASE | {"fingerprint": {"cpu": 3}}).encode(),
}
READABLE = {
    "byte order mark": b"\xef\xbb\xbf" + json.dumps(BASE).encode(), "Windows": json.dumps(BASE, indent=1).replace("\n", "\r\n").encode(), "UTF-16": json.dumps(BASE).encode("utf-16"),
    "a field of the future": json.dumps(BASE | {"brand_new": 1}).encode(), "an older one": json.dumps({k: v for k, v in BASE.items() if k not in ("source", "variables")}).encode(),
    "null blocks": json.dumps(BASE | {"container": None}).encode(), "half a character": json.dumps(BASE | {"python": {"version": "3.12.4\ud800"}}).encode(),
    "60 MB": json.dumps(BASE | {"source": {"diff": "x" * 60_000_000}}).encode(),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_capture_is_one_sentence(kind, tmp_path):
    (tmp_path / "a.json").write_bytes(DAMAGED[kind])
    with pytest.raises(BadInput) as caught: Environment.load(tmp_path / "a.json")
    assert caught.value.hint and "__init__" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", READABLE)
def test_readable_capture_is_read(kind, tmp_path):
    (tmp_path / "a.json").write_bytes(READABLE[kind])
    str(diff(Environment.load(tmp_path / "a.json"), changed())).encode()


# ---- odd places
COMMAND = str(Path(sys.executable).parent / "fsdl-devinfra")


def captured(cwd, **variables):
    start = time.perf_counter()
    done = subprocess.run([COMMAND, "env", "capture", "--json"], cwd=cwd, env={k: v for k, v in (os.environ | variables).items() if v is not None}, capture_output=True, timeout=60)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    return json.loads(done.stdout), time.perf_counter() - start


def program(folder, name, script):
    (folder / name).write_text("#!/bin/sh\n" + script + "\n")
    (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_programs_that_hang_cost_five_seconds(tmp_path):
    program(tmp_path, "git", "sleep 60 & sleep 60")
    document, seconds = captured(tmp_path, PATH=program(tmp_path, "nvidia-smi", "sleep 60"))
    assert seconds < 12 and "does not answer" in document["missing"]["source"]
    assert document["accelerators"].get("gpus") or "nvidia-smi" in document["missing"]["accelerators"]


@pytest.mark.parametrize("variables", [{"HOME": None}, {"HOME": "/nope"}, {"PATH": ""}, {"HF_HOME": "~nobody-at-all/x"}, {"HF_X": "\udcff\udcfe"}, {"LC_ALL": "C", "PYTHONUTF8": "0"},
                                       {"OMP_NUM_THREADS": "-1,x", "MKL_NUM_THREADS": "9" * 40}], ids=str)
def test_odd_variables_do_no_harm(variables, tmp_path):
    document, _ = captured(tmp_path, **variables)
    assert document["packages"] and document["machine"]


def test_broken_metadata_takes_nothing_along(tmp_path):
    def metadata(name, **files):
        (tmp_path / f"{name}.dist-info").mkdir()
        for file, content in files.items(): (tmp_path / f"{name}.dist-info" / file.replace("__", ".")).write_text(content)
    metadata("nothing-1.0"); metadata("invalid-not.a.version!", METADATA="Version: not a version!\n"); metadata("nameless"); metadata("-2.0")
    for i, direct in enumerate(("[1, 2]", '{"url": 3, "dir_info": "x", "vcs_info": "y"}', '{"url": null, "archive_info": {"hash": 5}}', "[" * 50_000, '{"url": "file://[", "dir_info": {"editable": true}}')):
        metadata(f"direct{i}-1.0", direct_url__json=direct)
    (tmp_path / "folder-1.0.dist-info/RECORD").mkdir(parents=True)
    (tmp_path / "loop-1.0.dist-info").symlink_to("loop-1.0.dist-info")
    document, _ = captured(tmp_path, PYTHONPATH=str(tmp_path))
    assert "packages" not in document["missing"] and {"nothing", "invalid", "direct3", "direct4", "folder", "pip"} <= set(document["packages"])


def test_deleted_folder(tmp_path):
    script = f"cd {tmp_path} && mkdir gone && cd gone && rmdir ../gone && exec {COMMAND} env capture --json"
    done = subprocess.run(["sh", "-c", script], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert {"source", "python"} <= set(json.loads(done.stdout)["missing"])


def test_a_thousand_packages(tmp_path):
    for i in range(1000):
        folder = tmp_path / f"p{i}-1.{i}.dist-info"; folder.mkdir()
        (folder / "METADATA").write_text(f"Name: p{i}\nVersion: 1.{i}\n"); (folder / "RECORD").write_text("p/m.py,sha256=abc,10\n" * 40)
    document, seconds = captured(tmp_path, PYTHONPATH=str(tmp_path))
    assert len(document["packages"]) >= 1000 and seconds < 6


def test_repositories_in_every_state(tmp_path):
    def git(*args, cwd): subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *args], cwd=cwd, check=True, capture_output=True)
    def source(path): return capture(folder=path).source
    one = tmp_path / "one"; one.mkdir(); git("init", "-q", "-b", "main", cwd=one); (one / "m.py").write_text("a = 1\n")
    assert "commit" not in source(one)
    git("add", ".", cwd=one); git("commit", "-qm", "x", cwd=one); git("worktree", "add", "-q", "../two", cwd=one); git("clone", "-q", "--depth", "1", f"file://{one}", "three", cwd=tmp_path)
    commit = source(one)["commit"]
    assert source(tmp_path / "two")["commit"] == source(tmp_path / "three")["commit"] == commit
    git("checkout", "-q", "--detach", cwd=one)
    assert source(one)["commit"] == commit and "branch" not in source(one)
    os.mkfifo(one / "pipe.py"); (one / "loop.py").symlink_to("loop.py"); (one / "m.py").write_bytes(b"\xff\xfe\n"); Path(os.fsdecode(os.fsencode(one) + b"/\xff.py")).write_text("x")
    assert source(one)["dirty"] is True
    (one / ".git/HEAD").write_text("garbage")
    assert "source" in capture(folder=one).missing


def _committed(folder, **files):
    folder.mkdir(parents=True)
    git = ["git", "-c", "user.email=a@example.org", "-c", "user.name=a"]
    subprocess.run([*git, "init", "-q"], cwd=folder, check=True)
    for name, raw in files.items(): Path(folder, name).write_bytes(raw)
    subprocess.run([*git, "add", "-A"], cwd=folder, check=True)
    subprocess.run([*git, "commit", "-qm", "x"], cwd=folder, check=True)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="file names of any bytes")
def test_a_folder_whose_name_is_not_utf_8(tmp_path):
    from fsdl_devinfra.env.source import source
    folder = _committed(Path(os.fsdecode(os.fsencode(tmp_path) + b"/lat\xe9")), a=b"x\n")
    Path(os.fsdecode(os.fsencode(folder) + b"/f\xe9.py")).write_bytes(b"1")
    (folder / "a").write_bytes(b"y\xe9\n")
    found = source(folder)
    assert found["commit"] and found["dirty"] and "status_missing" not in found
    assert found["diff_beside"].encode("utf-8", "surrogateescape").count(b"y\xe9") == 1
    assert [set(u) for u in found["untracked"]] == [{"path", "size_bytes", "sha256"}]  # it was found, and hashed


def test_changes_in_other_bytes_are_other_changes(tmp_path):
    from fsdl_devinfra.env.packages import changes_of
    folder = _committed(tmp_path / "a", a=b"x\n")
    hashes = []
    for raw in (b"\xe8\n", b"\xe9\n", b"\xe8\n"):
        (folder / "a").write_bytes(raw)
        hashes.append(changes_of(folder))
    assert hashes[0] == hashes[2] != hashes[1]


def test_folders_of_no_package_are_none(tmp_path):
    for name in ("a-1", "-", "", "c d-1", "~b-1", "_d-1"): (tmp_path / f"{name}.dist-info").mkdir()
    from fsdl_devinfra.env.stamping import installed
    assert sorted(installed([str(tmp_path)])) == ["a"]


def test_an_archive_of_conda_on_one_line(tmp_path):
    from fsdl_devinfra.env.packages import conda_archives, conda_packages
    (tmp_path / "conda-meta").mkdir()
    said = {"build": "py_0", "md5": "0" * 32, "name": "demo", "url": "https://example.org/linux-64/demo-1.0-py_0.conda"}
    for indent in (None, 2):
        (tmp_path / "conda-meta/demo-1.0-py_0.json").write_text(json.dumps(said, indent=indent))
        assert conda_archives(tmp_path) == {"demo": said["url"] + "#" + "0" * 32}
    (tmp_path / "conda-meta/bad-1-0.json").write_bytes(b"\xff\xfe{")
    assert set(conda_archives(tmp_path)) == {"demo"} and set(conda_packages(tmp_path)) == {"demo", "bad"}
