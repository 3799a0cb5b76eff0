# Two commands matter: `make demo` and `make test`. Each does all set-up first, in .venv; `make help` lists the rest.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
VENV3 ?= .venv-nbdev3
BIN := $(VENV)/bin
BIN3 := $(VENV3)/bin
# On Linux the public wheel of torch carries CUDA (gigabytes). Name an index of CPU wheels of your own choosing to avoid it:
#   make demo TORCH_INDEX=https://…
TORCH_INDEX ?=
PIP_FLAGS := --quiet --disable-pip-version-check -c constraints-dev.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
REPORT ?= preflight-report

help:  ## this list
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## /{printf "make %-12s %s\n", $$1, $$2}' Makefile

# One stamp a set of requirements: set-up runs again only when these files change.
$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 or newer is needed: install it, or say which: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$$($(PYTHON) --version) is too old: Python 3.11 or newer is needed (make PYTHON=python3.12)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "Python's venv module is missing: on Debian and Ubuntu, apt install python3-venv; on Fedora it comes with python3"; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: settings.ini setup.py pyproject.toml constraints-dev.txt | $(VENV)/bin/python
	@echo "setting up $(VENV) (about 300 MB with a CPU build of torch) …"
	@$(BIN)/python -m pip install $(PIP_FLAGS) -e '.[torch,onnx]'
	@$(BIN)/python -m compileall -q fsdl_devinfra
	@touch $@

$(VENV)/.dev: settings.ini setup.py pyproject.toml constraints-dev.txt | $(VENV)/bin/python
	@echo "setting up $(VENV) for development …"
	@$(BIN)/python -m pip install $(PIP_FLAGS) -e '.[dev]'
	@$(BIN)/python -m compileall -q fsdl_devinfra
	@touch $(VENV)/.demo $@

setup: $(VENV)/.dev  ## the development environment in .venv

demo: $(VENV)/.demo  ## the main job on the small model in the package
	$(BIN)/fsdl-devinfra preflight -o $(REPORT)

test: $(VENV)/.dev  ## gates (clean, export, schemas, readme), notebooks, pytest
	@$(MAKE) --no-print-directory gates
	$(BIN)/python tests/run_notebooks.py
	$(BIN)/python -m pytest -q -m "not slow" tests
	@$(MAKE) --no-print-directory accuracy

accuracy: $(VENV)/.dev  ## estimates against published measurements; fails below the gate
	$(BIN)/python tests/accuracy.py

test-slow: $(VENV)/.dev  ## slow cells and slow tests, and the notebooks under nbdev 3
	$(BIN)/python tests/run_notebooks.py --slow
	$(BIN)/python -m pytest -q -m slow --timeout 1500 tests
	@$(MAKE) --no-print-directory test-nbdev3

gates: $(VENV)/.dev  ## is the package what the notebooks say?
	@$(BIN)/python tests/gates.py

$(VENV3)/.dev: settings.ini setup.py pyproject.toml constraints-dev.txt | $(VENV)/bin/python
	@$(PYTHON) -m venv $(VENV3)
	@$(BIN3)/python -m pip install $(PIP_FLAGS) -e '.[dev3]'
	@touch $@

test-nbdev3: $(VENV3)/.dev  ## the same checkout under nbdev 3 and fastcore 2
	@$(BIN3)/python tests/gates.py --nbdev3
	$(BIN3)/python tests/run_notebooks.py --nbdev3

export: $(VENV)/.dev  ## notebooks -> package, schemas and README
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export
	$(BIN)/python -c "from fsdl_devinfra.core.results import write_schemas; write_schemas()"
	$(BIN)/python tests/make_readme.py

bench: $(VENV)/.dev  ## ours and its peer in turn, one row each
	$(BIN)/python tests/benchmarks/run.py

docs: $(VENV)/.dev  ## the site in _docs (needs Quarto)
	@command -v quarto >/dev/null || { echo "Quarto is needed to build the site: install it from https://quarto.org/docs/get-started, then run make docs again"; exit 1; }
	$(BIN)/nbdev_docs

dist: $(VENV)/.dev  ## sdist and wheel in dist/
	$(BIN)/python -m build

clean:  ## remove what these commands made
	rm -rf $(VENV) $(VENV3) .venv-launchers _docs _proc build dist *.egg-info $(REPORT)

.PHONY: help setup demo test test-slow gates accuracy test-nbdev3 export bench docs dist clean
