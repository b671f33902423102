# Needs Python 3.11 or newer and make; no root. `make` alone lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# make demo CORPUS=DIR: a folder with images/ and annotations/instances_{train,val}.json. RECIPE=NAME to choose another.
CORPUS ?=
RECIPE ?= $(if $(CORPUS),nuclei,demo)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint format lock

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' Makefile

setup: $(INSTALLED)  ## virtual environment with the pinned packages; done once

demo: setup  ## the whole path, on a drawn corpus or on CORPUS=DIR
	$(BIN)/boxinst demo --recipe $(RECIPE) $(if $(CORPUS),--corpus $(CORPUS))

test: setup  ## all tests, two files at a time: most wait for a process that starts
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-all: setup  ## the long tests too: real kills, servers and environments of their own
	$(BIN)/python -m pytest -m "" $(ARGS)

lint: setup  ## style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: setup  ## correct what ruff can correct
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

lock: setup  ## resolve the dependencies anew into requirements.lock
	$(BIN)/uv pip compile pyproject.toml --extra dev --extra mongo --extra server -o requirements.lock \
	  --python-version 3.11 --no-emit-index-url --no-annotate --custom-compile-command "make lock"

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than 3.11: name another one, make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip sync --quiet --python $(BIN)/python requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@
