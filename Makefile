# Two commands matter: `make demo` and `make test`. Both do all set-up in .venv first.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Where to take torch from, for example a CPU-only index of your own choosing: make demo TORCH_INDEX=https://…
TORCH_INDEX ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check
PIP_FLAGS := -q -c constraints-dev.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: export schemas clean-notebooks

export:  ## notebooks -> package
	$(BIN)/nbdev_export

schemas: export  ## annotations -> JSON Schemas in the package
	$(BIN)/python -c "from fsdl_devinfra.core.results import write_schemas; write_schemas()"
