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


def blocks(cells: list[dict]) -> list[str]:
    """Markdown of all cells; code cells without output join the next one, pictures are left to the site."""
    found, code = [], []
    for cell in cells:
        source = "".join(cell["source"]).strip("\n")
        if cell["cell_type"] == "markdown": found.append(links(source)); continue
        if not source or re.search(r"^#\|\s*(hide|default_exp|export)", source, re.M): continue
        outputs = cell["outputs"]
        texts = [t for t in map(output_text, outputs) if t]
        if outputs and not texts: code = []; continue
        code.append(source)
        if texts: found += ["```python\n" + "\n\n".join(code) + "\n```", *(f"```\n{t}\n```" for t in texts)]; code = []
    return found


def readme() -> str:
    cells = json.loads((ROOT / "nbs/index.ipynb").read_text(encoding="utf-8"))["cells"]
    head = "<!-- Made from nbs/index.ipynb by `make export`: edit the notebook. -->"
    return "\n\n".join([head, *blocks(cells)]) + "\n"


def main() -> int:
    path, text = ROOT / "README.md", readme()
    if "--check" in sys.argv: return int(path.read_text(encoding="utf-8") != text)
    path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
