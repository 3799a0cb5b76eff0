"""The checkout itself: notebooks as the source, one configuration for two nbdevs, light imports, and the rooms' arrows."""
from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT, copy_checkout, settings

PACKAGE = ROOT / "fsdl_devinfra"
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "_modidx.py")
#: who may import whom; arrows run down this list only
ROOMS = {"core": set(), "hub": {"core"}, "trace": {"core", "hub"}, "memory": {"core", "hub", "trace"}, "env": {"core"},
         "compute": {"core", "hub", "trace", "memory"}, "launch": {"core", "memory", "compute", "env"},
         "parity": {"core", "hub", "trace", "env"}, "validation": {"core", "hub", "trace", "memory", "compute"}}


def cells(notebook: Path) -> list[dict]:
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


# --- notebooks

@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT / "nbs")))
def test_notebook_form(notebook):
    document = json.loads(notebook.read_text(encoding="utf-8"))
    assert document["nbformat"] == 4 and document["nbformat_minor"] >= 5
    ids = [c.get("id") for c in document["cells"]]
    assert all(ids) and len(set(ids)) == len(ids), "every cell needs an id of its own, or the two nbdevs export different files"
    title = next("".join(c["source"]) for c in document["cells"] if c["cell_type"] == "markdown")
    assert re.match(r"# \S", title) and "\n> " in title or any("".join(c["source"]).startswith("> ") for c in document["cells"][:3]), "a title and a > subtitle"


def test_no_page_hands_expect_fail_a_function():
    """It is a context manager: `expect_fail(lambda: …)` calls nothing, and fourteen lines of four pages tested nothing."""
    found = [f"{notebook.relative_to(ROOT)} {cell['id']}" for notebook in NOTEBOOKS for cell in cells(notebook) if "expect_fail(lambda" in "".join(cell["source"])]
    assert not found, found


def test_no_page_compares_frozen_sets_item_by_item():
    """fastcore's `test_eq` knows sets and takes frozen ones for sequences: two equal ones differ as the seed of `hash` falls. CI would fail once in a while."""
    compared = re.compile(r"test_eq\(.*frozenset\(\{[^}]*,")
    found = [f"{notebook.relative_to(ROOT)} {cell['id']}" for notebook in NOTEBOOKS for cell in cells(notebook) if compared.search("".join(cell["source"]))]
    assert not found, found


def test_imports_have_cells_of_their_own():
    """Building the docs runs every cell that imports something, alone: other code in it would fail there."""
    mixed = []
    for notebook in NOTEBOOKS:
        for cell in cells(notebook):
            source = "".join(cell["source"])
            if cell["cell_type"] != "code" or re.search(r"^#\|\s*(export|default_exp|eval: false)", source, re.M) or source.startswith("%%"): continue
            try: body = ast.parse(source).body
            except SyntaxError: continue  # shell lines
            imports = [n for n in body if isinstance(n, (ast.Import, ast.ImportFrom))]
            if imports and len(imports) < len(body): mixed.append(f"{notebook.relative_to(ROOT)} {cell['id']}")
    assert not mixed, mixed


def test_outputs_in_git_are_small_and_name_no_machine():
    for notebook in NOTEBOOKS:
        text = notebook.read_text(encoding="utf-8")
        assert len(text) < 1_000_000, f"{notebook.name} has {len(text):,} characters"
        assert "image/png" not in text, f"{notebook.name}: SVG or text, please"
        outputs = json.dumps([c.get("outputs") for c in json.loads(text)["cells"]])
        found = re.search(r"(/home/(?!runner/work)|/root/|/Users/|/tmp/(tmp|pytest)|/[\w./-]+/site-packages/)[\w./-]+", outputs)
        assert not found, f"{notebook.name}: {found[0]}"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT / "nbs")))
def test_no_output_in_git_is_an_error(notebook):
    outputs = [o for c in cells(notebook) for o in c.get("outputs", ())]
    assert not [o["evalue"] for o in outputs if o["output_type"] == "error"]
    assert not [o["text"] for o in outputs if re.search(r"Traceback \S*\(most recent call last\)|^\S*-{70,}", "".join(o.get("text", "")))], "a traceback was printed"


def test_exported_lines_fit_on_a_screen():
    "150 characters; rows of tables and patterns, which lose by being broken, are those with many bars."
    files = [f for f in PACKAGE.rglob("*.py") if f.name != "_modidx.py"]
    long = [f"{f.name}:{i}" for f in files for i, line in enumerate(f.read_text().splitlines(), 1) if len(line) > 150 and line.count("|") < 4]
    assert len(files) > 50 and not long


