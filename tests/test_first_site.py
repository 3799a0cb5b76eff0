"""What would be lost on the documentation site, seen without Quarto."""
from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
PROSE = [n for n in NOTEBOOKS if n.name != "main.ipynb"]


def markdown(notebook: Path) -> list[str]:
    return ["".join(c["source"]) for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "markdown"]


def anchors(notebook: Path) -> set[str]:
    """The anchors that pandoc gives to headings."""
    titles = re.findall(r"^#{1,6} (.+?)\s*$", "\n".join(markdown(notebook)), re.M)
    plain = [re.sub(r"[^\w\s.-]", "", re.sub(r"[`*]", "", t)).strip().lower() for t in titles]
    return {re.sub(r"\s+", "-", t).lstrip("0123456789.-") for t in plain}


def broken_links(notebook: Path) -> list[str]:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", "\n".join(markdown(notebook)), flags=re.S)
    return [f"{notebook.relative_to(ROOT)}: {link}" for link in re.findall(r"\]\(([^)\s]+)\)", text) if not resolves(notebook, link)]


def resolves(notebook: Path, link: str) -> bool:
    if re.match(r"[a-z]+:", link): return True
    path, _, anchor = link.partition("#")
    target = (notebook.parent / path).resolve() if path else notebook
    if not target.exists(): return False  # pages are linked by their notebook, and no page made from one exists as .html here
    return not anchor or target.suffix != ".ipynb" or anchor in anchors(target)


@pytest.mark.parametrize("notebook", PROSE, ids=lambda p: str(p.relative_to(ROOT / "nbs")))
def test_no_prose_is_lost_between_notebook_and_page(notebook):
    """nbdev turns the title cell into front matter and drops whatever else stands in it."""
    from execnb.nbio import read_nb
    from nbdev.frontmatter import FrontmatterProc
    from nbdev.process import NBProcessor
    before = markdown(notebook)
    processor = NBProcessor(notebook, procs=[FrontmatterProc], nb=read_nb(notebook))
    processor.process()
    after = "\n".join(c.source for c in processor.nb.cells if c.cell_type in ("markdown", "raw"))
    lines = [line for source in before for line in source.splitlines() if line.strip() and not re.match(r"[#>] ", line)]
    assert not [line for line in lines if line not in after]


def test_every_link_and_anchor_resolves():
    broken = [link for notebook in PROSE for link in broken_links(notebook)]
    assert not broken, broken


def test_no_folder_that_quarto_skips():
    """Quarto reads no folder called env or venv, nor hidden ones."""
    folders = {part for n in NOTEBOOKS for part in n.relative_to(ROOT / "nbs").parts[:-1]}
    assert not [f for f in folders if f in ("env", "venv", "node_modules") or f.startswith((".", "_"))]


def test_commonmark_keeps_its_markdown(): assert re.search(r"commonmark:\s*\n\s+keep-md: true", (ROOT / "_quarto.yml").read_text())


