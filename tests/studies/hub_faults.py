"""Faults of the transport, the disk and the cache in random combinations: every command ends with the right bytes or with one sentence.

python tests/studies/hub_faults.py --seed 1 --count 200

A trial is a command (pull, lock, inspect, verify) with random options, against a Hub on the loopback address that misbehaves in up to
three ways, on a disk that may be full and with a cache that may hold anything. Afterwards every file that became visible is compared
with what the Hub really holds. Then all faults are taken away and the same command must succeed, unless something that only a person
can remove is in the way.
"""
from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hub_server import Fault, FaultyHub, take  # noqa: E402

LIMIT_S = 100  # more is a hang: the longest wait that a server may ask for, several times
TIMEOUT_S = 2  # HF_HUB_DOWNLOAD_TIMEOUT of a trial
LIMITED = """
import resource, sys
if sys.argv[1] != "-": resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
from fsdl_devinfra.hub import pulling
pulling.RANGE_BYTES, pulling.LARGE_BYTES = 2**18, 2**19  # so that a shard of 2.3 MB comes in nine ranges
from fsdl_devinfra.cli import main
sys.exit(main(sys.argv[2:]))
"""


# The repository


def safetensors(name: str, size: int, seed: int) -> bytes:
    text = json.dumps({name: {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return len(text).to_bytes(8, "little") + text + random.Random(seed).randbytes(size)


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def make_repo(folder: Path) -> dict[str, bytes]:
    """A sharded model with an empty file, a name that is no ASCII, a very long one and a second copy. Returns the truth."""
    files = {"config.json": b'{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}', "empty.txt": b"", "über maß.txt": b"text",
             "l" * 250 + ".json": b"{}", "tokenizer.json": json.dumps({"v": list(range(9000))}).encode(), "README.md": b"---\nlicense: mit\n---\n",
             SHARDS[0]: safetensors("a", 2_300_000, 1), SHARDS[1]: safetensors("b", 300_000, 2), "original/model.safetensors": safetensors("a", 50_000, 3),
             "pytorch_model.bin": b"\x80\x02}q\x00.",
             "model.safetensors.index.json": json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}).encode()}
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return files


# The transport


class Rude:
    """Wraps the server with what its own faults cannot do: replies that drip, that ask to wait, that redirect in circles, that break off at once."""

    def __init__(self, app, faults: list[Fault]):
        self.app, self.faults = app, faults

    async def __call__(self, scope, receive, send):
        path = scope.get("path", "")
        kind = next((f for f in self.faults if take([f], f.kind, path)), None) if scope["type"] == "http" else None
        if kind is None: return await self.app(scope, receive, send)
        await getattr(self, kind.kind.replace("-", "_"))(kind, scope, receive, send)

    async def _answer(self, send, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        told = [(k.encode(), v.encode()) for k, v in ({"content-length": str(len(body))} | headers).items()]
        await send({"type": "http.response.start", "status": status, "headers": told})
        await send({"type": "http.response.body", "body": body})

    async def drip(self, fault, scope, receive, send):
        async def slowly(message):
            body = message.get("body", b"")
            if message["type"] != "http.response.body" or not body: return await send(message)
            for i in range(min(len(body), 40)):
                await send({"type": "http.response.body", "body": body[i:i + 1], "more_body": True})
                await asyncio.sleep(fault.value)
            await send(message | {"body": body[40:]})
        await self.app(scope, receive, slowly)

    async def retry_after(self, fault, scope, receive, send): await self._answer(send, 429, {"retry-after": str(fault.value)}, b"wait")
    async def rate_limit(self, fault, scope, receive, send): await self._answer(send, 429, {"ratelimit": f'"api";r=0;t={fault.value}'}, b"wait")
    async def circle(self, fault, scope, receive, send): await self._answer(send, 302, {"location": scope["path"]})
    async def away(self, fault, scope, receive, send): await self._answer(send, 307, {"location": f"http://127.0.0.1:9{scope['path']}"})
    async def reason(self, fault, scope, receive, send): await self._answer(send, fault.value, {"x-error-message": "because\nof \x1b[31mthis".replace("\n", " ")})
    async def xet(self, fault, scope, receive, send): await self._answer(send, 404, {"x-xet-hash": "a" * 64})
    async def garbage(self, fault, scope, receive, send): await self._answer(send, 200, {"content-type": "application/json"}, b'{"sha": [[[' * 50)

    async def hang_up(self, fault, scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1000000")]})
        raise ConnectionResetError("planted")


RUDE = ["drip", "retry-after", "rate-limit", "circle", "away", "reason", "xet", "garbage", "hang-up"]


@contextlib.contextmanager
def hub_with(shelf: Path, faults: list[Fault], redirect: bool):
    """A Hub whose faults are split between its own and those of `Rude`."""
    rude = [f for f in faults if f.kind in RUDE]

    class RudeHub(FaultyHub):
        def app(self): return Rude(super().app(), rude)
    with RudeHub(shelf, redirect=redirect, faults=[f for f in faults if f.kind not in RUDE]) as hub: yield hub, rude


def some_fault(rng: random.Random) -> Fault:
    """One thing that the server does wrong."""
    paths = ["*", "config.json", "*.safetensors", SHARDS[0], "tokenizer.json", "empty.txt"]
    over = ["*", "/api/*", "/org/*/resolve/*", "/blobs/*", f"*{SHARDS[0]}", "*config.json"]
    kind = rng.choice(["flip", "zeros", "short", "long", "cut", "html", "size", "commit", "etag", "encoding", "no-range", "no-size", "no-hash", "listing",
                       "slow", "slow-body", "status", *RUDE])
    value = {"flip": lambda: rng.choice([None, 0, 9, 100_000]), "short": lambda: rng.choice([0, 1, 1000, 2**20]), "cut": lambda: rng.choice([0, 1, 5000, 2**20]),
             "size": lambda: rng.choice([0, 7, 10**12]), "commit": lambda: rng.choice(["f" * 40, "main", ""]),
             "etag": lambda: rng.choice(["../../../escaped", "0" * 64, "0" * 40, "", "W/1"]), "listing": lambda: rng.choice(["../out.txt", "/abs", "a//b", "config.json"]),
             "slow": lambda: rng.choice([0.3, 3]), "slow-body": lambda: rng.choice([0.3, 3]), "drip": lambda: rng.choice([0.05, 1]),
             "status": lambda: rng.choice([400, 401, 403, 404, 408, 410, 416, 429, 500, 502, 503, 504]), "retry-after": lambda: rng.choice([0, 1, 3, 4000]),
             "rate-limit": lambda: rng.choice([1, 5000]), "reason": lambda: rng.choice([401, 403, 404, 451])}.get(kind, lambda: None)()
    where = over if kind in ("slow", "status", *RUDE) else ["*", "info"] if kind == "commit" and rng.random() < 0.3 else paths
    return Fault(kind, rng.choice(where), value, rng.choice([1, 2, 6, None]))


# Disk and cache


@dataclass
class Trial:
    seed: int
    command: str = ""
    args: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    cache: str = ""
    limit: int | None = None  # bytes that a file may have
    disk: int | None = None  # bytes of the whole disk
    redirect: bool = True
    stuck: bool = False  # something is in the way that only a person can remove


CACHES = ["empty", "empty", "whole", "partial", "wrong-partial", "long-partial", "spoilt-blob", "spoilt-file", "dangling", "folder-in-the-way", "file-in-the-way",
          "no-ref", "wrong-ref", "half", "copy-instead-of-link"]


def snapshot(home: Path, local: Path | None, commit: str) -> Path: return local or home / "hub" / "models--org--m" / "snapshots" / commit


def spoil_cache(trial: Trial, rng: random.Random, home: Path, local: Path | None, commit: str, truth: dict[str, bytes]) -> None:
    """Put the cache, or the folder, into the state that the trial asks for. It was whole before."""
    root, seen = home / "hub" / "models--org--m", snapshot(home, local, commit)
    first, sha = seen / SHARDS[0], hashlib.sha256(truth[SHARDS[0]]).hexdigest()
    partial = (local / ".cache" / "fsdl-devinfra" / f"{sha}.incomplete") if local else root / "blobs" / f"{sha}.fsdl.incomplete"
    kind, data = trial.cache, truth[SHARDS[0]]
    if kind == "whole": return
    if kind in ("partial", "wrong-partial", "long-partial"):
        (first.resolve() if local is None else first).unlink()
        if local is None: first.unlink()
        partial.parent.mkdir(parents=True, exist_ok=True)
        content = {"partial": data[:rng.randrange(len(data))], "wrong-partial": bytes(rng.randrange(len(data))), "long-partial": data + b"more"}[kind]
        partial.write_bytes(content)
    elif kind in ("spoilt-blob", "spoilt-file"):
        file = first.resolve()
        spoilt = bytearray(data)
        spoilt[rng.randrange(len(data))] ^= 1
        if kind == "spoilt-file": first.unlink()
        (file if kind == "spoilt-blob" else first).write_bytes(bytes(spoilt))
    elif kind == "dangling":
        first.unlink()
        first.symlink_to("../../nowhere")
    elif kind == "folder-in-the-way":
        first.unlink()
        first.mkdir()
        trial.stuck = True
    elif kind == "file-in-the-way":
        shutil.rmtree(seen)
        seen.parent.mkdir(parents=True, exist_ok=True)
        seen.write_text("a file")
        trial.stuck = True
    elif kind in ("no-ref", "wrong-ref") and local is None:
        ref = root / "refs" / "main"
        if kind == "no-ref": ref.unlink(missing_ok=True)
        else: ref.write_text("f" * 40)
    elif kind == "half":
        for path in rng.sample(sorted(truth), 4): (seen / path).unlink(missing_ok=True)
    elif kind == "copy-instead-of-link":  # and the only other link to it
        first.unlink()
        first.write_bytes(data)
        os.link(first, seen / ".other")


# A trial


def command(trial: Trial, home: Path, url: str, limited: bool = True) -> tuple[int, str, str]:
    limit = str(trial.limit) if limited and trial.limit is not None else "-"
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "FSDL_"))}
    env = clean | {"HF_HOME": str(home), "HF_ENDPOINT": url, "HF_HUB_DOWNLOAD_TIMEOUT": str(TIMEOUT_S if limited else 30)} | (trial.env if limited else {})
    done = subprocess.run([sys.executable, "-c", LIMITED, limit, "hub", trial.command, *trial.args], capture_output=True, text=True, timeout=LIMIT_S, env=env)
    return done.returncode, done.stdout, done.stderr


