# Everything runs in a virtual environment inside the checkout, which each target creates if it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help quickstart demo test test-slow test-demo test-conformance test-oldest test-latest benchmark docs lint types \
	format clean

help:
	@echo "make quickstart         train on handwritten digits, save, load and classify (a few minutes)"
	@echo "make demo               try the models in outputs/ in your browser (run make quickstart first)"
	@echo "make benchmark          compare the speed of models with Transformers' ViT (about two minutes)"
	@echo "make docs               build the documentation into outputs/site"
	@echo "make test               run the test suite"
	@echo "make test-slow          run the tests that take minutes"
	@echo "make test-demo          test the pages in a real browser, and install one if needed"
	@echo "make test-conformance   run the suites that Transformers runs on its own models"
	@echo "make test-oldest        run the test suite with the oldest supported versions"
	@echo "make test-latest        run the test suite with the newest versions of everything, without pins"
	@echo "make lint, make format  check or format the code with ruff"
	@echo "make types              check the types of the core with mypy"
	@echo "make clean              remove the environments, caches and builds"

$(VENV)/.installed: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, and this is %s. Try make PYTHON=python3.12 …" % sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

quickstart: $(VENV)/.installed
	$(BIN)/python examples/quickstart.py

demo: $(VENV)/.installed
	$(BIN)/hpool-vit demo

# Two processes with one thread each: the models in the tests are too small to gain from more.
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# In the order of the files: else the longest tests, which are alone in theirs, would come last.
test-slow: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 2 --dist loadfile --no-loadscope-reorder

test-demo: $(VENV)/.installed
	.ci/install_browser.sh
	$(BIN)/python -m hpool_vit.toolkit.export.runtime
	$(BIN)/python -m pytest -m demo tests/toolkit/demo/browser tests/toolkit/export/browser

test-conformance: $(VENV)/.installed
	$(BIN)/python tests/conformance/fetch_transformers_tests.py
	$(BIN)/python -m pytest tests/conformance -m conformance

benchmark: $(VENV)/.installed
	$(BIN)/python examples/benchmark/benchmark.py --short --overwrite --output outputs/benchmark

# A second environment beside the first.
.venv-oldest/.installed: setup.py constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --upgrade pip
	.venv-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable ".[test]"
	touch $@

# Old versions of the libraries warn of each other, which no code of ours can change: warnings are no errors here.
test-oldest: .venv-oldest/.installed
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n 2 --dist loadfile --override-ini filterwarnings=

# Made anew in each run, to get what is newest then.
test-latest:
	rm -rf .venv-latest
	$(PYTHON) -m venv .venv-latest
	.venv-latest/bin/python -m pip install --quiet --upgrade pip
	.venv-latest/bin/python -m pip install --quiet --upgrade --editable ".[test]"
	OMP_NUM_THREADS=1 .venv-latest/bin/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The root is the package, whatever the checkout's folder is called.
types: $(VENV)/.installed
	mkdir -p .cache/types
	ln -sfn ../.. .cache/types/hpool_vit
	$(BIN)/mypy

docs: $(VENV)/.installed
	$(BIN)/mkdocs build --strict

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-oldest .venv-latest .cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
