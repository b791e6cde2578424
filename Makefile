# make demo   fresh environment, installation, MMNeuron on the embedded model: results/demo/index.html
# make test   the quick test suite
# make slow   the slow tests (real weights, kills and restarts, code of the documentation)
# make long   the longest tests, which CI does not run (every family on every mesh)
# make test-device   the tests of the device there is; ACCELERATOR=cuda or tpu installs JAX for it
# make core   a core of the quick suite without torch, as for PYTHON=python3.13
# make lint   ruff and mypy

PYTHON ?= python3
VENV ?= .venv
RESULTS ?= results/demo
BIN := $(VENV)/bin
# Only parity tests need it; `make test TORCH=` skips them.
TORCH ?= torch==2.13.0

# The extra of setup.py that brings JAX for an accelerator: cuda or tpu.
ACCELERATOR ?=
CORE := tests/test_sites.py tests/test_tokens.py tests/test_batch.py tests/numerics tests/device \
	tests/interventions/test_edits.py tests/interventions/test_captures.py tests/passes/test_run.py \
	tests/passes/test_generate.py tests/passes/test_score.py tests/passes/test_reduce.py \
	tests/training/test_fit.py

# Tests and studies start many processes: without its bytecode each would compile the package anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test slow long core test-device lint install clean

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

test-device: $(VENV)/.tested
	$(if $(ACCELERATOR),$(BIN)/python -m pip install --progress-bar off --quiet -e '.[$(ACCELERATOR)]')
	$(BIN)/python -m pytest tests/device

core: TORCH :=
core: $(VENV)/.tested
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow" $(CORE)

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) results build *.egg-info
