# Every target sets up what it needs in .venv; only Python (>= 3.11) and make must be there.
PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
# What is imported is compiled then; to compile all of it beforehand takes a minute.
INSTALL := $(BIN)/python -m pip install -q --disable-pip-version-check --no-compile -c constraints.txt
DEMO_STAMP := $(VENV)/.stamp-demo
DEV_STAMP := $(VENV)/.stamp-dev

.PHONY: setup demo test lint bench clean
# Two installations must not write to one environment at the same time.
.NOTPARALLEL:

setup: $(DEV_STAMP)

demo: $(DEMO_STAMP)
	$(BIN)/mep train digits --model mlp --optimizer ep --compare backprop --out runs/demo

# One thread for each worker: two workers with a thread pool each would fight over the cores.
test: $(DEV_STAMP)
	$(BIN)/ruff check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

# pyright fetches its checker when first used, so it is kept out of `make test`.
lint: $(DEV_STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

bench: $(DEMO_STAMP)
	$(BIN)/mep bench speed

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find mep tests -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("mep needs Python >= 3.11; try make PYTHON=..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(DEMO_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e .
	@touch $@

# The development set contains the demo's, so it brings both stamps up to date.
$(DEV_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e ".[dev]"
	@touch $(DEMO_STAMP) $@
