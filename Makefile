# Set-up happens once, on the first target that needs it; after that no target touches the network.
#
#   make demo                       the main job, end to end: out/demo.html and out/demo.json
#   make test                       the tests that this machine can run in some minutes
#   make test PYTEST_ARGS='-m "not slow"'
#   make test PYTEST_ARGS='-m long'  the rest, which takes some minutes more
#   make test PYTEST_ARGS=-n0        in one process, one test after another
#   make stress                     faults at random for ten minutes, and hostile bytes; STRESS_ARGS=--help tells more
#
# PYTHON=python3.12 chooses another interpreter, CONSTRAINTS=/dev/null the newest releases in the ranges of
# pyproject.toml.

PYTHON ?= python3.11
CONSTRAINTS ?= constraints.txt
EXTRAS ?= workers,dev
PYTEST_ARGS ?=
STRESS_ARGS ?=
# On two cores in minutes: with one worker and with two, and what they are compared with.
BENCH_PARTS ?= ceilings diffusers xfuser-2 'workers-*' load-pretrained tensor-ipc

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

export HF_HUB_OFFLINE := 1
# Tests and benchmarks start many processes: where Python must not write bytecode, each compiles every module again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format bench stress clean

help:
	@sed -n '/^#   make/s/^# *//p' Makefile
	@echo 'also: install, lint, format, bench, stress, clean'

install: $(STAMP)

# Without build isolation, the build backend comes from the same tested set and stays installed, so that the tests
# can build the wheel with the network off.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo '$(PYTHON): not found; install it, or name another one: make PYTHON=python3.12' >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c $(CONSTRAINTS) hatchling
	$(PIP) install -q -c $(CONSTRAINTS) --no-build-isolation -e '.[$(EXTRAS)]'
	@touch $@

demo: $(STAMP)
	$(BIN)/xditd demo --out out

test: $(STAMP)
	$(BIN)/pytest -n auto -m 'not long' $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python benchmarks/run.py control_plane
	$(BIN)/python benchmarks/run.py suite --device cpu --small --only $(BENCH_PARTS)

stress: $(STAMP)
	$(BIN)/python tests/stress/run.py $(STRESS_ARGS)

clean:
	rm -rf $(VENV) build dist out .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
