"""What the code looks like from outside: sizes of functions, lines and notebook cells, beside other projects if given.

    python tests/shape.py [NAME=PACKAGE_FOLDER[:NOTEBOOK_FOLDER]]…

A mirror, not a gate: where a table or a long formula reads better, it stays. Tokens are names, operators, numbers and
strings, docstrings left out; a decision is a branch, a loop, a comprehension, a condition in one, or an `and`/`or`.
"""
from __future__ import annotations

import argparse
import ast
import io
import json
import statistics
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
BRANCHES = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.IfExp, ast.Assert)
COUNTED = {tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING}
LONG_LINE = 110


def percentile(values: list[int], share: float) -> int:
    ordered = sorted(values)
    return ordered[round(share * (len(ordered) - 1))] if ordered else 0


@dataclass
class Code:
    """Counts over the modules of one package."""
    tokens: list[int] = field(default_factory=list)  # of each function
    function_lines: list[int] = field(default_factory=list)
    decisions: list[int] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)  # length of each line that is not empty
    semicolons: int = 0
    nested_comprehensions: int = 0
    imports_in_functions: int = 0
    parameters: int = 0
    one_letter: int = 0
    largest: tuple[int, str] = (0, "")


def decisions_of(function: ast.AST) -> int:
    """Decisions in a function, those of functions inside it left out."""
    count = 0
    todo = list(ast.iter_child_nodes(function))
    while todo:
        node = todo.pop()
        if isinstance(node, FUNCTIONS): continue
        todo += ast.iter_child_nodes(node)
        if isinstance(node, BRANCHES): count += 1
        elif isinstance(node, ast.BoolOp): count += len(node.values) - 1
        elif isinstance(node, ast.comprehension): count += 1 + len(node.ifs)
        elif isinstance(node, ast.match_case): count += 1
    return count


