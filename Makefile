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
	$(BIN)/python tests/mutants.py --sample 24 --seed 1  # a survivor without a reason stops the build
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

export: $(VENV)/.dev  ## notebooks -> package, schemas, README and command reference
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export
	$(BIN)/python -c "from fsdl_devinfra.core.results import write_schemas; write_schemas()"
	$(BIN)/python tests/make_readme.py
	$(BIN)/python tests/make_reference.py

reference: $(VENV)/.dev  ## the command reference with every example run anew (a minute)
	$(BIN)/python tests/make_reference.py --all

shape: $(VENV)/.dev  ## sizes of functions, lines and notebook cells: a mirror, not a gate
	@$(BIN)/python tests/shape.py

mutants: $(VENV)/.dev  ## faults in the lines that decide something: each must make a test fail
	$(BIN)/python tests/mutants.py

studies: $(VENV)/.dev  ## every study whole, by hand: hours; each prints its figures (those on image models need timm and torchvision)
	@failed=0; for study in tests/studies/*.py; do echo "== $$study"; $(BIN)/python $$study --seed 0 || failed=1; done; exit $$failed

VENVT ?= .venv-timm
$(VENVT)/.timm: settings.ini setup.py pyproject.toml | $(VENV)/bin/python
	@$(BIN)/python -m venv $(VENVT)
	@$(VENVT)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[torch]' pytest torch==2.14.1 torchvision==0.29.1 timm diffusers accelerate peft datasets fastai lightning torchmetrics
	@touch $@

trace-timm: $(VENVT)/.timm  ## by hand, over an hour and 6 GB: the traced scripts, scripts with published peaks, and a fixed sample of 80 timm models, under torch 2.14 in .venv-timm
	$(VENVT)/bin/python -m pytest -q tests/test_trace_dryrun.py tests/test_trace_scripts.py tests/test_trace_ranks.py tests/test_trace_replay.py
	$(VENVT)/bin/python tests/studies/trace_scripts.py --seed 1
	$(VENVT)/bin/python tests/studies/trace_timm_memory.py --seed 1 --models 80 --half held-out --batches 8 64 --minutes 120

VENV214 ?= .venv-torch214
$(VENV214)/.dev: settings.ini setup.py pyproject.toml | $(VENV)/bin/python
	@$(BIN)/python -m venv $(VENV214)
	@$(VENV214)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[torch,onnx]' pytest torch==2.14.1 torchvision==0.29.1 timm
	@touch $@

test-torch214: $(VENV214)/.dev  ## by hand, 6 GB: a fixed sample of the tests of trace, load and parity under torch 2.14 in .venv-torch214
	$(VENV214)/bin/python -m pytest -q -m "not slow" tests/test_trace_replay.py tests/test_hub_load.py tests/test_parity_faults.py

bench: $(VENV)/.dev  ## ours and its peer in turn, one row each
	$(BIN)/python tests/benchmarks/run.py

docs: $(VENV)/.dev  ## the site in _docs (needs Quarto)
	@command -v quarto >/dev/null || { echo "Quarto is needed to build the site: install it from https://quarto.org/docs/get-started, then run make docs again"; exit 1; }
	$(BIN)/nbdev_docs
	$(BIN)/python tests/make_planner.py
	$(BIN)/python tests/make_site_files.py

planner: $(VENV)/.dev  ## the planner as a static page in _docs/planner (needs npm)
	$(BIN)/python tests/make_planner.py

web:  ## onnxruntime-web from npm in build/, for the tests in a browser (needs npm; Chromium or node runs them)
	@command -v npm >/dev/null || { echo "npm is needed: install Node.js, then run make web again"; exit 1; }
	npm install --silent --no-audit --no-fund --prefix build onnxruntime-web

dist: $(VENV)/.dev  ## sdist and wheel in dist/
	$(BIN)/python -m build

clean:  ## remove what these commands made
	rm -rf $(VENV) $(VENV3) .venv-launchers _docs _proc build dist *.egg-info $(REPORT)

.PHONY: help setup demo test test-slow gates accuracy test-nbdev3 export reference shape mutants studies trace-timm test-torch214 bench docs planner web dist clean