def unresolvable(source: str) -> list[str]:
    """Functions whose page nbdev cannot make: a name that only type checkers import stands unquoted in their signature."""
    tree = ast.parse(source)
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    hidden = {a.asname or a.name for b in blocks for i in ast.walk(b) if isinstance(i, (ast.ImportFrom, ast.Import)) for a in i.names}
    def annotations(f): return [a.annotation for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs) if a.annotation] + ([f.returns] if f.returns else [])
    public = [n for n in tree.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")]
    fields = [(c.name, n.annotation) for c in classes for n in c.body if isinstance(n, ast.AnnAssign)]  # of a dataclass: its signature
    found = [(f.name, a) for f in public for a in annotations(f)] + fields
    return [name for name, a in found for n in ast.walk(a) if isinstance(n, ast.Name) and n.id in hidden]


def test_every_signature_can_be_shown():
    """One such function ends nbdev's run over all pages, and those after it are missing from the site."""
    found = {str(p.relative_to(ROOT)): bad for p in (ROOT / "fsdl_devinfra").rglob("*.py") if (bad := unresolvable(p.read_text(encoding="utf-8")))}
    assert not found
    head = "from typing import TYPE_CHECKING\nif TYPE_CHECKING: from a import B\n"
    assert unresolvable(head + "class C:\n    x: B | None = None") == ["C"] and unresolvable(head + "class C:\n    x: 'B | None' = None") == []
    assert unresolvable(head + "def f(x: B): pass") == ["f"] and unresolvable(head + "def f(x: 'B', y: int) -> 'B': pass") == []


def runs_as_a_script(source: str) -> bool:
    """Whether a cell does what the module does when it is run: a notebook is `__main__` too, and nbdev runs exported cells to make the page."""
    tests = [n.test for n in ast.parse(source).body if isinstance(n, ast.If)]
    return any("__name__" in ast.unparse(t) and not isinstance(t, ast.BoolOp) for t in tests)


def test_no_exported_cell_runs_a_module():
    """One `os._exit` in such a cell ended nbdev's run over all pages, with exit status 0 and a third of the pages missing."""
    cells = [(n.name, "".join(c["source"])) for n in NOTEBOOKS for c in json.loads(n.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    exported = [(name, source) for name, source in cells if source.startswith("#| export")]
    assert len(exported) > 800 and not [name for name, source in exported if runs_as_a_script(source)]
    assert runs_as_a_script('if __name__ == "__main__": main()') and not runs_as_a_script('if __name__ == "__main__" and globals().get("__package__"): main()')


@pytest.mark.slow
def test_every_signature_resolves_where_it_stands():
    """What nbdev asks of each object that it shows: also a class whose parent's fields name types that its own module does not know."""
    import importlib
    import inspect
    pytest.importorskip("torch")
    pytest.importorskip("onnxruntime")
    unresolved, seen = [], 0
    for file in sorted((ROOT / "fsdl_devinfra").rglob("*.py")):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        if file.stem.startswith("_") or file.stem.endswith(("worker", "app_page")): continue
        module = importlib.import_module(name)
        for key, value in vars(module).items():
            if key.startswith("_") or getattr(value, "__module__", None) != name or not callable(value): continue
            try: inspect.signature(value, eval_str=True)
            except NameError as e: unresolved.append(f"{name}.{key}: {e}")
            except (TypeError, ValueError): continue
            seen += 1
    assert not unresolved and seen > 500


def test_no_two_pages_of_a_section_have_the_same_title():
    titles: dict[tuple[Path, str], list[Path]] = {}
    for notebook in PROSE:
        first = next((s for s in markdown(notebook) if s.startswith("# ")), "")
        titles.setdefault((notebook.parent, first.splitlines()[0] if first else ""), []).append(notebook)
    assert not [pages for pages in titles.values() if len(pages) > 1]


def listed(contents: list, found: list[str]) -> list[str]:
    """Every page and pattern of a sidebar."""
    for entry in contents:
        if isinstance(entry, str): found.append(entry)
        elif "auto" in entry: found.append(entry["auto"] if "*" in entry["auto"] else entry["auto"] + "/*.ipynb")
        elif "href" in entry: found.append(entry["href"])
        else: listed(entry["contents"], found)
    return found


def test_the_sidebar_has_every_page_once_and_none_that_is_missing():
    yaml = pytest.importorskip("yaml")
    website = yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]
    sections = [s["section"] for s in website["sidebar"]["contents"]]
    assert sections == ["Start", "Tutorials by task", "Explanations", "Command reference", "API by package", "Internals"]
    shown: list[Path] = []
    for entry in listed(website["sidebar"]["contents"], []):
        found = sorted((ROOT / "nbs").glob(entry))
        assert found, f"nothing is called {entry}"
        shown += found
    assert not {p for p in shown if shown.count(p) > 1}
    assert not [n for n in PROSE if n not in shown and n.name != "404.ipynb"]
    for entry in website["navbar"]["left"]: assert (ROOT / "nbs" / entry["href"]).is_file()
    assert (ROOT / "nbs" / website["favicon"]).is_file() and (ROOT / "nbs" / website["open-graph"]["image"]).is_file()


def test_llms_and_sitemap_name_every_page_at_one_address(tmp_path):
    import make_site_files as site
    text, addresses = site.llms("https://x.org"), re.findall(r"<loc>(.+?)</loc>", site.sitemap("https://x.org"))
    assert text.startswith("# fsdl-devinfra\n\n> ") and len(addresses) == len(set(addresses)) == len(site.pages()) + 1
    assert all(a.startswith("https://x.org/") for a in addresses) and "https://x.org/memory/architecture.html" in addresses
    assert all(f"({a})" in text for a in addresses if "planner/index" not in a) and site.site_address().startswith("https://")


def test_pages_stay_small():
    """What a reader downloads: no page above half a megabyte, the pictures in them included."""
    large = {n.name: n.stat().st_size for n in PROSE if n.stat().st_size > 512 * 1024}
    assert not large


def test_each_task_has_a_tutorial_that_ends_with_a_picture():
    for name in ("02_right_bytes", "03_does_it_fit", "04_which_gpus", "05_same_function", "06_other_numbers",
                 "07_finetune_7b", "08_serve_8b_120b", "09_from_log_to_part"):
        cells = json.loads((ROOT / f"nbs/tutorials/{name}.ipynb").read_text(encoding="utf-8"))["cells"]
        last = [c for c in cells if c["cell_type"] == "code"][-1]
        assert any("image/svg+xml" in o.get("data", {}) for o in last["outputs"]), name


def test_the_gate_sees_each_fault(tmp_path):
    """A link to a page's .html, a missing file and a missing anchor are found; sound ones are not."""
    def page(name, text): (tmp_path / name).write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": [text]}]})); return tmp_path / name
    other = page("other.ipynb", "# Other\n\n## Two words")
    links = {"other.ipynb": True, "other.ipynb#two-words": True, "other.html": False, "none.ipynb": False, "other.ipynb#three": False, "https://example.org": True}
    assert other.exists() and all(resolves(page("one.ipynb", "x"), link) == good for link, good in links.items())