def wrong_files(seen: Path, truth: dict[str, bytes], before: dict[str, str]) -> list[str]:
    """Files that are visible, wrong, and not as they were before the command."""
    found = []
    for path, data in truth.items():
        file = seen / path
        if file.is_file() and file.read_bytes() != data and hashlib.sha256(file.read_bytes()).hexdigest() != before.get(path): found.append(path)
    return found


def complaint(status: int, out: str, err: str, as_json: bool) -> str | None:
    """What is wrong with how a command failed; None where it is one sentence that says what to do."""
    if "Traceback" in out + err: return "a traceback"
    if status not in (1, 2): return f"status {status}"
    if as_json:
        try: said = json.loads(out)
        except ValueError: return "no document"
        if "error" in said and ("\n" in said["error"] or not said.get("hint")): return "no sentence with a hint"
        if "fault in fsdl" in said.get("error", ""): return "called its own fault"
        return None
    if "fault in fsdl" in err: return "called its own fault"
    return None if (err.strip() or out.strip()) else "silence"


def planned(seed: int) -> tuple[Trial, random.Random]:
    """A trial from its seed."""
    rng = random.Random(seed)
    trial = Trial(seed, rng.choice(["pull"] * 6 + ["lock", "inspect", "verify"]))
    trial.faults = [some_fault(rng) for _ in range(rng.choice([0, 1, 1, 2, 3]))]
    trial.cache, trial.redirect = rng.choice(CACHES), rng.random() < 0.7
    if rng.random() < 0.25: trial.limit = rng.choice([0, 1, 5000, 299_000, 1_000_000, 2**20, 2_299_999, 2_300_000])
    if rng.random() < 0.15: trial.disk = rng.choice([1_000_000, 2_400_000, 2_700_000, 3_000_000])
    if rng.random() < 0.12: trial.env["HF_HUB_OFFLINE"] = "1"
    if rng.random() < 0.3: trial.env["HF_TOKEN"] = "hf_of_the_trial"
    return trial, rng


