#!/usr/bin/env bash
# Everything that needs a GPU, in one command from any folder: build, the parity matrix, the
# sanitizer, the benchmarks (raw figures into bench/results/<op>_gpu.json).
#
#   PYTHON=python3 bench/gpu.sh [build] [test] [sanitize] [bench]      (default: all four)
#
# PYTEST_ARGS="-q -n 8" compiles the Triton kernels of the matrix on eight cores (pytest-xdist).
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
STEPS=${*:-build test sanitize bench}
RESULTS=${RESULTS:-bench/results}
export PYTHONPATH=$PWD
unset TRITON_INTERPRET

# rgtg_fast.kernels lies in kernels/; an installed package knows that, a bare checkout does not.
"$PYTHON" -c "import rgtg_fast.kernels" 2>/dev/null || ln -sfn ../kernels rgtg_fast/kernels

for step in $STEPS; do
  echo "== $step"
  case $step in
    build)
      # The lines of the sources, for the sanitizer's reports.
      NVCC_APPEND_FLAGS=-lineinfo "$PYTHON" setup.py --quiet build_ext --inplace
      "$PYTHON" -m rgtg_fast info
      ;;
    test)
      "$PYTHON" -m pytest ${PYTEST_ARGS:--q} -m gpu \
        tests/ops/test_matrix.py tests/ops/test_gpu.py tests/decode/test_gpu_graphs.py
      ;;
    sanitize)
      # Triton's kernels are compiled once before, so that the sanitizer sees launches only. The
      # caching allocator hides overruns between tensors and is turned off.
      for tool in memcheck racecheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
          "$PYTHON" -m pytest -q -m gpu tests/ops/test_gpu.py -k real_sizes
      done
      ;;
    bench)
      for op in $("$PYTHON" -c "from rgtg_fast import ops; print(*ops.OPS)"); do
        "$PYTHON" -m rgtg_fast bench "$op" --device cuda --json "$RESULTS/${op}_gpu.json"
      done
      ;;
    *)
      echo "unknown step $step" >&2
      exit 2
      ;;
  esac
done
