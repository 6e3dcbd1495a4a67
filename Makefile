# make demo    the main job, on the GPU if there is one
# make test    format, lint, types, tests
# make docs    the site, build/site/index.html
#
# Each makes its own virtual environment on first use and again when setup.cfg changes.
# PYTHON=python3.12 chooses the interpreter, CUDA=13 the CUDA 13 wheels (they need a newer driver),
# JOBS=8 the number of test processes, ARGS="--m 64" goes to the demo.

SHELL := /bin/bash
PYTHON ?= python3
CUDA ?= 12
JOBS ?= 2
ARGS ?=

ifeq ($(filter $(CUDA),12 13),)
$(error CUDA must be 12 or 13; got '$(CUDA)')
endif

# Two CuPys in one environment shadow each other, hence one environment per CUDA.
VENV := $(if $(filter 13,$(CUDA)),.venv-cuda13,.venv)
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := cpgemm tests $(wildcard examples docs)

.PHONY: help demo docs test check lint format types pytest compile doctor clean

help:
	@sed -n 's/^# \{0,1\}//;1,8p' Makefile

demo: $(STAMP)
	$(BIN)/python -m cpgemm demo $(ARGS)

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo "written: build/site/index.html"

test: check pytest

check: lint types

lint: $(STAMP)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)

types: $(STAMP)
	$(BIN)/mypy

pytest: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS)

format: $(STAMP)
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

compile: $(STAMP)
	$(BIN)/python -m cpgemm compile --all --arch sm_90a --json build/kernels.json

doctor: $(STAMP)
	$(BIN)/python -m cpgemm doctor

$(STAMP): setup.cfg pyproject.toml
	@command -v $(PYTHON) >/dev/null || { \
	  echo "cpgemm: no '$(PYTHON)' on PATH; install Python 3.10 or newer, or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "cpgemm: Python 3.10 or newer is needed; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Name a newer one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; \
	  exit 1; }
	@test -x $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1 \
	  || $(PYTHON) -m venv --clear $(VENV) || { \
	  echo "cpgemm: '$(PYTHON) -m venv' fails; on Debian and Ubuntu run: apt install python3-venv" >&2; \
	  exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[cuda$(CUDA),test,docs]"
	@touch $@

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find cpgemm tests -name __pycache__ -type d -prune -exec rm -rf {} +
