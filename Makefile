# Two commands on a fresh machine that has Python (3.11 to 3.13) and make: `make demo` and `make test`.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
JOBS   ?= 2

.PHONY: demo test slow lint mutants clean

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/ready-dev: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(VENV)/ready ## deploy a trained model on real inputs and show the summary
	$(BIN)/deploykit deploy models/fashion_cnn.keras --data models/fashion_sample.npz -o build/fashion_cnn --force
	$(BIN)/python build/fashion_cnn/verify.py

test: $(VENV)/ready-dev ## the tests, but for those that take more than ten seconds each
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m 'not slow'

slow: $(VENV)/ready-dev ## the others
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m slow

lint: $(VENV)/ready-dev ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

mutants: $(VENV)/ready-dev ## remove each guard in turn: some test must fail
	$(BIN)/python tests/mutate_guards.py

clean:
	rm -rf $(VENV) build dist *.egg-info
