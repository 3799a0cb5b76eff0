"""What dataclasses declare, read from source that cannot be imported here: Megatron Bridge needs packages of CUDA at once."""
from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

KINDS = {"int": int, "float": (int, float), "bool": bool, "str": str, "list": list, "List": list, "None": type(None)}


@dataclass(frozen=True)
class Declared:
    """A class where it stands."""
    module: str
    node: ast.ClassDef


class Sources:
    """Modules below a folder, by their dotted names."""
    def __init__(self, root: Path): self.root = root

    def path(self, module: str) -> Path | None:
        base = self.root / Path(*module.split("."))
        return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)

    @functools.cache  # noqa: B019
    def tree(self, module: str) -> ast.Module | None:
        path = self.path(module)
        return ast.parse(path.read_text(encoding="utf-8")) if path else None

    def absolute(self, module: str, node: ast.ImportFrom) -> str:
        """The module that an import names, where it is relative to the one it stands in."""
        path, parts = self.path(module), module.split(".")
        up = node.level - (1 if path and path.name == "__init__.py" else 0)
        inside = parts[: len(parts) - up] if node.level else []
        return ".".join([*inside, *(node.module or "").split(".")]).strip(".")

    @functools.cache  # noqa: B019
    def derives(self, cls: Declared | None, name: str) -> bool:
        """Whether a class, or one of its bases, has a name."""
        if cls is None: return False
        bases = (b.value if isinstance(b, ast.Subscript) else b for b in cls.node.bases)
        return cls.node.name == name or any(self.derives(self.declared(cls.module, b.id), name) for b in bases if isinstance(b, ast.Name))

    @functools.cache  # noqa: B019
    def names(self, module: str) -> dict[str, ast.AST | tuple[str, str]]:
        """Name → its definition in the module, or the module and name it is imported from."""
        found: dict[str, ast.AST | tuple[str, str]] = {}
        for node in ast.walk(self.tree(module) or ast.Module([], [])):
            if isinstance(node, ast.ImportFrom):
                found |= {alias.asname or alias.name: (self.absolute(module, node), alias.name) for alias in node.names}
            elif isinstance(node, (ast.ClassDef, ast.FunctionDef)): found.setdefault(node.name, node)
            elif isinstance(node, ast.Assign): found |= {t.id: node for t in node.targets if isinstance(t, ast.Name) and t.id not in found}
        return found

    @functools.cache  # noqa: B019
    def find(self, module: str, name: str) -> tuple[str, ast.AST] | None:
        """Where a name is really defined."""
        found = self.names(module).get(name)
        if isinstance(found, tuple): return self.find(*found) if found != (module, name) else None
        return (module, found) if found is not None else None

    @functools.cache  # noqa: B019
    def declared(self, module: str, name: str) -> Declared | None:
        found = self.find(module, name)
        return Declared(found[0], found[1]) if found and isinstance(found[1], ast.ClassDef) else None

    @functools.cache  # noqa: B019
    def fields(self, cls: Declared) -> dict[str, tuple[str, ast.expr]]:
        """Field → the module that its annotation is of, and the annotation; those of base classes first."""
        found: dict[str, tuple[str, ast.expr]] = {}
        for base in cls.node.bases:
            name = base.value if isinstance(base, ast.Subscript) else base
            parent = self.declared(cls.module, name.id) if isinstance(name, ast.Name) else None
            if parent: found |= self.fields(parent)
        own = (n for n in cls.node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name))
        return found | {n.target.id: (cls.module, n.annotation) for n in own}  # type: ignore[union-attr]


def _options(annotation: ast.expr) -> Iterator[ast.expr]:
    """The alternatives of an annotation: of `A | B`, `Union[A, B]` and `Optional[A]`."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str): annotation = ast.parse(annotation.value, mode="eval").body
    if isinstance(annotation, ast.BinOp): yield from (o for side in (annotation.left, annotation.right) for o in _options(side))
    elif isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value).split(".")[-1] in ("Union", "Optional"):
        inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        yield from (o for one in inner for o in _options(one))
        if "Optional" in ast.unparse(annotation.value): yield ast.Constant(None)
    else: yield annotation


def accepts(annotation: ast.expr, value: ast.expr, sources: Sources, of: Declared | None = None) -> bool:
    """Whether a value as written in a file is of an annotation: a literal of the type, or a name or call of the class `of`."""
    try: literal, plain = ast.literal_eval(value), True
    except ValueError: literal, plain = None, False
    for option in _options(annotation):
        name = ast.unparse(option.value if isinstance(option, ast.Subscript) else option)
        if plain and name.split(".")[-1] == "Literal" and literal in ast.literal_eval(ast.Tuple(option.slice.elts if isinstance(option.slice, ast.Tuple) else [option.slice], ast.Load())): return True  # type: ignore[union-attr]
        if plain and name in KINDS and isinstance(literal, KINDS[name]) and not (isinstance(literal, bool) and name in ("int", "float")): return True
        if not plain and sources.derives(of, name.split(".")[-1]): return True
    return False


def faults(sources: Sources, text: str, container: tuple[str, str]) -> list[str]:
    """What a program that assigns `config.a.b = value` says that the dataclasses do not: a name, a field, a value of another type."""
    tree, said = ast.parse(text), []
    for node in (n for n in tree.body if isinstance(n, ast.ImportFrom)):
        said += [f"{node.module} has no {a.name}" for a in node.names if not sources.find(str(node.module), a.name)]
    imported = {a.asname or a.name: (str(n.module), a.name) for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).startswith("config."): said += _assigned(sources, node, container, imported)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.keywords and (cls := sources.declared(*imported.get(node.func.id, ("", "")))):
            known = sources.fields(cls)
            said += [f"{node.func.id} takes no {k.arg} = {ast.unparse(k.value)}" for k in node.keywords if k.arg not in known or not accepts(known[k.arg][1], k.value, sources)]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and (cls := sources.declared(*imported.get(node.value.id, ("", "")))):
            members = {ast.unparse(n.targets[0]) for n in cls.node.body if isinstance(n, ast.Assign)}
            if node.attr not in members: said.append(f"{node.value.id} has no {node.attr}")
    return said


def _assigned(sources: Sources, node: ast.Assign, container: tuple[str, str], imported: dict[str, tuple[str, str]]) -> list[str]:
    of = sources.declared(*imported.get(ast.unparse(node.value).split("(")[0].split(".")[0], ("", "")))
    path, reached = ast.unparse(node.targets[0]).split(".")[1:], [sources.declared(*container)]
    for i, name in enumerate(path):
        held = [(f[name]) for f in (sources.fields(c) for c in reached if c) if name in f]
        if not held: return [f"there is no {'.'.join(path[: i + 1])}"]
        if i == len(path) - 1: return [] if any(accepts(a, node.value, sources, of) for _, a in held) else [f"{'.'.join(path)} cannot be {ast.unparse(node.value)}"]
        reached = [sources.declared(m, ast.unparse(o)) for m, a in held for o in _options(a) if isinstance(o, ast.Name)]
    return []
