# Commands for users, CI and hooks. `make demo` and `make test` set up all they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests to run at a time; many of them mostly wait.
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadscope
# Else each of the many processes that tests start compiles every file anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo check test test-all test-browser slowest lint format types
.PHONY: bench bench-quick soak drill build clean

demo: $(VENV)/.installed
	$(BIN)/python run.py --mode data-parallel

# For the time between two edits: leaves out tests that start a process or compile a model.
check: lint types
	$(PYTEST) -m 'not slow and not browser and not process'

# All that the README promises and CI checks.
test: lint types
	$(PYTEST)

# Slow tests too; not those that need Chromium.
test-all: lint types
	$(PYTEST) -m 'not browser'

test-browser: lint types
	$(BIN)/python -m pytest -m browser

# Lists the twenty slowest tests of the last run.
slowest: $(VENV)/.installed-test
	$(BIN)/python -m tests.support.slowest

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-test
	$(BIN)/mypy

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-bench
	$(BIN)/python benchmarks/throughput.py

bench-quick: $(VENV)/.installed-bench
	$(BIN)/python benchmarks/throughput.py --quick --name quick

soak: $(VENV)/.installed-test
	$(BIN)/python benchmarks/soak.py

drill: $(VENV)/.installed
	$(BIN)/python benchmarks/drill.py

build: $(VENV)/.installed-test
	$(BIN)/python -m build --no-isolation

clean:
	rm -rf $(VENV) build dist *.egg-info

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@ $(VENV)/.installed

$(VENV)/.installed-bench: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	touch $@
