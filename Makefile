# make demo: the demo, from a fresh checkout.   make test: everything that must hold before a commit.
PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check
INPUTS := pyproject.toml constraints.txt

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/djinn-fx demo

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The stamps say: what these files ask for is installed here.
$(VENV)/.installed: $(INPUTS) | $(VENV)/bin/python
	$(PIP) -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(INPUTS) | $(VENV)/bin/python
	$(PIP) -c constraints.txt -e ".[dev]"
	touch $@ $(VENV)/.installed

# Caches and build products; the environment stays.
clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .demo
	find . -name .git -prune -o -name $(notdir $(VENV)) -prune -o -name __pycache__ -type d -exec rm -rf {} +
