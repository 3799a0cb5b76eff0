"""Which settings change bits, and does `env diff` say so? Every setting runs really, in a process of its own, on operators of torch and numpy.

A setting that changes bits and is not called numerics is a fault. One that changes none here and is called numerics is a false alarm, unless
another processor or a GPU would show it; those are listed with what the rules say.

Variables need a new process each, which costs an import of torch; settings made by code are forked from one process that has imported it.
Each row is printed as it is measured; after `--minutes` no further setting is started, and those that were not reached are named.

python tests/studies/env_bits.py --seed 1                                all settings, a quarter of an hour on two free cores
python tests/studies/env_bits.py --seed 1 --settings 90 --minutes 20
"""
import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

#: name → (variables, code that runs after torch is imported)
SETTINGS: dict[str, tuple[dict[str, str], str]] = {}
for line in """OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 OMP_DYNAMIC=true OMP_DYNAMIC=false OMP_SCHEDULE=dynamic OMP_PROC_BIND=true OMP_WAIT_POLICY=passive
    KMP_BLOCKTIME=0 KMP_AFFINITY=compact KMP_DETERMINISTIC_REDUCTION=true MKL_DYNAMIC=FALSE MKL_DYNAMIC=TRUE ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=COMPATIBLE MKL_CBWR=AVX2
    MKL_CBWR=AUTO MKL_ENABLE_INSTRUCTIONS=SSE4_2 MKL_ENABLE_INSTRUCTIONS=AVX2 MKL_DEBUG_CPU_TYPE=5 ONEDNN_MAX_CPU_ISA=SSE41 ONEDNN_MAX_CPU_ISA=AVX2 ONEDNN_MAX_CPU_ISA=DEFAULT
    ONEDNN_DEFAULT_FPMATH_MODE=BF16 ONEDNN_DEFAULT_FPMATH_MODE=STRICT ONEDNN_VERBOSE=0 OPENBLAS_CORETYPE=Haswell OPENBLAS_CORETYPE=Nehalem OPENBLAS_VERBOSE=0
    NPY_DISABLE_CPU_FEATURES=AVX512F,AVX512_SKX,X86_V4 NPY_DISABLE_CPU_FEATURES=AVX2,FMA3,X86_V3,X86_V4,AVX512F,AVX512_SKX GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX2,-FMA,-FMA4,-AVX512F GLIBC_TUNABLES=glibc.malloc.arena_max=2
    MALLOC_ARENA_MAX=1 PYTHONHASHSEED=0 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 TOKENIZERS_PARALLELISM=false CUDA_VISIBLE_DEVICES=0 CUBLAS_WORKSPACE_CONFIG=:4096:8 NVIDIA_TF32_OVERRIDE=0 NCCL_ALGO=Ring NCCL_DEBUG=INFO
    XLA_FLAGS=--xla_dump_to=/tmp/x JAX_PLATFORMS=cpu TRITON_PRINT_AUTOTUNING=1 TORCH_COMPILE_DEBUG=1 TORCHINDUCTOR_COMPILE_THREADS=1 CUBLASLT_LOG_LEVEL=1 ACCELERATE_MIXED_PRECISION=no WORLD_SIZE=1 RANK=0 LOCAL_RANK=0
    TORCH_LOGS=+dynamo TORCH_SHOW_CPP_STACKTRACES=1 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 HF_HUB_OFFLINE=1 TF_CPP_MIN_LOG_LEVEL=2 LC_ALL=C.UTF-8 TZ=UTC MPLBACKEND=agg
    VLLM_BATCH_INVARIANT=1 FLASH_ATTENTION_DETERMINISTIC=1 PYTORCH_TUNABLEOP_ENABLED=0 TORCHDYNAMO_DISABLE=0 CUDA_LAUNCH_BLOCKING=1 CUDNN_LOGLEVEL_DBG=0 MIOPEN_FIND_MODE=1 HIP_VISIBLE_DEVICES=0 GOMP_SPINCOUNT=0
    OMP_STACKSIZE=8M OMP_NESTED=false TORCH_NUM_THREADS=1 NUMEXPR_MAX_THREADS=1 NUMBA_NUM_THREADS=1 RAYON_NUM_THREADS=1
    OMP_THREAD_LIMIT=1 DNNL_MAX_CPU_ISA=AVX2 DNNL_DEFAULT_FPMATH_MODE=BF16 ONEDNN_CPU_ISA_HINTS=PREFER_YMM ONEDNN_PRIMITIVE_CACHE_CAPACITY=0 MKL_VERBOSE=0 OMP_PLACES=cores OMP_DISPLAY_ENV=false
    GOMP_CPU_AFFINITY=0 OMP_MAX_ACTIVE_LEVELS=1 LD_BIND_NOW=1 PYTHONOPTIMIZE=1 OPENBLAS_DYNAMIC=1 MKL_DOMAIN_NUM_THREADS=MKL_DOMAIN_ALL=1 BLIS_NUM_THREADS=1 VECLIB_MAXIMUM_THREADS=1
    XLA_FLAGS=--xla_cpu_enable_fast_math=true KMP_SETTINGS=0 PYTHONMALLOC=malloc MALLOC_TRIM_THRESHOLD_=0 MKL_CBWR=SSE4_2 MKL_CBWR=AVX512 GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX512F""".split():
    name, _, value = line.partition("=")
    SETTINGS[line] = ({name: value.replace(",", " ") if name.startswith("NPY") else value}, "")