def options(trial: Trial, rng: random.Random, work: Path, commit: str, lock: Path) -> Path | None:
    """Choose options; returns the folder of --local-dir."""
    local = work / "disk" / "here" if trial.command == "pull" and rng.random() < 0.4 else None
    if trial.command == "verify": trial.args = [str(lock), *(["--full"] if rng.random() < 0.5 else [])]
    elif trial.command == "pull" and rng.random() < 0.5: trial.args = [str(lock)]
    else: trial.args = [rng.choice(["org/m", "org/m@main", f"org/m@{commit}"])]
    if trial.command == "lock": trial.args += ["-o", str(work / "made.lock.json")]
    if trial.command != "verify" and rng.random() < 0.25: trial.args += rng.choice([["--include", "*.json"], ["--exclude", "*.txt"], ["--include", SHARDS[0]]])
    if local: trial.args += ["--local-dir", str(local)]
    if rng.random() < 0.7: trial.args.append("--json")
    return local


@contextlib.contextmanager
def disk_of(trial: Trial, work: Path):
    """The folder of everything that the command writes; a small disk of its own where the trial asks for one and this machine allows it."""
    disk = work / "disk"
    disk.mkdir()
    mounted = trial.disk is not None and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", str(disk)], capture_output=True).returncode == 0
    if not mounted: trial.disk = None
    try: yield disk
    finally:
        if mounted: subprocess.run(["umount", "-l", str(disk)], capture_output=True)


