# Everything a newcomer needs; `make` alone lists it.  Assumes a Python >= 3.11, make, and access to package registries.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
# `make setup PYTHON=/path/to/python3.13` chooses the interpreter; otherwise the first of these that is new enough is taken.
PYTHON ?=
INTERPRETERS := $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11 python
# Worker processes of the test runs: a number, or `auto` for one a core.
JOBS ?= auto
PYTEST_ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1

# `make bench BENCH=full` measures every environment; a quick run the table of targets and a few.
BENCH ?= quick

# How long `make fuzz` works on each target.
SECONDS ?= 60
# What it tries: a number tries the same again, 0 something else each time.
SEED ?= 0

.PHONY: help setup demo test lint types torture fuzz bench clean tools
.DEFAULT_GOAL := help

help:
	@echo "make demo      watch a real disk image go through a backing chain and come out identical"
	@echo "make test      install what the tests need (qemu-utils too, where it can) and run them"
	@echo "make setup     only build $(VENV) and install blocklib there, ready as $(BIN)/blocklib"
	@echo "make lint      ruff"
	@echo "make types     mypy, strict"
	@echo "make torture   the property tests as campaigns that take minutes"
	@echo "make fuzz      look for inputs that break a promise, SECONDS=60 for each target, two at a time"
	@echo "make bench     measure blocklib beside qemu-img, with BENCH=full in every environment"
	@echo "make clean     remove what these targets made"

# Compiled here and not at the first start, which may be one that writes no bytecode: every start would compile anew.
setup: $(STAMP)
	@$(BIN)/python -m compileall -q blocklib

# A .venv that works is kept and brought up to date; one whose interpreter is gone or too old is built anew.
$(STAMP): pyproject.toml
	@set -eu; \
	new_enough='import sys; sys.exit(sys.version_info < (3, 11))'; \
	if ! $(BIN)/python -c "$$new_enough" 2>/dev/null || ! $(BIN)/python -c 'import pip' 2>/dev/null; then \
		found=; without_venv=; \
		for candidate in $(INTERPRETERS); do \
			"$$candidate" -c "$$new_enough" 2>/dev/null || continue; \
			if "$$candidate" -c 'import ensurepip, venv' 2>/dev/null; then found=$$candidate; break; fi; \
			without_venv=$$candidate; \
		done; \
		if [ -z "$$found" ] && [ -n "$$without_venv" ]; then \
			echo "blocklib: $$without_venv is new enough but cannot make virtual environments; install its venv module (on Debian: apt-get install python3-venv)" >&2; exit 1; \
		elif [ -z "$$found" ]; then \
			echo "blocklib: no Python 3.11 or newer was found; install one, or name it: make setup PYTHON=/path/to/python3" >&2; exit 1; \
		fi; \
		echo "making $(VENV) with $$("$$found" -c 'import sys; print(sys.executable, sys.version.split()[0])')"; \
		"$$found" -m venv --clear $(VENV); \
	fi; \
	echo "installing blocklib and its tools into $(VENV)"; \
	$(BIN)/python -m pip install --quiet --editable '.[dev]'; \
	$(BIN)/python -m compileall -q blocklib; \
	$(BIN)/python -c 'from blocklib._fast import warm; warm()' 2>/dev/null; \
	touch $@

demo: setup
	@$(BIN)/python examples/demo.py

# The programs that interop tests compare with.  Without them the tests still run; the summary says what was left out.
tools:
	@PATH="$$PATH:/usr/sbin:/sbin"; \
	missing() { for program in qemu-img qemu-io nbdinfo nbdkit mkfs.ext4; do command -v $$program >/dev/null || { echo $$program; return 0; }; done; return 1; }; \
	if missing >/dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing qemu-utils, nbdkit, libnbd-bin and e2fsprogs"; \
		install() { DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends qemu-utils nbdkit libnbd-bin e2fsprogs >/dev/null 2>&1; }; \
		install || { apt-get update >/dev/null 2>&1 && install; } || true; \
	fi; \
	if missing >/dev/null; then \
		echo "$$(missing) is not here and could not be installed (on Debian: apt-get install qemu-utils nbdkit libnbd-bin e2fsprogs): tests that need it will not run"; \
	fi

test: setup tools
	@$(BIN)/python -m pytest -n $(JOBS) $(PYTEST_ARGS)

# Every example-based property test again with a profile of many examples, and whatever is too long for `make test`.
torture: setup tools
	@$(BIN)/python -m pytest -n $(JOBS) -m "torture or hypothesis" --hypothesis-profile=torture --timeout=0 $(PYTEST_ARGS)

# Where there is no atheris, one line says that nothing was fuzzed.
fuzz: setup
	@$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/python -m pip install --quiet --editable '.[fuzz]' 2>/dev/null || true
	@$(BIN)/python -m tests.fuzz --seconds $(SECONDS) --seed $(SEED)

# Prints the ratios and saves them, with the facts of the machine, as .benchmarks/latest.json; images stay in .benchmarks/images.
bench: setup tools
	@mkdir -p .benchmarks
	@unset PYTHONDONTWRITEBYTECODE; $(BIN)/python -m pytest benchmarks $(if $(filter full,$(BENCH)),--full) -p no:xdist --timeout=0 \
		--benchmark-columns=median,min,iqr,rounds --benchmark-json=.benchmarks/latest.json $(PYTEST_ARGS)

lint: setup
	@$(BIN)/ruff check .

types: setup
	@$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info blocklib/_fast/__kernels__ .benchmarks .fuzz .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -type d -name __pycache__ -prune -exec rm -rf {} +