for line in """set_num_threads(1)|set_num_interop_threads(1)|use_deterministic_algorithms(True)|use_deterministic_algorithms(True, warn_only=True)|set_flush_denormal(True)|set_default_dtype(t.float64)
set_default_dtype(t.bfloat16)|set_float32_matmul_precision("high")|set_float32_matmul_precision("medium")|backends.mkldnn.set_flags(False)|backends.mkldnn.set_flags(True, True)|backends.mkldnn.matmul.fp32_precision = "bf16"
backends.mkldnn.conv.fp32_precision = "bf16"|backends.cudnn.benchmark = True|backends.cudnn.deterministic = True|backends.cudnn.enabled = False|backends.cudnn.allow_tf32 = False|backends.cuda.matmul.allow_tf32 = True
backends.opt_einsum.enabled = False|backends.opt_einsum.strategy = "optimal"|backends.mha.set_fastpath_enabled(False)|set_autocast_enabled("cpu", True)|set_autocast_dtype("cpu", t.float16)|set_autocast_enabled("cuda", True)
set_default_device("cpu")|backends.cuda.enable_flash_sdp(False)|backends.cuda.enable_math_sdp(False)|backends.cuda.enable_mem_efficient_sdp(False)|backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False|manual_seed(1)|autograd.set_detect_anomaly(True)|utils.deterministic.fill_uninitialized_memory = False|set_warn_always(True)|set_printoptions(precision=3)
backends.cuda.preferred_blas_library("cublas")|jit.set_fusion_strategy([("DYNAMIC", 1)])|multiprocessing.set_sharing_strategy("file_system")|_C._jit_set_profiling_executor(False)|backends.nnpack.set_flags(False)""".replace("\n", "|").split("|"):
    SETTINGS["torch." + line] = ({}, "t." + line)

SHARD = Path(__file__).resolve()