def use_up(disk: Path, left: int) -> Path:
    """Fill a small disk up to some bytes."""
    free = shutil.disk_usage(disk).free
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(max(0, free - left)))
    return ballast


def judged(trial: Trial, work: Path, rng: random.Random) -> str | None:
    """Run a trial. Returns what went wrong; None where all is well."""
    truth = make_repo(work / "shelf" / "org" / "m")
    lock = work / "truth.lock.json"
    with disk_of(trial, work) as disk:
        home = disk / "home"
        with hub_with(work / "shelf", [], True) as (hub, _):
            commit = hub.shelf.at("org/m", "main")[0]
            make = Trial(0, "lock", ["org/m", "-o", str(lock)])
            assert command(make, home, hub.url, limited=False)[0] == 0
            local = options(trial, rng, work, commit, lock)
            if trial.cache != "empty" or trial.command == "verify":
                fill = Trial(0, "pull", ["org/m", *(["--local-dir", str(local)] if local else [])])
                assert command(fill, home, hub.url, limited=False)[0] == 0
                spoil_cache(trial, rng, home, local, commit, truth)
        return _judged_on(trial, work, disk, home, local, commit, truth)


def _judged_on(trial: Trial, work: Path, disk: Path, home: Path, local: Path | None, commit: str, truth: dict[str, bytes]) -> str | None:
    seen = snapshot(home, local, commit)
    before = {p: hashlib.sha256((seen / p).read_bytes()).hexdigest() for p in truth if (seen / p).is_file()}
    ballast = use_up(disk, trial.disk) if trial.disk is not None else None
    with hub_with(work / "shelf", trial.faults, trial.redirect) as (hub, rude):
        try: status, out, err = command(trial, home, hub.url)
        except subprocess.TimeoutExpired: return f"hangs for {LIMIT_S} s"
        wrong = wrong_files(seen, truth, before)
        if wrong: return f"status {status}, wrong bytes in {wrong}"
        if (work / "out.txt").exists() or (disk / "escaped").exists(): return "wrote outside of its folder"
        if status == 0: fault = wrong_success(trial, out, seen, truth, work)
        else: fault = complaint(status, out, err, "--json" in trial.args)
        if fault: return f"{fault} (status {status}): {(out + err)[-300:]}"
        hub.faults.clear()
        rude.clear()
        if ballast: ballast.unlink(missing_ok=True)
        return healed(trial, home, hub.url, seen, truth, work)


