# `make serve` runs the server, `make test` every check; both create .venv on first use, with what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SERVES := $(VENV)/.serves
WHOLE := $(VENV)/.whole
ARGS ?=
# Processes that run tests; each takes whole stretches of modules, so that their fixtures are made once.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))

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
	PYTHONDONTWRITEBYTECODE= $(BIN)/pytest --numprocesses $(WORKERS) --dist worksteal $(ARGS)

clean:
	rm -rf $(VENV) build logs .mypy_cache .pytest_cache .ruff_cache
