// reward_head on the device: k dots per row with one weight vector.
#pragma once

#include "cuda/dot.cuh"
#include "cuda/launch.h"

namespace rgtg::cuda {

struct HeadArguments {
  Operand hidden;  // [rows, k, width], dense last dimension
  int64_t rows, k, width, row_stride, candidate_stride;
  Operand weight;  // [width]
  Operand bias;    // one element, or null data
  float* rewards;  // [rows, k]
};

// The rewards of candidates first .. last - 1 of one row.
template <int kCandidates, int kLoads, class T>
__device__ void head_rewards(const HeadArguments& a, int64_t row, int64_t first, int64_t last) {
  const T* hidden = static_cast<const T*>(a.hidden.data) + row * a.row_stride;
  const double bias = a.bias.data == nullptr ? 0.0 : a.bias.at(0);
  candidate_dots<kCandidates, kLoads, T>(
      first, last, a.width, a.weight, 0,
      [&](int64_t candidate) { return hidden + candidate * a.candidate_stride; },
      [&](int64_t candidate, double dot) {
        a.rewards[row * a.k + candidate] = static_cast<float>(dot + bias);
      });
}

constexpr int kHeadCandidates = 8;
constexpr int kHeadThreads = kHeadCandidates * kWarpsPerDot * 32;

// Grid: rows, groups of kHeadCandidates.
template <class T>
__global__ void __launch_bounds__(kHeadThreads, 1) reward_head_kernel(HeadArguments a) {
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kHeadCandidates;
  const int64_t last = first + kHeadCandidates < a.k ? first + kHeadCandidates : a.k;
  head_rewards<kHeadCandidates, 8, T>(a, blockIdx.x, first, last);
}

inline cudaError_t launch_reward_head(const HeadArguments& a, cudaStream_t stream) {
  return dispatch_element(a.hidden.element, [&](auto type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    const dim3 grid(static_cast<unsigned>(a.rows),
                    static_cast<unsigned>((a.k + kHeadCandidates - 1) / kHeadCandidates));
    return launch(reward_head_kernel<T>, grid, kHeadThreads, stream, a);
  });
}

}  // namespace rgtg::cuda