def wrong_success(trial: Trial, out: str, seen: Path, truth: dict[str, bytes], work: Path) -> str | None:
    """What is wrong with a command that says it succeeded."""
    def asked(path: str) -> bool:
        if path.startswith("original/") or path == "pytorch_model.bin": return False
        if "--include" in trial.args: return path == SHARDS[0] if SHARDS[0] in trial.args else path.endswith(".json")
        return not ("--exclude" in trial.args and path.endswith(".txt"))
    if trial.command == "pull":
        bad = [p for p, data in truth.items() if asked(p) and (not (seen / p).is_file() or (seen / p).read_bytes() != data)]
        return f"success without the right {bad}" if bad else None
    if trial.command == "verify":
        bad = [p for p, data in truth.items() if asked(p) and (not (seen / p).is_file() or (seen / p).read_bytes() != data)]
        return f"verified, and {bad} differ" if bad else None
    if trial.command == "lock":
        made = {f["path"]: f["sha256"] for f in json.loads((work / "made.lock.json").read_text())["files"]}
        bad = [p for p, s in made.items() if p not in truth or hashlib.sha256(truth[p]).hexdigest() != s] + [p for p in truth if asked(p) and p not in made]
        return f"locked wrong: {bad}" if bad else None
    if "--json" not in trial.args or "--include" in trial.args: return None
    count = json.loads(out)["tensors"]["parameters"]
    return None if count == 2_600_000 else f"counted {count} parameters"


def healed(trial: Trial, home: Path, url: str, seen: Path, truth: dict[str, bytes], work: Path) -> str | None:
    """Without the faults the same command must succeed."""
    if trial.stuck or trial.command == "verify": return None
    try: status, out, err = command(trial, home, url, limited=False)
    except subprocess.TimeoutExpired: return "hangs after the faults are gone"
    if status != 0: return f"does not recover (status {status}): {(out + err)[-300:]}"
    fault = wrong_success(trial, out, seen, truth, work)
    return f"after the faults are gone: {fault}" if fault else None


def run(seed: int) -> tuple[Trial, str | None, float]:
    """One trial in a folder of its own."""
    trial, rng = planned(seed)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hub-faults-") as folder: found = judged(trial, Path(folder), rng)
    return trial, found, time.monotonic() - started


GOOD = "right bytes or one sentence"


def told(trial: Trial, found: str | None, seconds: float) -> str:
    """A trial with all that it takes to run it again."""
    return json.dumps({"trial": trial.seed, "found": found, "seconds": round(seconds, 1), "command": trial.command, "args": trial.args[1:], "env": trial.env,
                       "cache": trial.cache, "limit": trial.limit, "disk": trial.disk, "faults": [str(f) for f in trial.faults]})


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first trial, to take up a study where it was left")
    parser.add_argument("--count", type=int, default=200)
    args = parser.parse_args()
    kinds: Counter[str] = Counter()
    started = time.monotonic()
    print(f"seed {args.seed}: {args.count} trials, from number {args.first}", flush=True)
    for n in range(args.count):
        trial, found, seconds = run(args.seed * 100_000 + args.first + n)
        kinds[GOOD if found is None else found.split(":")[0].split("(")[0]] += 1
        if found or seconds > 40: print(told(trial, found, seconds), flush=True)
        if (n + 1) % 10 == 0: print(f"{n + 1} of {args.count} trials, {kinds[GOOD]} good, {time.monotonic() - started:.0f} s", flush=True)
    print(json.dumps({"seed": args.seed, "first": args.first, "trials": args.count, "good": kinds[GOOD], "kinds": kinds}))
    return int(kinds[GOOD] < args.count)


if __name__ == "__main__": sys.exit(main())