def operators() -> dict:
    "Operators of torch and numpy on inputs from whole numbers, the same on every machine."
    import numpy as np
    import torch as t
    import torch.nn.functional as F
    from torch.optim.adamw import adamw
    from torch.optim.sgd import sgd

    def made(*shape: int, step: int = 7919, dtype=t.float32):
        count = int(np.prod(shape))
        return (((t.arange(count, dtype=t.int64) * step) % 65537).to(t.float64) / 32768.5 - 1).to(dtype).reshape(shape)

    x, y, image, kernel = made(64, 1000), made(300_001), made(2, 16, 32, 32), made(32, 16, 3, 3, step=7921)
    a, b, q = made(256, 512), made(512, 256, step=7921), made(2, 4, 128, 64)
    spd = made(64, 64).double() @ made(64, 64).double().T + 99 * t.eye(64, dtype=t.float64)
    module = t.nn.Module()
    with t.random.fork_rng(devices=[]):
        t.manual_seed(7)
        module.layer = t.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dtype=t.float32).eval()
        module.mha = t.nn.MultiheadAttention(64, 4, batch_first=True, dtype=t.float32).eval()
        module.lstm = t.nn.LSTM(32, 48, batch_first=True, dtype=t.float32).eval()
        module.gru = t.nn.GRU(32, 48, batch_first=True, dtype=t.float32).eval()

    def backward(function, value):
        value = value.clone().requires_grad_()
        return t.autograd.grad(function(value).float().square().mean(), value)[0]

    def stepped(step, states: int, **options):
        "One step by the function behind `torch.optim`: the class imports torch's compiler, which takes longer than all operators."
        weight = made(512, 64)
        momenta = [[t.zeros_like(weight)] for _ in range(states)]
        step([weight], [weight * 0.1], *momenta, foreach=False, **options)
        return weight

    def in_eval(function):
        with t.inference_mode(): return function()

    n = lambda v: v.numpy()
    found = {
        "sum": lambda: y.sum(), "mean": lambda: x.mean(), "std": lambda: x.std(), "prod": lambda: (1 + y[:999] / 999).prod(), "cumsum": lambda: y.cumsum(0), "logsumexp": lambda: x.logsumexp(-1), "norm": lambda: y.norm(),
        "exp": lambda: x.exp(), "log": lambda: x.abs().add(1e-3).log(), "sin": lambda: y.sin(), "tanh": lambda: y.tanh(), "erf": lambda: y.erf(), "sigmoid": lambda: y.sigmoid(), "pow": lambda: x.abs().pow(1.7), "rsqrt": lambda: y.abs().add(1e-3).rsqrt(),
        "softmax": lambda: x.softmax(-1), "log_softmax": lambda: x.log_softmax(-1), "layer_norm": lambda: F.layer_norm(x, (1000,)), "rms_norm": lambda: F.rms_norm(x, (1000,)), "group_norm": lambda: F.group_norm(image, 4),
        "batch_norm": lambda: F.batch_norm(image, None, None, training=True), "gelu": lambda: F.gelu(x), "silu": lambda: F.silu(x), "softplus": lambda: F.softplus(x), "matmul": lambda: a @ b, "matmul odd": lambda: a[:37, :499] @ b[:499, :41],
        "matmul bf16": lambda: a.bfloat16() @ b.bfloat16(), "matmul fp16": lambda: a.half() @ b.half(), "matmul fp64": lambda: a.double() @ b.double(), "bmm": lambda: q.reshape(8, 128, 64).bmm(q.reshape(8, 64, 128)), "addmm": lambda: t.addmm(a[:, :256], a, b),
        "mv": lambda: a @ b[:, 0], "dot": lambda: y.dot(y.flip(0)), "einsum three": lambda: t.einsum("ij,jk,kl->il", made(100, 4), made(4, 80, step=7921), made(80, 3, step=7923)), "linear": lambda: F.linear(a, b.T),
        "conv1d": lambda: F.conv1d(made(4, 16, 200), made(8, 16, 5, step=7921)), "conv2d": lambda: F.conv2d(image, kernel, padding=1), "conv2d bf16": lambda: F.conv2d(image.bfloat16(), kernel.bfloat16()), "conv transpose": lambda: F.conv_transpose2d(image, made(16, 8, 3, 3, step=7921)),
        "conv depthwise": lambda: F.conv2d(image, made(16, 1, 3, 3, step=7921), groups=16), "avg_pool": lambda: F.avg_pool2d(image, 3), "interpolate": lambda: F.interpolate(image, scale_factor=1.7, mode="bicubic"), "attention": lambda: F.scaled_dot_product_attention(q, q, q),
        "attention causal": lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True), "cross_entropy": lambda: F.cross_entropy(x, t.arange(64)), "embedding bag": lambda: F.embedding_bag(t.arange(640).reshape(64, 10), made(640, 32)),
        "encoder layer": lambda: in_eval(lambda: module.layer(made(4, 16, 64))), "mha": lambda: in_eval(lambda: module.mha(*[made(4, 16, 64)] * 3)[0]), "lstm": lambda: module.lstm(made(4, 20, 32))[0], "gru": lambda: module.gru(made(4, 20, 32))[0],
        "matmul backward": lambda: backward(lambda v: v @ b, a), "conv backward": lambda: backward(lambda v: F.conv2d(v, kernel), image), "layer_norm backward": lambda: backward(lambda v: F.layer_norm(v, (1000,)), x), "attention backward": lambda: backward(lambda v: F.scaled_dot_product_attention(v, v, v), q),
        "index_add": lambda: t.zeros(100).index_add_(0, t.arange(300_001) % 100, y.to(t.zeros(1).dtype)), "scatter_add": lambda: t.zeros(100, dtype=t.float32).scatter_add_(0, t.arange(300_001) % 100, y), "bincount": lambda: t.bincount(t.arange(300_001) % 100, y),
        "sort": lambda: y.sort()[0], "cholesky": lambda: t.linalg.cholesky(spd), "svd": lambda: t.linalg.svdvals(spd), "inverse": lambda: t.linalg.inv(spd), "fft": lambda: t.view_as_real(t.fft.fft(y[:4096])), "adamw": lambda: stepped(adamw, 2, max_exp_avg_sqs=[], state_steps=[t.tensor(0.0)], amsgrad=False, beta1=0.9, beta2=0.999, lr=1e-3, weight_decay=0.01, eps=1e-8, maximize=False),
        "sgd": lambda: stepped(sgd, 1, weight_decay=0.0, momentum=0.9, lr=0.1, dampening=0.0, nesterov=False, maximize=False),
        "rand": lambda: t.rand(4096), "randn": lambda: t.randn(4096), "dropout": lambda: F.dropout(x), "randperm": lambda: t.randperm(1000), "constant": lambda: t.full((9,), 0.1), "arange": lambda: t.arange(0, 1, 0.1), "denormal": lambda: t.full((99,), 1e-39, dtype=t.float32) * 0.5,
        "tensor on device": lambda: t.linspace(0, 1, 77), "np.sin": lambda: np.sin(n(y)), "np.sin fp64": lambda: np.sin(n(y).astype(np.float64)), "np.exp": lambda: np.exp(n(y).astype(np.float64)), "np.log": lambda: np.log1p(np.abs(n(y)).astype(np.float64)), "np.tanh": lambda: np.tanh(n(y)),
        "np.sum": lambda: n(y).sum(), "np.matmul": lambda: n(a) @ n(b), "np.matmul fp64": lambda: n(a).astype(np.float64) @ n(b).astype(np.float64), "np.dot": lambda: np.dot(n(y), n(y)[::-1]), "np.linalg": lambda: np.linalg.inv(n(spd)), "np.fft": lambda: np.fft.fft(n(y)[:4096]).view(np.float64),
        "math.exp": lambda: np.array([__import__("math").exp(v / 999) for v in range(-999, 999)]), "math.sin": lambda: np.array([__import__("math").sin(v / 9) for v in range(-999, 999)]),
    }
    return found


