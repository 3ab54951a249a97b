# `make serve` runs the server, `make test` every check; both create .venv on first use, with what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SERVES := $(VENV)/.serves
WHOLE := $(VENV)/.whole
ARGS ?=
# Processes that run tests, two more than cores: many tests wait for the processes that they start.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 6 ? n + 2 : 8)))
# Each takes whole modules, so that their fixtures are made once, and in the order of tests/order.py.
DISTRIBUTION := --dist loadfile --no-loadscope-reorder

.PHONY: setup serve test lint types unit clean

setup: $(WHOLE)

$(WHOLE): pyproject.toml constraints.txt scripts/install.sh
	scripts/install.sh --python $(PYTHON) --venv $(VENV) --extras dev,figures,ray --editable --with-model
	touch $(SERVES) $@

$(SERVES): pyproject.toml constraints.txt scripts/install.sh
	scripts/install.sh --python $(PYTHON) --venv $(VENV) --editable --with-model
	touch $@

serve: $(SERVES)
	$(BIN)/toppings serve $(ARGS)

# Types are checked while the first tests run.
test: setup
	$(MAKE) -j2 lint types unit

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

unit: setup
	PYTHONDONTWRITEBYTECODE= $(BIN)/pytest --numprocesses $(WORKERS) $(DISTRIBUTION) $(ARGS)

clean:
	rm -rf $(VENV) build logs .mypy_cache .pytest_cache .ruff_cache