def test_readme_is_what_the_index_says():
    assert subprocess.run([sys.executable, "tests/make_readme.py", "--check"], cwd=ROOT).returncode == 0, "README.md is stale: make export"


@pytest.mark.slow
def test_pages_for_the_site(tmp_path):
    """What Quarto would render is made without Quarto: every notebook becomes a page with a title."""
    copy = copy_checkout(tmp_path / "checkout")
    done = subprocess.run([sys.executable, "-c", "from nbdev.serve import proc_nbs; proc_nbs(n_workers=0)"], cwd=copy, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    for notebook in NOTEBOOKS:
        page = copy / "_proc" / notebook.relative_to(ROOT / "nbs")
        assert page.is_file(), f"no page for {notebook.name}"
        assert "title:" in page.read_text(encoding="utf-8")
    assert not (copy / "_proc" / "_quarto.yml").is_symlink() and "fsdl-devinfra" in (copy / "_proc" / "_quarto.yml").read_text()


# --- configuration

def test_both_nbdevs_are_told_the_same():
    ini, nbdev3 = settings(), tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["nbdev"]
    for key in ("lib_path", "nbs_path", "doc_path", "tst_flags", "branch", "doc_baseurl", "readme_nb"): assert str(nbdev3[key]) == ini[key], key
    for key in ("recursive", "update_pyproject", "custom_sidebar", "clean_ids"): assert str(nbdev3[key]) == ini[key], key
    assert ini["update_pyproject"] == "False" and ini["doc_host"] == "" and ini["doc_baseurl"] == "/"
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"] == {"Repository": ini["git_url"]}


def test_version_is_said_once():
    assert f'__version__ = "{settings()["version"]}"' in (PACKAGE / "__init__.py").read_text()
    assert f"## {settings()['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_upper_bounds_stay_in_dev():
    for key, value in settings().items():
        if key in ("requirements", *(k for k in settings() if k.endswith("_extra"))) and key != "dev_extra":
            for line in filter(None, value.splitlines()): assert "<" not in line.split(";")[0], f"{key}: {line}"


def test_quarto_configuration_is_linked():
    link = ROOT / "nbs" / "_quarto.yml"
    assert link.is_symlink() and os.readlink(link) == "../_quarto.yml" and (PACKAGE / "py.typed").exists()


def test_no_registry_is_named():
    """Where packages come from is the business of whoever installs them."""
    hosts = re.compile(r"https?://[\w.-]*(pypi|pythonhosted|artifactory|nexus|jfrog|devpi)[\w.-]*", re.I)
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    named = [f for f in tracked if f and (ROOT / f).is_file() and (ROOT / f).stat().st_size < 2**20 and hosts.search((ROOT / f).read_text("utf-8", "ignore"))]
    assert not [f for f in named if not f.startswith(("tests/test_env", "nbs/environment", "fsdl_devinfra/env"))], named


# --- code

def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "fsdl_devinfra" and parts[1] in ROOMS else None


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_between_rooms_run_down(room):
    wrong = []
    for path in (PACKAGE / room).glob("*.py"):
        name = f"fsdl_devinfra.{room}"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                base = name.split(".")[:2 - (node.level - 1)] if node.level else []
                target = ".".join([*base, node.module or ""]).rstrip(".")
            elif isinstance(node, ast.Import): target = node.names[0].name
            else: continue
            other = room_of(target)
            if other and other != room and other not in ROOMS[room]: wrong.append(f"{path.name}: {target}")
    assert not wrong, wrong


def test_exported_signatures_are_annotated():
    bare = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_") or node.col_offset > 4: continue
            if node.col_offset == 4 and not any(isinstance(c, ast.ClassDef) and node in c.body and not c.name.startswith("_") for c in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(c, ast.ClassDef)): continue
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare += [f"{path.relative_to(PACKAGE)}:{node.name}({a.arg})" for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            if node.returns is None: bare.append(f"{path.relative_to(PACKAGE)}:{node.name} ->")
    assert not bare, bare


def fresh(code: str, *arguments: str) -> str:
    return subprocess.run([sys.executable, *arguments, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_import_is_light():
    """Wall time above bare Python, best of five each, in turns."""
    def seconds(code: str) -> float:
        import time
        start = time.perf_counter(); fresh(code)
        return time.perf_counter() - start
    pairs = [(seconds("pass"), seconds("import fsdl_devinfra")) for _ in range(5)]
    assert min(b for _, b in pairs) - min(a for a, _ in pairs) < 0.15
    assert "torch" not in fresh("import fsdl_devinfra, sys; print(*sys.modules)").split()


HEAVY = {"torch", "transformers", "onnxruntime", "matplotlib"}


@pytest.mark.parametrize("command", ["hub inspect", "hub lock -o {tmp}/l.json", "memory --gpu h100", "env capture", "memory --params 7B --states-only"])
def test_commands_that_need_no_tensors_import_none(command, tmp_path):
    argv = command.format(tmp=tmp_path).split()
    code = f"import sys; from fsdl_devinfra.cli import main; status = main({argv!r}); print(status, *sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    status, *loaded = done.stderr.splitlines()[-1].split()
    assert status == "0", done.stderr[-500:]
    assert not HEAVY & set(loaded)


@pytest.mark.parametrize("room", [r for r in ROOMS if (PACKAGE / r / "__init__.py").exists()])
def test_rooms_import_light(room):
    assert not HEAVY & set(fresh(f"import fsdl_devinfra.{room}, sys; print(*sys.modules)").split())


def test_every_level_of_help_has_an_example(cli):
    from fsdl_devinfra.cli import available, make_parser
    import argparse
    def walk(parser, path):
        yield path, parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, sub in action.choices.items(): yield from walk(sub, [*path, name])
    for path, parser in walk(make_parser(None), []):
        text = parser.format_help()
        assert "example" in text.lower() and "fsdl-devinfra" in text.split("xample")[-1], f"no example in: fsdl-devinfra {' '.join(path)} --help"
    assert set(available()) >= {"preflight", "hub", "memory", "onnx", "env"}


def test_results_validate_against_their_schemas(cli, tmp_path):
    from jsonschema import Draft202012Validator
    documents = {"hub inspect": "checkpoint.1", "memory": "memory.1", "env capture": "env.1"}
    for command, name in documents.items():
        ran = cli(*command.split(), "--json")
        assert ran.status == 0, ran.err
        schema = json.loads((PACKAGE / "schemas" / f"{name}.json").read_text())
        Draft202012Validator(schema).validate(ran.json)
        assert ran.json["schema"] == schema["title"] and ran.json["environment"]["python"]


def test_a_wrong_argument_is_a_document_with_json(cli):
    for argv in (["memory", "--gpu"], ["hub", "inspekt"], ["memory", "--dp", "-1"], ["nonsense"]):
        ran = cli(*argv, "--json")
        assert ran.status == 2 and set(ran.json) >= {"error", "hint"}, argv
        assert cli(*argv).status == 2


# --- the house drawn from its imports

def imports_of(path: Path) -> set[str]:
    """Modules of the package that a module imports, in functions too; imports for the type checker alone do not count."""
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = {id(n) for block in ast.walk(tree) if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test) for n in ast.walk(block)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in guarded: continue
        if isinstance(node, ast.Import): found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[:len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return {name for name in found if name.startswith("fsdl_devinfra.")}


def house() -> dict[str, set[str]]:
    """Module → modules of the package that it imports; the lazy packages' own `__init__` left out."""
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in MODULES if p.name != "__init__.py"}
    return {name: imports_of(path) & names.keys() - {name} for name, path in names.items()}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other."""
    def reached(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            for following in graph[todo.pop()] - seen:
                seen.add(following)
                todo.append(following)
        return seen
    reach = {name: reached(name) for name in graph}
    groups = {tuple(sorted(other for other in reach[name] if name in reach[other])) for name in graph if name in reach[name]}
    return sorted(list(group) for group in groups)


def test_no_circle_of_files():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == [["b", "c"]]  # the test itself sees one
    graph = house()
    assert len(graph) > 80 and "fsdl_devinfra.memory.architecture" in graph["fsdl_devinfra.memory.footprint"]
    assert not circles(graph)


def test_no_module_is_named_like_what_its_package_exports():
    for package in sorted(p.parent for p in MODULES if p.name == "__init__.py" and p.parent != PACKAGE):
        exported = fresh(f"import fsdl_devinfra.{package.name} as p; print(*getattr(p, '__all__', []))").split()
        modules = {p.stem for p in package.glob("*.py")}
        assert not modules & set(exported), package.name
