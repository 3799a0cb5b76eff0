"""Do real source files survive redaction? Files of installed packages as additions of a patch: bytes unchanged, or at least still parsing.

python tests/studies/env_patches.py --seed 1 --files 1000                    Python, C and JavaScript, as they come
python tests/studies/env_patches.py --seed 1 --files 1000 --kinds every      every language in turn, data and scripts too
"""
import argparse
import ast
import itertools
import random
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from fsdl_devinfra.env.redaction import redact_patch


#: languages, which take turns in a sample of every kind
KINDS = {"Python": ".py .pyi .pyx .pxd .pxi", "C": ".h .c .cc .cpp .cu .cuh .hpp", "JavaScript": ".js .mjs .ts .svelte .jsx .tsx", "JSON": ".json .webmanifest",
         "YAML and TOML": ".yaml .yml .toml .cfg .ini .conf", "shell": ".sh .bash .cmd .ps1 .bat .fish .csh .cmake", "prose": ".md .rst .txt .html",
         "notebook": ".ipynb", "others": ".proto .go .rs .java .f90 .css .jinja .xml .svg .sql .r .pl .lua .rb .tf .m"}


def candidates(suffixes: list[str]) -> list[Path]:
    "Text files below the installed packages, Python's own library, and beside them the notebooks of this project."
    roots = [Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("stdlib")), Path("/usr/share"), Path("/usr/lib"), Path("nbs")]
    named = (p for root in roots if root.is_dir() for p in root.rglob("*") if p.suffix in suffixes)
    return sorted({p for p in named if p.is_file() and not p.is_symlink() and 0 < p.stat().st_size < 200_000})


def sample(seed: int, count: int, every: bool = False) -> list[Path]:
    "Source files of the installed packages, chosen by a seed: Python, C and JavaScript, or every kind in turn."
    draw = random.Random(seed)
    if not every:
        root, suffixes = Path(sysconfig.get_path("purelib")), (".py", ".h", ".cpp", ".js", ".pyx", ".cuh")
        found = sorted(p for p in root.rglob("*") if p.suffix in suffixes and p.is_file() and 0 < p.stat().st_size < 200_000)
        return draw.sample(found, min(count, len(found)))
    groups = []
    for suffixes in KINDS.values():
        group = candidates(suffixes.split())
        draw.shuffle(group)
        groups.append(group)
    turns = [p for row in itertools.zip_longest(*groups) for p in row if p is not None]
    return turns[:count]


def patch_of(name: str, raw: bytes) -> str:
    "The patch that adds a file."
    text = raw.decode("utf-8", "surrogateescape")
    lines = text.split("\n")
    ends = lines[-1] == ""
    body = "".join(f"+{line}\n" for line in (lines[:-1] if ends else lines)) + ("" if ends else "\\ No newline at end of file\n")
    count = len(lines) - ends
    return f"diff --git a/{name} b/{name}\nnew file mode 100644\n--- /dev/null\n+++ b/{name}\n@@ -0,0 +1,{count} @@\n{body}"


def applied(patch: str, name: str) -> bytes | None:
    "The bytes of the file after `git apply`; None where it does not apply."
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
        done = subprocess.run(["git", "apply", "--whitespace=nowarn", "-"], cwd=folder, input=patch.encode("utf-8", "surrogateescape"), capture_output=True)
        return Path(folder, name).read_bytes() if done.returncode == 0 else None


def parses(raw: bytes) -> bool:
    try: ast.parse(raw)
    except (SyntaxError, ValueError): return False
    return True


def difference(path: Path) -> list[str]:
    "The lines that redaction changed, before and after."
    patch = patch_of("file" + path.suffix, path.read_bytes())
    pairs = zip(patch.split("\n"), redact_patch(patch).split("\n"))
    return [f"{a[:200]!r} -> {b[:200]!r}" for a, b in pairs if a != b]


def study(seed: int, count: int, every: bool = False) -> dict[str, list[str]]:
    "Files whose patch does not apply, whose bytes changed, and that no longer parse."
    found: dict[str, list[str]] = {"files": [], "not applied": [], "changed": [], "broken": []}
    for path in sample(seed, count, every):
        raw, name = path.read_bytes(), "file" + path.suffix
        found["files"].append(str(path))
        patch = patch_of(name, raw)
        clean = redact_patch(patch)
        if clean == patch and found["files"].__len__() % 20: continue  # of the unchanged ones every twentieth is applied
        got = applied(clean, name)
        if got is None: found["not applied"].append(str(path))
        elif got != raw:
            found["changed"].append(str(path))
            if path.suffix == ".py" and parses(raw) and not parses(got): found["broken"].append(str(path))
    return found


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--files", type=int, default=1000)
    options.add_argument("--kinds", choices=["programs", "every"], default="programs")
    options.add_argument("--show", action="store_true")
    args = options.parse_args()
    found = study(args.seed, args.files, args.kinds == "every")
    print({k: len(v) for k, v in found.items()})
    if args.show:
        for kind in ("not applied", "changed", "broken"):
            for name in found[kind]: print(kind, name, *difference(Path(name)), sep="\n   ")
    return bool(found["not applied"] or found["broken"])


if __name__ == "__main__": sys.exit(main())
