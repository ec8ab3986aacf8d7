# Two commands: `make serve` tries it, `make test` checks it. Both set up .venv first, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A CPU build first, so that a machine without a GPU does not fetch several GB of CUDA libraries.
TORCH ?= torch==2.13.0

.PHONY: serve test lint format setup setup-dev clean

serve: setup
	$(BIN)/quire serve $(ARGS)

# Two at a time, a file of tests after the other; `make test ARGS="-n 0 -x tests/sched"` for one by one.
test: setup-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(VENV)/.installed
setup-dev: $(VENV)/.installed-dev

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	touch $@

KERNELS := $(wildcard csrc/* csrc/*/*)

$(VENV)/.installed: $(VENV)/.torch pyproject.toml $(KERNELS)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
