# Everything that a checkout needs; `make` lists it. Only Python 3.11 or 3.12 and make must be there.
VENV ?= .venv
GPU_VENV ?= .venv-gpu
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# PyTorch publishes its CPU builds on an index of its own.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# No test takes that many seconds, even where other work keeps the cores busy; one that hangs must not hide what the
# others found.
PYTEST := $(BIN)/pytest --timeout 1500 --durations 12
# Two at once: a run of the real stack waits much, for one process after another to import it. Their order is the
# conftest's.
QUICK := $(PYTEST) --numprocesses 2
SLOW := $(QUICK) --dist loadfile --no-loadscope-reorder

# Bytecode is worth having: every Ray actor imports flashrl, verl, vLLM and torch anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup gpu demo test unit integration fmt lint type golden tables lock clean

help:  ## List the targets.
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(READY)  ## Make .venv with the CPU stack, the test tools and flashrl (PYTHON=… to choose one).
	@echo "$(VENV) is ready"

$(READY): requirements/install.sh requirements/cpu.txt requirements/dev.txt requirements/gym.txt pyproject.toml
	TORCH_INDEX=$(TORCH_INDEX) bash requirements/install.sh $(VENV) cpu
	@touch $@

gpu: $(GPU_VENV)/.ready  ## Make .venv-gpu with the GPU stack (Linux, x86_64), the test tools and flashrl.
	@echo "$(GPU_VENV) is ready: . $(GPU_VENV)/bin/activate; flashrl doctor tells what this machine lacks"

$(GPU_VENV)/.ready: requirements/install.sh requirements/gpu.txt requirements/dev.txt requirements/gym.txt pyproject.toml
	bash requirements/install.sh $(GPU_VENV) gpu
	@touch $@

demo: $(READY)  ## Prepare, train with INT8 rollouts and TIS, evaluate; results in demo/.
	$(BIN)/python benchmarks/demo.py

test: lint type  ## Run all checks, and the tests of every layer that needs no GPU.
	$(QUICK) tests/unit tests/golden tests/contract
	$(SLOW) tests/integration

unit: $(READY)  ## Run the unit tests.
	$(QUICK) tests/unit

integration: $(READY)  ## Run the tests on the real stack: verl, Ray, vLLM.
	$(SLOW) tests/integration

fmt: $(READY)  ## Format the code and fix what ruff can fix.
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

lint: $(READY)  ## Check style and formatting.
	$(BIN)/ruff check
	$(BIN)/ruff format --check

type: $(READY)  ## Check types.
	$(BIN)/mypy

golden: $(READY)  ## Write the golden files anew; read the diff before you commit it.
	$(PYTEST) --renew-golden tests/golden tests/unit/config/test_schema.py

tables: $(READY)  ## Write the tables of the documentation anew, from benchmarks/results.
	$(BIN)/python -m benchmarks.tables

lock: $(READY)  ## Resolve requirements/*.txt anew (UPGRADE=1: to the newest versions).
	UV=$(abspath $(BIN))/uv UPGRADE=$(UPGRADE) bash requirements/renew.sh

clean:  ## Remove the virtual environment and the caches.
	rm -rf $(VENV) $(GPU_VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
