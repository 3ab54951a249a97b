# `make serve` runs the server, `make test` every check; both create .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=

.PHONY: setup serve test lint types unit clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,figures,ray]"
	$(BIN)/python -m toppings.ops.cpu_warm_up # so that the first start is as fast as the next one
	touch $@

serve: setup
	$(BIN)/toppings serve $(ARGS)

test: lint types unit

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

unit: setup
	$(BIN)/pytest $(ARGS)

clean:
	rm -rf $(VENV) build logs .mypy_cache .pytest_cache .ruff_cache
