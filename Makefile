# Everything a newcomer needs: `make quickstart` and `make test`. Each target sets up what it needs by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Huge pages for XLA's buffers, which are fresh memory at every call: a quarter to a third less time on a CPU.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
# A file of tests per process: compiling, where most of the time goes, uses one core. Most tests run each program once
# or twice: machine code without optimisation is made in two thirds of the time.
QUICK_COMPILER := XLA_FLAGS="$(XLA_FLAGS) --xla_backend_optimization_level=0"
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
PIP := $(BIN)/pip install --disable-pip-version-check --quiet --constraint tools/constraints.txt

.PHONY: quickstart test parity libero test-libero lint notebooks clean

quickstart: $(VENV)/.base
	$(BIN)/python experiments/quickstart.py

test: $(VENV)/.dev
	$(QUICK_COMPILER) $(PYTEST) -m "not parity and not libero"

# Against PyTorch and transformers (CPU builds); the published reference numbers in ../shared where they exist.
parity: $(VENV)/.parity
	$(PYTEST) -m parity

# The real LIBERO simulator, lean (no torch), headless.
libero: $(VENV)/.libero

test-libero: $(VENV)/.dev $(VENV)/.libero
	$(BIN)/python -m pytest -m libero

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

notebooks: $(VENV)/.dev
	$(BIN)/python -m pytest --nbmake notebooks/*.ipynb

$(VENV)/bin/python:
	@echo "creating $(VENV) and installing the pinned packages (1 to 2 minutes)"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: $(VENV)/bin/python pyproject.toml tools/constraints.txt
	$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) -e '.[dev]'
	@touch $@

$(VENV)/.parity: $(VENV)/.dev
	$(PIP) -e '.[parity]'
	@touch $@

$(VENV)/.libero: $(VENV)/.base tools/setup_libero.sh
	$(PIP) -e '.[libero]'
	bash tools/setup_libero.sh $(BIN)/python
	@touch $@

clean:
	rm -rf $(VENV) .cache runs
