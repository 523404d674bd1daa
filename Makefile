# make demo, make test: each first makes $(VENV), installs into it and builds _C, when needed.

PYTHON_GIVEN := $(filter command environment override,$(firstword $(origin PYTHON)))
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints-dev.txt
JOBS ?= 2
# adapters needs another transformers than peft, and so an environment of its own.
VENV_ADAPTERS ?= $(VENV)-adapters
ADAPTERS_INSTALL := $(VENV_ADAPTERS)/bin/python -m pip install --disable-pip-version-check -c constraints-adapters.txt
TEST_ADAPTERS := $(VENV_ADAPTERS)/bin/python -m pytest tests/models/with_adapters

TOOLS := $(VENV)/.tools
READY := $(VENV)/.ready
READY_ADAPTERS := $(VENV_ADAPTERS)/.ready
SOURCES := setup.py peft_kernels/version.py $(shell find csrc -type f \( -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh' -o -name '*.py' \) 2>/dev/null)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-adapters lint docs bench gpu-report clean distclean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(READY) ## train on real digits, eager against fused; writes out/demo/
	$(BIN)/python -m peft_kernels demo $(ARGS)

test: $(READY) $(if $(ARGS),,$(READY_ADAPTERS)) ## run the tests (ARGS="-k lora" selects)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)
	$(if $(ARGS),,$(TEST_ADAPTERS))

test-adapters: $(READY_ADAPTERS) ## of these, those that need adapters, in .venv-adapters
	$(TEST_ADAPTERS) $(ARGS)

lint: $(READY) ## ruff and mypy
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

docs: $(READY) ## build the documentation into out/docs, without network
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(READY) ## measure, against eager, compiled and frozen (ARGS="--op adapter" selects)
	$(BIN)/python -m peft_kernels bench $(ARGS)

# With PYTHON given, that interpreter as it is: no .venv, no network.
gpu-report: $(if $(PYTHON_GIVEN),,$(READY)) ## build, test and time on an NVIDIA GPU (DRY_RUN=1: without)
	$(if $(PYTHON_GIVEN),$(PYTHON),$(BIN)/python) bench/gpu_report.py $(ARGS)

clean: ## remove what the other targets wrote, except .venv and .venv-adapters
	rm -rf build dist out *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f peft_kernels/*.so $(READY)
	find peft_kernels tests bench examples -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove .venv and .venv-adapters too
	rm -rf $(VENV) $(VENV_ADAPTERS)

# torch comes first and pinned: what follows builds against it, and must not bring another.
$(TOOLS): pyproject.toml constraints-dev.txt setup.py
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	  "development needs Python 3.11 or later (make PYTHON=python3.11 ...), this is " + sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	$(PIP_INSTALL) torch==2.13.0
	$(PIP_INSTALL) setuptools wheel ninja pybind11
	@touch $@

$(READY): $(TOOLS) $(SOURCES)
	$(PIP_INSTALL) --no-build-isolation -e '.[dev]'
	@touch $@

# Compiles nothing: the tests find the _C that $(READY) has built in the folder of the package.
$(READY_ADAPTERS): pyproject.toml constraints-adapters.txt | $(READY)
	test -x $(VENV_ADAPTERS)/bin/python || $(BIN)/python -m venv $(VENV_ADAPTERS) || { rm -rf $(VENV_ADAPTERS); exit 1; }
	$(ADAPTERS_INSTALL) torch==2.13.0
	$(ADAPTERS_INSTALL) setuptools
	PEFT_KERNELS_BUILD=none $(ADAPTERS_INSTALL) --no-build-isolation -e '.[adapters]' pytest pytest-timeout
	@touch $@
