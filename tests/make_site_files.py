"""What the site has beside its pages: llms.txt and sitemap.xml, from the titles of the notebooks and one address.

    python tests/make_site_files.py [FOLDER] [--site URL]        # default: _docs, and site-url of nbs/_quarto.yml
"""
from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
HIDDEN = {"main.ipynb", "404.ipynb"}


def site_address() -> str:
    """The one place that says where the site is: `site-url` in nbs/_quarto.yml."""
    return re.search(r"^  site-url: (\S+)", (NBS / "_quarto.yml").read_text(encoding="utf-8"), re.M)[1]  # type: ignore[index]


def page_of(notebook: Path) -> str:
    """The path that nbdev and Quarto give to a notebook: 04_charts.ipynb is charts.html."""
    path = notebook.relative_to(NBS)
    return path.with_name(re.sub(r"^\d+_", "", path.stem) + ".html").as_posix()


def title_and_subtitle(notebook: Path) -> tuple[str, str]:
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        found = re.match(r"# (.+?)\n\n> (.+)", "".join(cell["source"])) if cell["cell_type"] == "markdown" else None
        if found: return found[1].strip(), found[2].strip()
    return notebook.stem, ""


def pages() -> list[Path]:
    found = [p for p in sorted(NBS.rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts and p.name not in HIDDEN]
    first = ["index.ipynb", "preflight.ipynb", "front_door.ipynb", "command_reference.ipynb"]
    return sorted(found, key=lambda p: (first.index(p.name) if p.parent == NBS and p.name in first else 9, "tutorials" not in p.parts, "explanations" not in p.parts, str(p)))


def llms(site: str) -> str:
    """A map of the site for programs that read it (llmstxt.org)."""
    title, subtitle = title_and_subtitle(NBS / "index.ipynb")
    text, section = [f"# {title}", f"> {subtitle}"], ""
    for page in pages():
        folder = page.relative_to(NBS).parts[0] if page.parent != NBS else "start"
        if folder != section: section = folder; text.append(f"## {section.capitalize()}")
        name, what = title_and_subtitle(page)
        text.append(f"- [{name}]({site}/{page_of(page)}): {what}")
    return "\n\n".join(text[:2]) + "\n\n" + "\n".join(f"\n{line}\n" if line.startswith("##") else line for line in text[2:]) + "\n"


def sitemap(site: str) -> str:
    addresses = [f"{site}/{page_of(page)}" for page in pages()] + [f"{site}/planner/index.html"]
    rows = "\n".join(f"  <url><loc>{escape(a)}</loc></url>" for a in addresses)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">\n{rows}\n</urlset>\n'


def main() -> None:
    parser = argparse.ArgumentParser(description="llms.txt and sitemap.xml")
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "_docs")
    parser.add_argument("--site", default=site_address(), help="address of the site")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    (args.folder / "llms.txt").write_text(llms(args.site.rstrip("/")), encoding="utf-8")
    (args.folder / "sitemap.xml").write_text(sitemap(args.site.rstrip("/")), encoding="utf-8")


if __name__ == "__main__": main()
