// ratio_step on the device: a block computes the rewards of one row and its first warp draws.
#pragma once

#include "cuda/ratio_row.cuh"
#include "cuda/reward_head.cuh"

namespace rgtg::cuda {

// Covers the paper's k = 10 in one round; more warps would leave too few registers for 8 loads
// each.
constexpr int kStepCandidates = 12;
constexpr int kStepThreads = kStepCandidates * kWarpsPerDot * 32;

// Grid: rows. sample_row reads the rewards back from global memory; the barrier that ends
// head_rewards makes them visible.
template <class T>
__global__ void __launch_bounds__(kStepThreads, 1)
    ratio_step_kernel(HeadArguments head, RatioArguments ratio) {
  head_rewards<kStepCandidates, 8, T>(head, blockIdx.x, 0, head.k);
  if (threadIdx.x < 32) sample_row(ratio, blockIdx.x);
}

inline cudaError_t launch_ratio_step(const HeadArguments& head, const RatioArguments& ratio,
                                     cudaStream_t stream) {
  return dispatch_element(head.hidden.element, [&](auto type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    return launch(ratio_step_kernel<T>, dim3(static_cast<unsigned>(head.rows)), kStepThreads,
                  stream, head, ratio);
  });
}

}  // namespace rgtg::cuda
