# Every target sets itself up: a virtual environment with pinned packages, then the run.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two processes of one thread each; the tests of a file stay together, for what they share, the longest files first.
PYTEST := -m pytest -n 2 --dist loadfile --no-loadscope-reorder
SETUP := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test lint test-lowest clean

help:  ## Show what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(SETUP)  ## Learn weights on text of this machine, train with them, trace a prediction; tables and plots (about 5 minutes)
	$(BIN)/hf-doge demo --output_dir demo

test: $(SETUP) lint  ## Check the style and run the tests (offline, CPU)
	$(BIN)/python $(PYTEST)

lint: $(SETUP)  ## Check style, import direction and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-lowest: .venv-lowest/.ready  ## Run the tests on the oldest packages that pyproject.toml allows
	.venv-lowest/bin/python $(PYTEST)

clean:  ## Remove the environments and what the demo wrote
	rm -rf .venv .venv-lowest demo

$(SETUP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

.venv-lowest/.ready: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-lowest.txt -e '.[test]'
	touch $@