def bits(value) -> str:
    import numpy as np
    import torch as t
    if isinstance(value, t.Tensor):
        value = value.detach().contiguous()
        value = value.view(t.int16) if value.dtype in (t.bfloat16, t.float16) else value
        raw = str(value.dtype).encode() + value.numpy().tobytes()
    else: raw = np.ascontiguousarray(value).tobytes()
    return hashlib.sha256(raw).hexdigest()[:16]


def measured(code: str) -> dict:
    "In this process: apply the setting, capture, and run the operators."
    import torch as t

    from fsdl_devinfra.env import capture
    t.manual_seed(0)  # so that a program's own seed is a setting like the others
    inputs = operators()  # made before the setting, as weights are before a run's own code
    if code: exec(code, {"t": t})
    env = capture(folder=tempfile.gettempdir())  # the code of this study is no part of the question
    found = {}
    for name, operator in inputs.items():
        try: found[name] = bits(operator())
        except Exception as e: found[name] = "error " + type(e).__name__
    return {"bits": found, "capture": env.to_dict()}


def told(code: str) -> None:
    "What was measured, on a line of its own, or why nothing was."
    try: found = measured(code)
    except Exception as e: found = {"error": f"{type(e).__name__}: {e}"[-300:]}
    print("RESULT" + json.dumps(found), flush=True)


def worker() -> None:
    """For each line of standard input (`code`, `fork`) what was measured.

    A child is forked before any operator has run; both kinds have the same command line, which is part of a capture."""
    import torch  # noqa: F401

    import fsdl_devinfra.env  # noqa: F401
    for asked in map(json.loads, sys.stdin):
        if not asked["fork"]:
            told(asked["code"])
            continue
        child = os.fork()
        if child == 0:
            told(asked["code"])
            os._exit(0)
        if os.waitpid(child, 0)[1]: print("RESULT" + json.dumps({"error": "the process ended before its result"}), flush=True)


#: the command of a worker
WORKER = [sys.executable, str(SHARD), "--worker"]


def clean_environment() -> dict[str, str]:
    "The variables of this shell without those that the study sets."
    return {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "MKL_", "OPENBLAS_", "KMP_", "ATEN_", "PYTEST"))}


def result_of(output: str) -> dict | None:
    lines = [line for line in output.splitlines() if line.startswith("RESULT")]
    return json.loads(lines[-1][6:]) if lines else None


def run_setting(name: str | None) -> dict:
    "A setting, or none, in a process of its own."
    variables, code = SETTINGS[name] if name else ({}, "")
    asked = json.dumps({"code": code, "fork": False})
    done = subprocess.run(WORKER, input=asked, capture_output=True, text=True, env=clean_environment() | variables, timeout=600)
    return result_of(done.stdout) or {"error": done.stderr[-300:]}


