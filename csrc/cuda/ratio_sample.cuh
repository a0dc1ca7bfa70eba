// ratio_sample on the device: one warp per row.
#pragma once

#include "cuda/launch.h"
#include "cuda/ratio_row.cuh"

namespace rgtg::cuda {

constexpr int kSampleWarps = 4;

// Grid: kSampleWarps rows per block.
static __global__ void __launch_bounds__(kSampleWarps * 32) ratio_sample_kernel(RatioArguments a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kSampleWarps + threadIdx.x / 32;
  if (row < a.rows) sample_row(a, row);
}

inline cudaError_t launch_ratio_sample(const RatioArguments& a, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((a.rows + kSampleWarps - 1) / kSampleWarps));
  return launch(ratio_sample_kernel, grid, kSampleWarps * 32, stream, a);
}

}  // namespace rgtg::cuda
