# Every target makes what it needs: on a machine with Python 3.11 and make, `make demo` is the first command.

PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
TORCH  ?= torch==2.13.0
JOBS   ?= 2
ARGS   ?=

VENV := .venv
BIN  := $(VENV)/bin

export HF_HUB_OFFLINE ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-xla fuzz lint bench wheel-check clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/dev.stamp ## the four problems, before and after nxfx
	$(BIN)/python examples/demo.py $(ARGS)

test: $(VENV)/dev.stamp ## run the tests (JOBS=2 processes, ARGS="-k narrow"; ARGS="-m slow": the slow ones, which this leaves out)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not slow" $(ARGS)

test-xla: ## run the passes, capture and hand-off tests on torch 2.9 with torch-xla (7 GB; skipped when the disk has less)
	JOBS=$(JOBS) .ci/test-xla $(PYTHON) $(ARGS)

fuzz: $(VENV)/dev.stamp ## random programs against eager (ARGS="--what writes|bounds|integers|branches|precision --programs 50000 --seed 0")
	OMP_NUM_THREADS=1 PYTHONPATH=.:tests $(BIN)/python -W ignore tests/fuzz.py $(ARGS)

lint: $(VENV)/dev.stamp ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/dev.stamp ## time the pipeline against torch.export, the boundary, check and localisation
	PYTHONPATH=.:tests $(BIN)/python tests/bench/pipeline.py $(ARGS)
	PYTHONPATH=. $(BIN)/python tests/bench/boundary.py
	PYTHONPATH=. $(BIN)/python tests/bench/check.py
	PYTHONPATH=. $(BIN)/python tests/bench/localise.py

wheel-check: $(VENV)/dev.stamp ## build the wheel and try it in a clean environment, away from this tree
	TORCH='$(TORCH)' .ci/wheel-check $(BIN)/python

clean: ## remove the environment, builds and caches
	rm -rf $(VENV) .venv-xla build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find nxfx passes tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone: its pinned version decides what everything after it resolves to.
$(VENV)/torch.stamp:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install '$(TORCH)'
	touch $@

$(VENV)/dev.stamp: $(VENV)/torch.stamp pyproject.toml
	$(BIN)/python -m pip install -e '.[dev]'
	touch $@