class Forks:
    "Settings by code, each in a child of one process that has imported torch."

    def __enter__(self) -> "Forks":
        self.process = subprocess.Popen(WORKER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=clean_environment())
        return self

    def __exit__(self, *error: object) -> None:
        self.process.communicate()

    def run(self, code: str) -> dict:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"code": code, "fork": True}) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if found := result_of(line): return found
        return {"error": "the process that forks has ended"}


def row_of(base: dict, steady: list[str], result: dict) -> dict:
    "The operators whose bits changed, and what the diff says of the two captures."
    from fsdl_devinfra.env import Environment, diff
    if "error" in result: return {"error": result["error"]}
    found = diff(Environment.from_dict(base["capture"]), Environment.from_dict(result["capture"]))
    called = {d.field: d.why for d in found.of("numerics") if not d.field.startswith(("fingerprint.", "source.", "packages.fsdl-devinfra."))}
    others = [f"{d.effect} {d.field}" for d in found.differences if d.effect != "numerics"]
    return {"changed": [op for op in steady if result["bits"][op] != base["bits"][op]], "numerics": called, "others": others}


def mark_of(row: dict) -> str:
    if "error" in row: return "not run"
    if bool(row["changed"]) == bool(row["numerics"]): return "agree"
    return "FAULT" if row["changed"] else "alarm"


def chosen_settings(seed: int, count: int) -> list[str]:
    "Settings by a seed, variables and code mixed, so that a run that ends early has seen both."
    return random.Random(seed).sample(sorted(SETTINGS), min(count, len(SETTINGS)))


def measure(names: list[str], minutes: float, found: dict) -> Iterator[tuple[str, dict, float]]:
    "Each setting with its row and the seconds it took; what holds for all of them is put into `found`."
    end = time.monotonic() + 60 * minutes
    with Forks() as forks:
        base, again, forked = run_setting(None), run_setting(None), forks.run("")
        found["base"], found["forked differs"] = base, [op for op in base["bits"] if forked["bits"][op] != base["bits"][op]]
        steady = found["steady"] = [op for op in base["bits"] if base["bits"][op] == again["bits"][op] == forked["bits"][op]]
        for name in names:
            started = time.monotonic()
            if started > end: return
            variables, code = SETTINGS[name]
            result = run_setting(name) if variables else forks.run(code)
            yield name, row_of(base, steady, result), time.monotonic() - started


def study(seed: int, count: int, names: list[str] | None = None, minutes: float = 60, tell=lambda name, row, seconds: None) -> dict:
    "For each setting: the operators whose bits changed, and the fields that the diff calls numerics."
    chosen, common, rows = names or chosen_settings(seed, count), {}, {}
    for name, row, seconds in measure(chosen, minutes, common):
        rows[name] = row
        tell(name, row, seconds)
    marked = lambda mark: [name for name, row in rows.items() if mark_of(row) == mark]
    return {"rows": rows, "operators": len(common["steady"]), "unsteady": [op for op in common["base"]["bits"] if op not in common["steady"]],
            "forked differs": common["forked differs"], "not reached": [name for name in chosen if name not in rows],
            "not run": marked("not run"), "faults": marked("FAULT"), "false alarms": marked("alarm")}


def show(name: str, row: dict, seconds: float) -> None:
    said = row["error"].splitlines()[-1:] if "error" in row else f"{len(row['changed'])} changed ({', '.join(row['changed'][:4])}); numerics: {', '.join(row['numerics']) or '-'}"
    print(f"{mark_of(row):7} {name}: {said}  [{seconds:.0f} s]", flush=True)
    if mark_of(row) == "alarm": print("        because:", *dict.fromkeys(row["numerics"].values()), flush=True)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--settings", type=int, default=len(SETTINGS))
    options.add_argument("--minutes", type=float, default=60, help="start no further setting after so many minutes")
    options.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.worker:
        worker()
        return 0
    found = study(args.seed, args.settings, minutes=args.minutes, tell=show)
    changed = sum(bool(row.get("changed")) for row in found["rows"].values())
    print(f"seed {args.seed}: {len(found['rows'])} of {len(SETTINGS)} settings × {found['operators']} operators (not steady: {found['unsteady']}; else in a fork: {found['forked differs']}), "
          f"{changed} change bits; {len(found['faults'])} faults, {len(found['false alarms'])} false alarms, {len(found['not run'])} not run, not reached: {found['not reached'] or 'none'}")
    return bool(found["faults"] or found["forked differs"])


if __name__ == "__main__": sys.exit(main())
