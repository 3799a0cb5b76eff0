"""The command reference, nbs/command_reference.ipynb, from the parsers themselves: every command, every option, an example with its real output.

    python tests/make_reference.py [--all | --check]

Options and the examples that take no time are always made anew; the others (`SLOW`) keep the output of the last run with --all.
--check writes nothing, and ends with 1 where the page is not what would be written.
"""
from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "nbs" / "command_reference.ipynb"

TRAIN = '''import torch
model = torch.nn.Sequential(*[torch.nn.Linear(4096, 4096) for _ in range(24)]).cuda()
optimizer = torch.optim.AdamW(model.parameters())
for step in range(3):
    loss = model(torch.randn(1024, 4096, device="cuda")).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
'''

#: command → lines that are run one after the other in one folder: the first page of what each prints
EXAMPLES = {
    "preflight": ["fsdl-devinfra preflight"],
    "hub inspect": ["fsdl-devinfra hub inspect"],
    "hub lock": ["fsdl-devinfra hub lock -o model.lock.json"],
    "hub verify": ["fsdl-devinfra hub verify model.lock.json"],
    "hub pull": ["fsdl-devinfra hub pull tiny/digits --local-dir ./digits"],
    "hub diff": ["fsdl-devinfra hub diff ./before ./after"],
    "hub sign": ["fsdl-devinfra hub sign model.lock.json --private-key key.pem"],
    "hub bom": ["fsdl-devinfra hub lock -o model.lock.json", "fsdl-devinfra hub bom model.lock.json -o model.cdx.json"],
    "hub serve": ["fsdl-devinfra hub serve ./models --port 8917"],
    "memory": ["fsdl-devinfra memory llama-3.1-8b", "fsdl-devinfra memory llama-3.1-8b --gpu 4090",
               "fsdl-devinfra memory llama-3.1-8b --gpu h100 --serve vllm --max-model-len 8192"],
    "plan": ["fsdl-devinfra plan llama-3.1-8b --gpu h100 --gpus 8 --tokens 100B -o plan.json"],
    "cost": ["fsdl-devinfra cost llama-3.1-8b --gpu h100 --gpus 8 --zero 3 --tokens 1B",
             "fsdl-devinfra cost breakeven --gpu a100-80 --gpus 8 --machine-usd 60000 --utilisation 0.7"],
    "dryrun": ["fsdl-devinfra dryrun --gpu a100-40 -- train.py"],
    "launch": ["fsdl-devinfra launch plan.json --to torchrun -o job"],
    "onnx export": ["fsdl-devinfra onnx export -o out"],
    "onnx check": ["fsdl-devinfra onnx check builtin:digits out/model.onnx"],
    "env capture": ["fsdl-devinfra env capture -o laptop.json", "OMP_NUM_THREADS=1 fsdl-devinfra env capture -o cluster.json"],
    "env diff": ["fsdl-devinfra env diff laptop.json cluster.json"],
    "env verify": ["fsdl-devinfra env verify laptop.json"],
    "env restore": ["fsdl-devinfra env restore laptop.json --to requirements -o requirements.txt"],
    "env check": ["fsdl-devinfra env check --no-load"],
    "env rerun": ["fsdl-devinfra env rerun laptop.json --into again"],
    "app": [],
}
#: what takes long, or says another thing on another machine
SLOW = {"preflight", "hub serve", "hub pull", "hub sign", "dryrun", "onnx export", "onnx check", "env capture", "env diff", "env verify", "env restore", "env check",
        "env rerun"}
LONGEST = 40  # lines of an output