def inside(tree: ast.AST, outer: tuple[type, ...], inner: tuple[type, ...]) -> Iterator[ast.AST]:
    """Nodes of a kind that stand inside a node of another (or the same) kind."""
    seen = set()
    for node in ast.walk(tree):
        if not isinstance(node, outer): continue
        for child in ast.walk(node):
            if child is not node and isinstance(child, inner) and id(child) not in seen:
                seen.add(id(child))
                yield child


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> range:
    """The lines of a function's body without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) and len(function.body) > 1 else function.body
    return range(body[0].lineno, (function.end_lineno or 0) + 1)


def measure_module(path: Path, code: Code) -> None:
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    by_line: Counter[int] = Counter()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in COUNTED: by_line[token.start[0]] += 1
        if token.type == tokenize.OP and token.string == ";": code.semicolons += 1
    code.lines += [len(line) for line in source.splitlines() if line.strip()]
    code.nested_comprehensions += sum(1 for _ in inside(tree, COMPREHENSIONS, COMPREHENSIONS))
    code.imports_in_functions += sum(1 for _ in inside(tree, FUNCTIONS, (ast.Import, ast.ImportFrom)))
    for node in ast.walk(tree):
        if not isinstance(node, FUNCTIONS): continue
        tokens = sum(by_line[i] for i in body_lines(node))
        code.tokens.append(tokens)
        code.function_lines.append((node.end_lineno or 0) - node.lineno + 1)
        code.decisions.append(decisions_of(node))
        code.largest = max(code.largest, (tokens, f"{path.name}:{node.name}"))
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs) if a.arg not in ("self", "cls")]
        code.parameters += len(names)
        code.one_letter += sum(len(name) == 1 for name in names)


def measure_package(folder: Path) -> Code:
    code = Code()
    for path in sorted(folder.rglob("*.py")):
        if path.name != "_modidx.py": measure_module(path, code)
    return code


@dataclass
class Pages:
    """Counts over the notebooks of one project."""
    cells: list[int] = field(default_factory=list)  # lines of each exported cell that is more than imports
    followed: int = 0  # exported cells with an example as the next code cell
    exported_lines: int = 0
    example_lines: int = 0
    words: int = 0
    pictures: int = 0
    notebooks: int = 0


def code_lines(source: str) -> list[str]:
    return [line for line in source.splitlines() if line.strip() and not line.lstrip().startswith("#|")]


def is_exported(source: str) -> bool: return "#| export" in source or "#|export" in source


def only_imports(source: str) -> bool:
    try: body = ast.parse(source).body
    except SyntaxError: return False
    plain = (ast.Import, ast.ImportFrom)
    guarded = [n for n in body if isinstance(n, ast.If)]
    return bool(body) and all(isinstance(n, plain) or n in guarded for n in body)


def measure_notebook(path: Path, pages: Pages) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    pages.notebooks += 1
    pages.words += sum(len("".join(c["source"]).split()) for c in cells if c["cell_type"] == "markdown")
    outputs = json.dumps([c.get("outputs", []) for c in cells])
    pages.pictures += "<svg" in outputs or "<table" in outputs or "image/" in outputs
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    for source, following in zip(code, [*code[1:], ""]):
        lines = code_lines(source)
        if not is_exported(source):
            pages.example_lines += len(lines)
            continue
        pages.exported_lines += len(lines)
        if only_imports(source) or not lines: continue
        pages.cells.append(len(lines))
        pages.followed += bool(following) and not is_exported(following)


def measure_notebooks(folder: Path) -> Pages:
    pages = Pages()
    for path in sorted(folder.rglob("*.ipynb")):
        if ".ipynb_checkpoints" not in path.parts: measure_notebook(path, pages)
    return pages


def rows(code: Code, pages: Pages) -> dict[str, str]:
    """Name of a measurement → its value as text."""
    functions = max(1, len(code.tokens))
    cells = max(1, len(pages.cells))
    return {
        "functions": str(len(code.tokens)),
        "lines of a function, p90": str(percentile(code.function_lines, 0.9)),
        "tokens of a function, median / p90": f"{percentile(code.tokens, 0.5)} / {percentile(code.tokens, 0.9)}",
        "largest function": f"{code.largest[0]} ({code.largest[1]})",
        "functions with more than 10 decisions": f"{100 * sum(d > 10 for d in code.decisions) / functions:.1f} %",
        f"lines over {LONG_LINE} characters": f"{100 * sum(n > LONG_LINE for n in code.lines) / max(1, len(code.lines)):.1f} %",
        "semicolons": str(code.semicolons),
        "nested comprehensions": str(code.nested_comprehensions),
        "imports inside functions": str(code.imports_in_functions),
        "one-letter parameters": f"{code.one_letter} of {code.parameters}",
        "notebooks, with a picture or table": f"{pages.notebooks}, {pages.pictures}",
        "exported cell, median / p90 lines": f"{statistics.median(pages.cells) if pages.cells else 0:g} / {percentile(pages.cells, 0.9)}",
        "exported cells with an example below": f"{100 * pages.followed / cells:.0f} %",
        "example lines for each exported line": f"{pages.example_lines / max(1, pages.exported_lines):.2f}",
        "prose words for each exported line": f"{pages.words / max(1, pages.exported_lines):.1f}",
    }


def main() -> int:
    projects = {"ours": (ROOT / "fsdl_devinfra", ROOT / "nbs")}
    for room in ("core", "hub", "trace", "memory", "compute", "launch", "parity"):
        projects[room] = (ROOT / "fsdl_devinfra" / room, ROOT / "nbs" / room)
    projects["env"] = (ROOT / "fsdl_devinfra" / "env", ROOT / "nbs" / "environment")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("others", nargs="*", metavar="NAME=PACKAGE[:NOTEBOOKS]", help="another project, to stand beside ours")
    for argument in parser.parse_args().others:
        name, _, folders = argument.partition("=")
        if not Path(folders.partition(":")[0]).is_dir(): parser.error(f"{argument}: no such folder")
        package, _, notebooks = folders.partition(":")
        projects[name] = (Path(package), Path(notebooks or package))
    projects = {name: folders for name, folders in projects.items() if folders[0].is_dir()}
    table = {name: rows(measure_package(p), measure_notebooks(n)) for name, (p, n) in projects.items()}
    for label in next(iter(table.values())):
        print(f"{label:42}" + "  ".join(f"{name} {values[label]}" for name, values in table.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
