# make demo and make test need python3, g++ and a package index; nvcc adds the CUDA kernels.
TORCH ?= torch==2.13.0
# The oldest torch claimed is 2.10, but its wheels on the usual index are CUDA builds of gigabytes, so
# the default tests the oldest transformers on the same torch: make test-oldest OLDEST_TORCH=torch==2.10.0
OLDEST_TORCH ?= $(TORCH)
OLDEST_PINS ?= transformers==5.17.0
PYTHON ?= python3
VENV ?= .venv
PINS ?=
WHEEL_ARCHS ?= 8.0 9.0 10.0 12.0+PTX
PYTEST_ARGS ?= -q -n 2

BIN := $(VENV)/bin
DEPS := $(VENV)/.installed-$(subst ==,-,$(TORCH))
BUILT := $(VENV)/.built
LINT := $(VENV)/.lint
SOURCES := setup.py $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/*.h csrc/cpu/*.cpp csrc/cuda/*.h csrc/cuda/*.cu csrc/cuda/*.cuh)

.PHONY: demo test test-slow test-oldest wheel bench study assets lint clean

demo: $(BUILT)
	$(BIN)/python -m rgtg_fast demo

test: $(BUILT)
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

test-slow: $(BUILT)
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

test-oldest:
	$(MAKE) test test-slow VENV=.venv-oldest TORCH="$(OLDEST_TORCH)" PINS="$(OLDEST_PINS)"

wheel: $(BUILT)
	TORCH_CUDA_ARCH_LIST="$(WHEEL_ARCHS)" $(BIN)/pip wheel --no-build-isolation --no-deps -w dist .

bench: $(BUILT)
	$(BIN)/pip install -q pytest-benchmark
	set -e; for script in $(filter-out bench/bench_host.py,$(wildcard bench/bench_*.py)); do \
	  echo "== $$script"; $(BIN)/python $$script; done
	$(BIN)/python -m pytest -q bench/bench_host.py

study: $(BUILT)
	$(BIN)/python bench/quality/study.py run
	$(BIN)/python bench/quality/study.py report

assets: $(BUILT)
	$(BIN)/python bench/quality/make_assets.py

lint: $(LINT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy rgtg_fast
	$(BIN)/clang-format --dry-run -Werror $(filter csrc/%,$(SOURCES))

clean:
	rm -rf .venv .venv-oldest build dist *.egg-info rgtg_fast/_C*.so demo_output

# Installing builds the extension, so the build stamp is set with it; later changes of the sources
# rebuild what changed and nothing else.
$(DEPS): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install "$(TORCH)" "setuptools>=77" "pybind11>=2.13" ninja
	$(BIN)/pip install --no-build-isolation -e ".[test]" $(PINS)
	touch $@ $(BUILT)

$(BUILT): $(SOURCES) | $(DEPS)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

$(LINT): $(BUILT)
	$(BIN)/pip install ruff mypy clang-format
	touch $@
