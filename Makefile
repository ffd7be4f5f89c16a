# Every target sets up what it needs: `make demo` and `make test` work in a fresh clone on a fresh machine.
# Needs Python 3.11 to 3.13 with venv and pip; nothing else. PYTHON=… picks another interpreter, OUT=… another demo folder.

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT   ?= out/demo
ARGS  ?=

# The first interpreter that runs, is of a supported version and can make virtual environments; 3.11 is the tested one.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1 \
	&& echo $$p && break; done)

# One thread per process: Ray and torch otherwise start one per core in each of many processes.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
export RAY_USAGE_STATS_ENABLED ?= 0
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-gpu bench lint format types lock clean distclean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/\1\t\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F'\t' '{printf "  make %-10s %s\n", $$1, $$2}'

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 with venv was found. Install one (Debian: apt-get install python3.11 python3.11-venv) or run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing the versions of constraints.txt into $(VENV): about two minutes, longer where torch comes with CUDA ..."
	@$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[test,dev]'
	@$(BIN)/python -m pip check
	@touch $@

setup: $(STAMP)  ## virtual environment with the pinned versions

demo: $(STAMP)  ## train, embed, index, evaluate, serve on the embedded corpus; leaves $(OUT)/report.html
	$(BIN)/crem demo --out $(OUT) $(ARGS)

test: $(STAMP)  ## the tests, without those marked slow or gpu
	$(BIN)/python -m pytest -m 'not slow and not gpu' $(ARGS)

test-all: $(STAMP)  ## all tests that need no GPU
	$(BIN)/python -m pytest -m 'not gpu' $(ARGS)

test-gpu: $(STAMP)  ## the tests that need a GPU
	$(BIN)/python -m pytest -m gpu $(ARGS)

bench: $(STAMP)  ## benchmarks; print ratios
	$(BIN)/python -m tests.bench.bench_step $(ARGS)
	$(BIN)/python -m tests.bench.bench_cache $(ARGS)
	$(BIN)/python -m tests.bench.bench_attention $(ARGS)
	$(BIN)/python -m tests.bench.bench_compile $(ARGS)
	$(BIN)/python -m tests.bench.bench_decode $(ARGS)
	$(BIN)/python -m tests.bench.bench_duplicates

lint: $(STAMP)  ## ruff: rules and format; deptry: declared dependencies are those imported
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/deptry .

format: $(STAMP)  ## let ruff fix what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(STAMP)  ## mypy, strict, on all packages
	$(BIN)/mypy

lock: $(STAMP)  ## write constraints.txt from the virtual environment
	@$(BIN)/python -m pip install -qq --editable '.[test,dev,corpus]'
	@{ sed -n '/^#/p' constraints.txt; \
	$(BIN)/python -m pip freeze --exclude-editable --exclude crem | sed 's/^\(torch==[0-9.]*\)+.*/\1/'; } > constraints.new
	@mv constraints.new constraints.txt

clean:  ## remove caches and outputs
	rm -rf out build ./*.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean  ## also remove the virtual environment
	rm -rf $(VENV)
