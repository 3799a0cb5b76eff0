"""The command reference: made from the parsers, every command and option in it, examples with real output."""
from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import make_reference
import pytest

ROOT = Path(__file__).resolve().parents[1]


def text() -> str: return "\n".join("".join(c["source"]) for c in json.loads(make_reference.PAGE.read_text(encoding="utf-8"))["cells"])


def test_the_page_is_what_the_parsers_say():
    done = subprocess.run([sys.executable, "tests/make_reference.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, "make export writes the page anew\n" + done.stderr


def test_every_command_and_option_is_there():
    page, tree = text(), make_reference.commands()
    assert len(tree) >= 20
    for name, parser in tree.items():
        section = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        options = [o for a in parser._actions if not isinstance(a, argparse._HelpAction) for o in a.option_strings]
        assert not [o for o in options if f"`{o}" not in section], name


def test_every_command_has_an_example_that_ran():
    shown = make_reference.stored()
    assert set(make_reference.commands()) == set(make_reference.EXAMPLES)
    for name, lines in make_reference.EXAMPLES.items():
        assert name == "app" or lines
        for line in lines: assert shown[line].strip() and "Traceback" not in shown[line] and "exit status 2" not in shown[line], line


def test_an_option_that_is_missing_is_seen():
    parser = argparse.ArgumentParser()
    parser.add_argument("--speed", choices=("slow", "fast"), help="100%% | sure")
    assert "| `--speed {slow,fast}` | 100% \\| sure |" in make_reference.options(parser)
    with pytest.raises(KeyError): make_reference.page({})


@pytest.mark.slow
def test_quick_examples_print_what_the_page_shows():
    shown = make_reference.stored()
    now = make_reference.outputs(False, shown)
    assert {k: v for k, v in now.items() if v != shown[k]} == {}
