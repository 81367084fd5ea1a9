# One virtual environment, made on first use; the stamp files make every later call quick.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
RUNTIME := $(VENV)/.runtime
DEV := $(VENV)/.dev
# One thread per worker: two workers on two cores, and sums that do not depend on the number of cores.
TEST_ENV := OMP_NUM_THREADS=1
PYTEST_ARGS ?= -n 2

.PHONY: help demo test lint format docs bench wheel clean

help:
	@echo "make demo    the story in under a minute: claimed against true norms of a small CNN, trained in three ways"
	@echo "make test    tests and doctests"
	@echo "make lint    ruff, mypy, import-linter"
	@echo "make docs    the documentation, into site/"
	@echo "make bench   the measurements behind the README, into benchmarks/results/"
	@echo "make wheel   the distribution, and a check that it carries every file of the package"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(RUNTIME): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -q -c constraints.txt -e .
	@touch $@

$(DEV): $(RUNTIME)
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(RUNTIME)
	$(BIN)/opnorm demo

test: $(DEV)
	$(TEST_ENV) $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DEV)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "documentation: site/index.html"

bench: $(DEV)
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python "$$script" || exit 1; done

wheel: $(DEV)
	rm -rf dist
	$(PIP) wheel -q --no-deps -w dist .
	@(cd src && find opnorm -type f ! -name '*.pyc') | LC_ALL=C sort > dist/expected
	@$(BIN)/python -m zipfile -l dist/opnorm-*.whl | awk '/^opnorm\// {print $$1}' | LC_ALL=C sort > dist/carried
	@diff dist/expected dist/carried && echo "the wheel carries all $$(wc -l < dist/carried) files of the package"

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
