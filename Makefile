# Everything runs in a virtual environment of the checkout, which any target makes when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help quickstart demo test test-slow test-demo test-conformance test-oldest benchmark docs lint types \
	format clean

help:
	@echo "make quickstart        train on handwritten digits, save, load again, classify (about two minutes)"
	@echo "make demo              a page in the browser with the models in outputs/ (after make quickstart)"
	@echo "make test              the test suite"
	@echo "make test-slow         the tests that take minutes"
	@echo "make test-demo         the demo page in a real browser, which is installed when it is missing"
	@echo "make test-conformance  the suites that Transformers runs on its own models"
	@echo "make test-oldest       the test suite with the oldest supported versions"
	@echo "make benchmark         speed beside Transformers' ViT, on this machine (about two minutes)"
	@echo "make docs              the documentation as a site, in outputs/site"
	@echo "make lint, make format ruff"
	@echo "make types             mypy on the modules of the package"

$(VENV)/.installed: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is %s: make PYTHON=python3.12 …" % sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

quickstart: $(VENV)/.installed
	$(BIN)/python examples/quickstart.py

demo: $(VENV)/.installed
	$(BIN)/hpool-vit demo

# Two processes of one thread each: the models of the tests are too small to gain from more.
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

test-demo: $(VENV)/.installed
	.ci/install_browser.sh
	$(BIN)/python -m pytest -m demo tests/toolkit/demo/browser

test-conformance: $(VENV)/.installed
	$(BIN)/python tests/conformance/fetch_transformers_tests.py
	$(BIN)/python -m pytest tests/conformance -m conformance

benchmark: $(VENV)/.installed
	$(BIN)/python examples/benchmark/benchmark.py --short --overwrite --output outputs/benchmark

# An environment of its own beside the other one.
.venv-oldest/.installed: setup.py constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --upgrade pip
	.venv-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable ".[test]"
	touch $@

test-oldest: .venv-oldest/.installed
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The root is the package, whatever the folder of the checkout is called.
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
	rm -rf $(VENV) .venv-oldest .cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
