# Everything a newcomer needs: `make run` and `make test` set up what they use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# Test processes beside one another: most of the time goes by in waiting for real processes.
TESTERS ?= 4
LOCK := --universal --python-version 3.11 --generate-hashes --no-header --no-emit-index-url --no-annotate --quiet

.PHONY: run test lint lock clean
.DELETE_ON_ERROR:

run: $(VENV)/.run ## run the daemon; pass arguments with ARGS="--cycles 10"
	@exec $(BIN)/perpd run $(ARGS)

test: $(VENV)/.test ## run the whole test suite; ARGS="-n 0 -k words" runs some of it in one process
	$(BIN)/python -m pytest -n $(TESTERS) --dist loadgroup --no-loadscope-reorder $(ARGS)

lint: $(VENV)/.test ## style, imports and strict types
	$(BIN)/ruff check service tests
	$(BIN)/ruff format --check service tests
	$(BIN)/mypy

bench: $(VENV)/.run ## a short round of all benchmarks; writes docs/benchmarks.md
	$(BIN)/python -m service.bench.report docs/benchmarks.md

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "perpd needs Python 3.11 or newer; set PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: requirements.lock pyproject.toml | $(VENV)/bin/python
	@echo "setting up $(VENV) (once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

$(VENV)/.test: requirements-dev.lock $(VENV)/.run
	@echo "adding what tests and lint need (once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@touch $@

lock: ## resolve the lock files anew from pyproject.toml
	uv pip compile $(LOCK) --extra test --extra lint pyproject.toml -o requirements-dev.lock
	uv pip compile $(LOCK) --constraints requirements-dev.lock pyproject.toml -o requirements.lock

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .hypothesis build *.egg-info
