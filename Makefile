# Every target sets itself up: a virtual environment with pinned packages, then the run.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two processes of one thread each; the tests of a file stay together, for what they share, the longest files first.
PYTEST := -m pytest -n 2 --dist loadfile --no-loadscope-reorder
SETUP := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test lint style test-lowest test-newest dist docs clean

help:  ## Show what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(SETUP)  ## Learn weights on text of this machine, train with them, trace a prediction; tables and plots (about 5 minutes)
	$(BIN)/hf-doge demo --output_dir demo

# Types are checked while the tests run: from nothing, mypy keeps one core for half a minute.
test: style  ## Check the style and run the tests (offline, CPU)
	@$(BIN)/mypy > $(VENV)/types.log 2>&1 & types=$$!; \
	$(BIN)/python $(PYTEST); tests=$$?; \
	wait $$types; types=$$?; cat $(VENV)/types.log; \
	exit $$((tests | types))

lint: style  ## Check style, import direction and types
	$(BIN)/mypy

style: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test-lowest: .venv-lowest/.ready  ## Run the tests on the oldest packages that pyproject.toml allows
	.venv-lowest/bin/python $(PYTEST)

test-newest:  ## Run the tests on what is newest today, in an environment made again; no constraints
	rm -rf .venv-newest
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	.venv-newest/bin/python -m pip freeze --exclude-editable
	.venv-newest/bin/python $(PYTEST)

dist: .venv-dist/.ready  ## Build wheel and sdist into dist/, and try the wheel in an empty environment
	rm -rf dist .venv-wheel
	.venv-dist/bin/python -m build --outdir dist .
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	cd dist && ../.venv-wheel/bin/python -I ../tests/wheel_check.py ../.venv-wheel/bin/hf-doge

docs: .venv-docs/.ready  ## Build the pages into site/; warnings are errors
	.venv-docs/bin/python -m mkdocs build --strict

clean:  ## Remove the environments and what was built
	rm -rf .venv .venv-lowest .venv-newest .venv-dist .venv-wheel .venv-docs dist site demo

$(SETUP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

.venv-dist/.ready:
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/python -m pip install --quiet --disable-pip-version-check build
	touch $@

.venv-docs/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

.venv-lowest/.ready: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-lowest.txt -e '.[test]'
	touch $@
