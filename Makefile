# Everything a person does here is one word: `make serve`, `make test`, `make check`. `make help` lists them.

PYTHON ?= python3
VENV ?= .venv
# Flags for the program that a target runs: make serve ARGS="--port 0 --quantize int8"
ARGS ?=
# Options for pip, such as the index with PyTorch's CPU-only wheels (see CONTRIBUTING.md).
PIP_ARGS ?=

BIN := $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt $(PIP_ARGS)
INSTALLED_FROM := pyproject.toml constraints.txt
TESTED := $(BIN)/python -m pytest
# A process for each core, up to four: each loads PyTorch. A file's tests stay together, with what they share.
SIDE_BY_SIDE := -n auto --maxprocesses 4 --dist loadfile
# promtool and prometheus, for the tests of deploy/: those of the machine, or Debian's package, unpacked beside the clients.
PROMETHEUS := .clients/prometheus/.tried
# Other servers' kernels, where they have been fetched (docs/kernels.md).
PEERS := $(wildcard .peers)
# make gpu GPU_PYTHON=python3 takes the packages that this Python has, for a machine without a network.
ifdef GPU_PYTHON
GPU_READY :=
else
GPU_PYTHON := $(BIN)/python
GPU_READY := $(VENV)/.test
endif
RESULTS ?= load_tests/results
NOW := $(shell date -u +%Y%m%dT%H%M%SZ)

.DEFAULT_GOAL := help
.PHONY: help serve test test-all lint format types audit check bench load gpu gpu-tests gpu-kernels gpu-engine demo clean python-is-new-enough

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

serve: $(VENV)/.serve  ## install what serving needs and start the server on the built-in demo
	@$(BIN)/graft serve $(ARGS)

test: $(VENV)/.test $(PROMETHEUS)  ## the tests, without those marked slow or gpu
	$(TESTED) $(SIDE_BY_SIDE) -m "not slow and not gpu" $(ARGS)

test-all: $(VENV)/.test $(PROMETHEUS)  ## the tests with the slow ones; installs clients into .clients (docs/clients.md)
	$(TESTED) $(SIDE_BY_SIDE) -m "not gpu" $(ARGS)

lint: $(VENV)/.test  ## ruff, formatting, and the contract that imports go down the floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

format: $(VENV)/.test  ## rewrite the files as lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.test  ## mypy, strict
	$(BIN)/mypy

audit: $(VENV)/.test  ## known vulnerabilities in what is installed, where the service that lists them can be reached
	@.ci/audit $(BIN)

check: lint types test  ## what CI runs

bench: $(VENV)/.test  ## tokens per second on this machine
	$(BIN)/graft bench $(ARGS)

load: $(VENV)/.test  ## requests of many adapters against a running server (docs/load-testing.md)
	$(BIN)/python -m load_tests.workload $(ARGS)

gpu: gpu-tests gpu-kernels gpu-engine  ## on a machine with a GPU: its tests and benchmarks; `make -k gpu` goes on after a failure

# These also take a GPU where there is one, beside those that need it.
gpu-tests: $(GPU_READY)
	$(GPU_PYTHON) -m pytest -m gpu $(ARGS)
	$(GPU_PYTHON) -m pytest $(ARGS) tests/engine/test_decode_graphs.py tests/ops/test_kernels.py tests/ops/test_four_bit.py tests/test_triton.py

gpu-kernels: $(GPU_READY)
	$(GPU_PYTHON) -m load_tests.kernels $(PEERS:%=--peers %) --out $(RESULTS)/kernels-$(NOW).json
	$(GPU_PYTHON) -m load_tests.four_bit --out $(RESULTS)/four-bit-$(NOW).json

gpu-engine: $(GPU_READY)
	$(GPU_PYTHON) -m load_tests.whole_engine --device cuda --out $(RESULTS)/engine-$(NOW).json
	GRAFT_OPS=triton $(GPU_PYTHON) -m server.cli bench --device cuda --out $(RESULTS)/gpu-$(NOW).json

demo: $(VENV)/.train  ## train the demo base and its first five adapters again (under 30 minutes on 2 cores); ARGS="--all" for all
	$(BIN)/python -m demo.build $(ARGS)

clean:  ## remove the environment and what the tools left behind
	rm -rf $(VENV) .clients dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp per set of packages: an environment is rebuilt when what it was installed from changes, and only then.
$(VENV)/.serve: $(INSTALLED_FROM) | python-is-new-enough
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.test: $(INSTALLED_FROM) | python-is-new-enough
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -e '.[test,train,bench,load]'
	@touch $@ $(VENV)/.serve $(VENV)/.train

$(VENV)/.train: $(INSTALLED_FROM) | python-is-new-enough
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -e '.[train]'
	@touch $@ $(VENV)/.serve

# Tried once: where it cannot be had, its tests are skipped. `rm` this file to try again.
$(PROMETHEUS):
	@mkdir -p $(@D)
	@command -v promtool >/dev/null || { cd $(@D) && { apt-get download -q prometheus || \
	  { apt-get update -q && apt-get download -q prometheus; }; } && dpkg -x prometheus_*.deb . && rm prometheus_*.deb; } \
	  || echo "Prometheus cannot be installed here: the tests that need it are skipped (Debian's package: prometheus)" >&2
	@touch $@

python-is-new-enough:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "graftserve needs Python 3.11 or newer. Name one: make serve PYTHON=python3.12" >&2; exit 1; }
