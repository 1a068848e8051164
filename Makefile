# On a fresh machine: `make demo`, `make study`, `make test`. Each sets up .venv first, once.

PYTHON ?= python3
VENV   ?= .venv
# Row of torchrec_freq/_versions.py to install, named by its torch version; empty: the default.
STACK  ?=
# Build of FBGEMM, cpu or cuda; empty: cuda where the NVIDIA driver is found, else cpu.
FBGEMM ?=
# Empty: pip says what it does.
QUIET  ?= -qq
# Processes of demo and benchmark (one a GPU, two without). Arguments of demo, study and benchmark:
# ARGS="--epochs 1".
RANKS  ?= $(shell $(PY) -c 'import torch; print(torch.cuda.device_count() or 2)')
ARGS   ?=

VERSIONS := torchrec_freq/_versions.py
PY       := $(VENV)/bin/python
READY    := $(VENV)/.ready

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo study study-full bench gpu test test-all test-next lint format docs wheel clean distclean

# Ranks and test processes share the cores: one OpenMP thread each, or they slow each other down.
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "Variables: PYTHON, VENV, STACK (2.13 or 2.14), FBGEMM (cpu or cuda), QUIET, RANKS, ARGS (of demo, study, bench and gpu)"

setup: $(READY)  ## create .venv with torch, FBGEMM, TorchRec and this package (once; again: make -B setup)

# Both builds of FBGEMM own the same folder, so what is there goes first: it may be the other one.
# Without a GPU .ci/fbgemm-cpu fulfils TorchRec's requirement on fbgemm-gpu with the CPU build.
$(READY): pyproject.toml Makefile $(VERSIONS) .ci/fbgemm-cpu/setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	    echo "PYTHON=$(PYTHON) is missing or older than 3.10 (it says: $$($(PYTHON) --version 2>&1))." >&2; \
	    echo "Name a newer one: make PYTHON=python3.11 ..." >&2; exit 1; }
	@set -eu; \
	pins=$$($(PYTHON) -I $(VERSIONS) pins $(STACK)); \
	build=$(FBGEMM); [ -n "$$build" ] || build=$$($(PYTHON) -I $(VERSIONS) build); \
	case $$build in \
	    cpu) fbgemm=.ci/fbgemm-cpu ;; \
	    cuda) fbgemm=fbgemm-gpu ;; \
	    *) echo "FBGEMM=$$build is neither cpu nor cuda." >&2; exit 1 ;; \
	esac; \
	echo "Setting up $(VENV) with" $$pins "($$build build): some minutes the first time"; \
	[ -x $(PY) ] || $(PYTHON) -m venv $(VENV); \
	rm -f $(READY); \
	printf '%s\n' "$$pins" > $(VENV)/constraints.txt; \
	$(PY) -m pip uninstall -qq -y fbgemm-gpu fbgemm-gpu-cpu; \
	FBGEMM_VERSION=$${pins##*==} $(PY) -m pip install $(QUIET) -c $(VENV)/constraints.txt \
	    $$fbgemm -e ".[dev]" || { echo "To see more of what pip did: make setup QUIET=" >&2; exit 1; }; \
	$(PY) -I $(VERSIONS) check; \
	touch $(READY)

demo: setup  ## train a sharded DLRM on MovieLens-100K with three optimizers
	@$(PY) -m torch.distributed.run --standalone --nproc-per-node $(RANKS) -m examples.demo $(ARGS)

study: setup  ## compare optimizers on real data: the main table and picture, some minutes
	@$(PY) -m benchmarks.study quick $(ARGS)

study-full: setup  ## all of the study, about 90 minutes; cut off, it goes on where it was
	@$(PY) -m benchmarks.study full --tables benchmarks/study $(ARGS)

bench: setup  ## time a step with FrequencySGD beside other optimizers
	@$(PY) -m benchmarks.bench --ranks $(RANKS) $(ARGS)

# Not in .venv: in the environment that trains, which may have no network either.
gpu:  ## time a step on this machine's GPUs with PYTHON as it is, and write a report to share
	@$(PYTHON) -I $(VERSIONS) check
	@$(PYTHON) -m benchmarks.bench --gpu --out runs/gpu $(ARGS)

# Two processes, each with a module of tests at a time: what a module prepares is made once.
PYTEST = $(PY) -m pytest -n 2 --dist loadscope --durations=10

test: lint  ## lint, type-check, and run the tests but the slow ones
	@$(PYTEST)

test-all: lint  ## the same with the slow ones
	@$(PYTEST) -m ""

test-next:  ## all tests with torch 2.14, in .venv-next
	@$(MAKE) --no-print-directory test-all STACK=2.14 VENV=.venv-next

lint: setup  ## ruff and mypy
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check
	@$(PY) -m mypy

format: setup  ## let ruff rewrite the sources
	@$(PY) -m ruff check --fix
	@$(PY) -m ruff format

docs: setup  ## build the documentation into docs/_build/html
	@$(PY) -m sphinx -W -n -q docs docs/_build/html
	@echo "docs/_build/html/index.html"

wheel: setup  ## build and check the wheel and the source archive, into dist
	@rm -rf dist
	@$(PY) -m build -q
	@$(PY) -m twine check --strict dist/*

clean:  ## remove build products and caches
	@rm -rf build dist docs/_build *.egg-info .ci/fbgemm-cpu/build .ci/fbgemm-cpu/*.egg-info
	@rm -rf .mypy_cache .pytest_cache .ruff_cache
	@find torchrec_freq benchmarks docs examples launch tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## also remove the environments, the downloaded data and results of runs
	@rm -rf .venv .venv-next $(VENV) .data runs