def commands(parser: argparse.ArgumentParser | None = None, name: str = "") -> dict[str, argparse.ArgumentParser]:
    """Every command that runs something, by its words."""
    if parser is None:
        from fsdl_devinfra.cli import make_parser
        parser = make_parser(None)
    groups = [a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not groups: return {name: parser}
    found: dict[str, argparse.ArgumentParser] = {}
    for group in groups:
        for word, inner in group.items(): found |= commands(inner, f"{name} {word}".strip())
    return found


def cell(text: str) -> str: return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()


def sentence(text: str) -> str: return cell(text)[:1].upper() + cell(text)[1:].rstrip(".") + "."


def spelled(action: argparse.Action) -> str:
    """An option as it is typed, with its value."""
    if not action.option_strings: return f"`{action.metavar or action.dest}`" + (" (optional)" if action.nargs == "?" else "")
    value = "" if action.nargs == 0 else " " + str(action.metavar or ("{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()))
    return ", ".join(f"`{o}{'' if i else value}`" for i, o in enumerate(action.option_strings)).replace("|", "\\|")


def options(parser: argparse.ArgumentParser) -> str:
    """The tables of a command: one a group of options."""
    text = []
    for group in parser._action_groups:
        rows = [(spelled(a), cell(a.help % dict(vars(a), prog=parser.prog) if a.help else "")) for a in group._group_actions
                if not isinstance(a, argparse._HelpAction) and a.help != argparse.SUPPRESS]
        title = {"positional arguments": "arguments", "options": "options"}.get(group.title or "", group.title or "")
        if rows: text.append(f"| {title} | |\n|---|---|\n" + "\n".join(f"| {a} | {b} |" for a, b in rows))
    return "\n\n".join(text) or "No options."


def shortened(text: str) -> str:
    """The first page of an output, without what this machine alone calls things."""
    lines = [line.rstrip() for line in text.replace(str(ROOT), ".").rstrip().splitlines()]
    return "\n".join(lines if len(lines) <= LONGEST else [*lines[:LONGEST], f"… {len(lines) - LONGEST} more lines"])


class Folder:
    """An empty folder with a home of its own, without a network, where the examples run."""

    def __init__(self, path: Path):
        self.path, self.servers = path, []
        for name in ("home", "models/tiny"): (path / name).mkdir(parents=True)
        shutil.copytree(ROOT / "fsdl_devinfra/models/digits", path / "models/tiny/digits")
        for name in ("before", "after"): shutil.copytree(ROOT / "fsdl_devinfra/models/digits", path / name)
        weights = bytearray((path / "after/model.safetensors").read_bytes())
        weights[200_000] ^= 0x40
        (path / "after/model.safetensors").write_bytes(weights)
        if shutil.which("openssl"):
            subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", "key.pem"], cwd=path, check=True, capture_output=True)
        (path / "train.py").write_text(TRAIN)
        self.environment = {**os.environ, "HOME": str(path / "home"), "HF_HOME": str(path / "home/hf"), "HF_ENDPOINT": "http://127.0.0.1:8917",
                            "PYTHONPATH": str(ROOT), "COLUMNS": "110", "NO_COLOR": "1", "TERM": "dumb"}
        for line in ("init -q -b main", "add train.py", "-c user.name=me -c user.email=me@example.org commit -q -m start"):
            subprocess.run(["git", *line.split()], cwd=path, check=True)

    def run(self, line: str) -> str:
        """What a line prints on standard output, or on standard error where it prints nothing else."""
        words = [sys.executable, "-m", "fsdl_devinfra"]
        variables = dict(w.split("=", 1) for w in shlex.split(line) if re.match(r"[A-Z_]+=", w))
        words += [w for w in shlex.split(line) if not re.match(r"[A-Z_]+=", w)][1:]
        environment = self.environment | variables
        if " serve " in line: return self.serve(words)
        ran = subprocess.run(words, cwd=self.path, env=environment, capture_output=True, text=True, timeout=900, stdin=subprocess.DEVNULL)
        return shortened((ran.stdout or ran.stderr).replace(str(self.path), ".")) + (f"\n[exit status {ran.returncode}]" if ran.returncode else "")

    def serve(self, words: list[str]) -> str:
        """The first lines of a server, which then runs on for the examples after it."""
        server = subprocess.Popen(words, cwd=self.path, env=self.environment | {"PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.servers.append(server)
        assert server.stdout is not None
        first = server.stdout.readline()
        time.sleep(1)
        return shortened(first.replace(str(self.path), "."))

    def close(self) -> None:
        for server in self.servers: server.terminate(); server.wait(20)


#: a pull needs the server before it
ORDER = ["preflight", "hub inspect", "hub lock", "hub verify", "hub serve", "hub pull"]


def outputs(everything: bool, kept: dict[str, str]) -> dict[str, str]:
    """Line → what it prints: run now, or as it was."""
    found = dict(kept)
    with tempfile.TemporaryDirectory() as name:
        folder = Folder(Path(name).resolve())
        try:
            for command in [*ORDER, *(c for c in EXAMPLES if c not in ORDER)]:
                for line in EXAMPLES[command]:
                    if everything or command not in SLOW or line not in found:
                        print(f"$ {line}", file=sys.stderr, flush=True)
                        found[line] = folder.run(line)
        finally: folder.close()
    return {line: found[line] for lines in EXAMPLES.values() for line in lines}


def stored() -> dict[str, str]:
    """The outputs that the page holds."""
    if not PAGE.is_file(): return {}
    text = "\n\n".join("".join(c["source"]) for c in json.loads(PAGE.read_text(encoding="utf-8"))["cells"])
    return {m[1]: m[2] for m in re.finditer(r"^```\n\$ (.+)\n([\s\S]*?)\n```$", text, re.M)}


def page(shown: dict[str, str]) -> dict:
    """The notebook."""
    tree = commands()
    missing = sorted(set(tree) - set(EXAMPLES))
    if missing: print(f"no example for: {', '.join(missing)}; add one to tests/make_reference.py", file=sys.stderr)
    summary = "\n".join(f"| [`{name}`](#{name.replace(' ', '-')}) | {sentence(p.description or '')} |" for name, p in tree.items())
    texts = ["# Command reference\n\n> Every command and every option, with an example and what it prints",
             "This page is made from the parsers of the command line by `tests/make_reference.py`. Every command has `--help`; those that compute something have "
             "`--json`. The exit status is 0 where the check passes, 1 where it fails, and 2 where it could not be made.\n\n| command | does |\n|---|---|\n" + summary]
    for name, parser in tree.items():
        examples = "\n\n".join(f"```\n$ {line}\n{shown[line]}\n```" for line in EXAMPLES.get(name, ()))
        further = [line.strip() for line in (parser.epilog or "").splitlines()[1:] if line.strip()]
        more = "More examples:\n\n```bash\n" + "\n".join(further) + "\n```" if further else ""
        texts.append("\n\n".join(t for t in (f"## {name}", sentence(parser.description or ""), options(parser), examples, more) if t))
    cells = [{"cell_type": "markdown", "id": f"reference{i:02d}", "metadata": {}, "source": t.splitlines(keepends=True)} for i, t in enumerate(texts)]
    return {"cells": cells, "metadata": {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}, "nbformat": 4, "nbformat_minor": 5}


def written(notebook: dict) -> str: return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def main() -> int:
    kept = stored()
    text = written(page(kept if "--check" in sys.argv and not set(l for ls in EXAMPLES.values() for l in ls) - set(kept) else outputs("--all" in sys.argv, kept)))
    if "--check" in sys.argv: return int(not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
