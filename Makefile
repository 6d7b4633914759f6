# `make demo` and `make test` need Python 3.11+ and make; everything else is installed into .venv, pinned by constraints.txt.
SHELL := /bin/sh
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
PYTEST_ARGS ?= -n auto --dist worksteal
DEMO_ARGS ?=
BENCH_ARGS ?=
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
# A GPU is used where the driver speaks CUDA 13; elsewhere the small CPU build of torch is taken.
comma := ,
GPU := $(shell nvidia-smi 2>/dev/null | grep -c 'CUDA Version: 13')
EXTRA_GPU := $(if $(filter-out 0,$(GPU)),$(comma)cuda13)
FRAME := pyproject.toml constraints.txt
TESTED := train,convert,finetune,peers,frontends,test

.PHONY: help demo test lint format types imports docs examples wheel bench-gpu clean
.DELETE_ON_ERROR:

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/train  ## train a small transformer with five optimizers, side by side (DEMO_ARGS="...")
	$(BIN)/refopt train $(DEMO_ARGS)

test: $(VENV)/test  ## the test suite; GPU tests skip where there is no GPU (PYTEST_ARGS="...")
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/dev  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/dev  ## rewrite to ruff's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/dev  ## mypy
	$(BIN)/mypy

imports: $(VENV)/dev  ## the import contract of setup.cfg
	$(BIN)/lint-imports

docs: $(VENV)/docs  ## docs/_build/html, warnings are errors
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

examples: $(VENV)/test  ## run every example (the documentation and the tests run them, too)
	@set -e; for f in examples/[0-9]*.py; do echo "$$f"; $(BIN)/python $$f; done

wheel: $(VENV)/dev  ## dist/*.whl
	rm -rf build dist
	$(BIN)/python -m build -q --wheel --outdir dist .

bench-gpu: $(VENV)/test  ## measure on a GPU, append to docs/bench/results.csv, draw (BENCH_ARGS="--quick --commit ...")
	$(BIN)/python -m tests.bench.gpu_optim $(BENCH_ARGS)
	$(BIN)/python -m tests.bench.gpu_step $(BENCH_ARGS)
	$(BIN)/python -m tests.bench.gpu_twin $(BENCH_ARGS)
	$(BIN)/python -m tests.bench.convergence $(BENCH_ARGS)
	$(BIN)/python -m tests.bench.plots

clean:  ## remove everything that make made
	rm -rf $(VENV) build dist *.egg-info docs/_build docs/examples .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "refopt needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first and alone: the CPU index is asked for nothing else, and is skipped where it cannot be reached.
$(VENV)/torch: $(FRAME) | $(BIN)/python
ifeq ($(EXTRA_GPU),)
	$(PIP) install --retries 0 --no-deps --extra-index-url $(TORCH_CPU_INDEX) -c constraints.txt torch
endif
	@touch $@

$(VENV)/train: $(VENV)/torch
	$(PIP) install -c constraints.txt -e '.[train$(EXTRA_GPU)]'
	@touch $@

$(VENV)/test: $(VENV)/train
	$(PIP) install -c constraints.txt -e '.[$(TESTED)$(EXTRA_GPU)]'
	@touch $@

$(VENV)/docs: $(VENV)/test
	$(PIP) install -c constraints.txt -e '.[$(TESTED),docs$(EXTRA_GPU)]'
	@touch $@

# All of it at once: pip looks at everything that is installed each time it is called.
$(VENV)/all: $(VENV)/torch
	$(PIP) install -c constraints.txt -e '.[$(TESTED),dev,docs$(EXTRA_GPU)]'
	@touch $(VENV)/train $(VENV)/test $(VENV)/dev $(VENV)/docs $@

$(VENV)/dev: $(VENV)/test
	$(PIP) install -c constraints.txt -e '.[$(TESTED),dev$(EXTRA_GPU)]'
	@touch $@
