"""The planner as a static page: the page of nbs/planner, the package as bytecode, a snapshot of a Python that has it in memory, and the Pyodide runtime from npm.

    python tests/make_planner.py [FOLDER]        # default: _docs/planner, as `make docs` does

Pyodide is looked for in build/pyodide and installed there with npm where it is missing. Nothing of it belongs into a commit.
"""
from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "nbs" / "planner"
PYODIDE = "314.0.7"
#: what the planner imports, and the data that it reads; the rest of the package stays out
PARTS = ("__init__.py", "core", "hub", "trace", "memory", "compute", "models", "prices")
RUNTIME = ("pyodide.mjs", "pyodide.asm.mjs", "pyodide.asm.wasm", "python_stdlib.zip", "pyodide-lock.json")


def pyodide_folder() -> Path | None:
    """Where npm has put Pyodide, or None."""
    folder = ROOT / "build" / "pyodide" / "node_modules" / "pyodide"
    return folder if all((folder / name).is_file() for name in RUNTIME) else None


def install_pyodide() -> Path:
    npm = shutil.which("npm")
    if npm is None: sys.exit("the planner page needs Pyodide: install Node.js with npm, then run this again")
    (ROOT / "build" / "pyodide").mkdir(parents=True, exist_ok=True)
    subprocess.run([npm, "install", "--silent", "--no-save", "--prefix", str(ROOT / "build" / "pyodide"), f"pyodide@{PYODIDE}"], check=True)
    found = pyodide_folder()
    if found is None: sys.exit(f"npm installed pyodide, but {', '.join(RUNTIME)} are not all there")
    return found


def wheel(into: Path) -> Path:
    """The package as it is in this checkout."""
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)  # setuptools would pack what an earlier build left there
    line = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "--quiet", "--disable-pip-version-check", "-w", str(into)]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    return next(into.glob("*.whl"))


#: compiled by the Python that will run it: compiling 60 modules in the browser took three quarters of the time to import them
COMPILE = """
import { loadPyodide } from %(runtime)s; import fs from "fs";
const python = await loadPyodide();
python.unpackArchive(new Uint8Array(fs.readFileSync(%(wheel)s)), "zip", { extractDir: "/whole" });
python.runPython(`
import compileall, pathlib, shutil
whole, package = pathlib.Path("/whole/fsdl_devinfra"), pathlib.Path("/package/fsdl_devinfra")
package.mkdir(parents=True)
for name in %(parts)s: (shutil.copytree if (whole / name).is_dir() else shutil.copy2)(whole / name, package / name)
assert compileall.compile_dir(package, stripdir="/package", quiet=1, legacy=True)
for source in package.rglob("*.py"): source.unlink()
shutil.make_archive("/package", "zip", "/package")
`);
fs.writeFileSync(%(package)s, python.FS.readFile("/package.zip"));
"""


#: the memory of a Python that has imported and read everything: starting one and importing takes five times as long as copying it
SNAPSHOT = """
import { loadPyodide } from %(runtime)s; import fs from "fs"; import zlib from "zlib";
const python = await loadPyodide({ _makeSnapshot: true });
python.unpackArchive(new Uint8Array(fs.readFileSync(%(package)s)), "zip", { extractDir: "/package" });
python.globals.set("questions", %(questions)s);
python.runPython(`
import gc, json, sys
sys.path.insert(0, "/package")
from fsdl_devinfra.compute.planner import reply
for call, address in json.loads(questions): reply(call, address)
del questions
gc.collect()
`);
fs.writeFileSync(%(snapshot)s, zlib.gzipSync(python.makeMemorySnapshot(), { level: 9 }));
"""

#: asked before the snapshot is taken, so that modules and tables that are read late are in it
ADDRESSES = ("", "method=full&gpus=8&zero=3", "method=qlora&gpus=2", "use=serve", "model=nobody-knows-it", "gpu=h1000")
QUESTIONS = [("describe", ""), *((call, address) for address in ADDRESSES for call in ("answer", "speed", "machines", "remedies"))]


def _run(template: str, **values: object) -> None:
    node = shutil.which("node")
    if node is None: sys.exit("the planner page is compiled with Node.js: install it, then run this again")
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "script.mjs"
        script.write_text(template % {name: json.dumps(str(value) if isinstance(value, Path) else value) for name, value in values.items()})
        subprocess.run([node, str(script)], check=True)


def package(into: Path, pyodide: Path) -> None:
    """`package.zip`: the parts that the planner needs, compiled."""
    with tempfile.TemporaryDirectory() as folder:
        _run(COMPILE, runtime=pyodide / "pyodide.mjs", wheel=wheel(Path(folder)), package=into / "package.zip", parts=PARTS)


def snapshot(into: Path, pyodide: Path, questions: list[tuple[str, str]]) -> None:
    """`python.snapshot`: the memory of a Python that has answered these questions."""
    _run(SNAPSHOT, runtime=pyodide / "pyodide.mjs", package=into / "package.zip", snapshot=into / "python.snapshot", questions=json.dumps(questions))


def make(folder: Path, pyodide: Path) -> Path:
    """Everything a web server has to hand out, in `folder`."""
    (folder / "pyodide").mkdir(parents=True, exist_ok=True)
    for source in sorted(PAGE.iterdir()): shutil.copyfile(source, folder / source.name)
    for name in RUNTIME: shutil.copyfile(pyodide / name, folder / "pyodide" / name)
    shutil.copyfile(ROOT / "nbs" / "favicon.svg", folder.parent / "favicon.svg")
    package(folder, pyodide)
    snapshot(folder, pyodide, QUESTIONS)
    return folder


if __name__ == "__main__":
    target = make(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "_docs" / "planner").resolve(), pyodide_folder() or install_pyodide())
    print(f"{target}: {sum(f.stat().st_size for f in target.rglob('*') if f.is_file()) / 2**20:.1f} MiB")
