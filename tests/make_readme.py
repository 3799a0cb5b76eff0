"""README.md from nbs/index.ipynb, without Quarto: prose as it is, code as fences, text outputs below.

    python tests/make_readme.py [--check]
"""
from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SITE = "https://github.com/fsdl-devinfra/fsdl-devinfra/blob/main/nbs/"


def links(text: str) -> str:
    """Links between notebooks become links into the repository, so that they also work on a package index."""
    return re.sub(r"\]\((?!https?://|#)([^)]+\.ipynb)\)", lambda m: f"]({SITE}{m[1]})", text)


def output_text(output: dict) -> str:
    data = output.get("data", {})
    text = output.get("text") or data.get("text/plain") or ""
    text = "".join(text)
    return "" if "image/svg+xml" in data or not text.strip() else text.rstrip("\n")


def picture(outputs: list[dict]) -> str:
    """The SVG among the outputs of a cell, or nothing."""
    return next(("".join(o["data"]["image/svg+xml"]) for o in outputs if "image/svg+xml" in o.get("data", {})), "")


def blocks(cells: list[dict], pictures: list[str]) -> list[str]:
    """Markdown of all cells; code cells without output join the next one; `pictures` gets the SVG of each picture shown."""
    found, code = [], []
    for cell in cells:
        source = "".join(cell["source"]).strip("\n")
        if cell["cell_type"] == "markdown": found.append(links(source)); continue
        if not source or re.search(r"^#\|\s*(hide|default_exp|export)", source, re.M): continue
        outputs = cell["outputs"]
        texts = [t for t in map(output_text, outputs) if t]
        if drawn := picture(outputs):
            pictures.append(drawn)
            found += ["```python\n" + "\n\n".join([*code, source]) + "\n```", f"![What one GPU holds, by part](nbs/images/readme_{len(pictures)}.svg)"]
            code = []
            continue
        if outputs and not texts: code = []; continue
        code.append(source)
        if texts: found += ["```python\n" + "\n\n".join(code) + "\n```", *(f"```\n{t}\n```" for t in texts)]; code = []
    return found


def readme() -> tuple[str, list[str]]:
    """Its text, and its pictures."""
    pictures: list[str] = []
    cells = json.loads((ROOT / "nbs/index.ipynb").read_text(encoding="utf-8"))["cells"]
    head = "<!-- Made from nbs/index.ipynb by `make export`: edit the notebook. -->"
    return "\n\n".join([head, *blocks(cells, pictures)]) + "\n", pictures


def main() -> int:
    text, pictures = readme()
    files = {ROOT / "README.md": text} | {ROOT / f"nbs/images/readme_{i}.svg": drawn for i, drawn in enumerate(pictures, 1)}
    if "--check" in sys.argv: return int(any(not f.is_file() or f.read_text(encoding="utf-8") != t for f, t in files.items()))
    for file, content in files.items():
        file.parent.mkdir(exist_ok=True)
        file.write_text(content, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
