// What reward_head and vocab_reward share: dot products of many rows, accumulated in fp64 if an
// input is fp64, else in fp32.
#pragma once

#define RGTG_KERNELS "cpu/dot_simd.h"
#include "cpu/simd.h"
#include "cpu/tensors.h"

#include <type_traits>
#include <vector>

namespace rgtg {

constexpr int64_t kDotGrain = 32768;  // multiply-adds per thread; fewer do not pay for waking it

// Calls fn(Acc{}, static_cast<const T*>(nullptr)) with the accumulator type and the type of `rows`.
template <class Fn>
void dispatch_dot(const Tensor& vectors, const Tensor& rows, const char* name, Fn&& fn) {
  dispatch_float(rows.scalar_type(), name, [&](auto type) {
    if (vectors.scalar_type() == ScalarType::Double) return fn(double{}, type);
    if constexpr (std::is_same_v<decltype(type), const double*>) {
      return fn(double{}, type);
    } else {
      return fn(float{}, type);
    }
  });
}

// n elements at `data`, which has the dtype of `tensor`.
template <class Acc>
std::vector<Acc> widened(const Tensor& tensor, const void* data, int64_t n) {
  std::vector<Acc> out(n);
  dispatch_float(tensor.scalar_type(), "input", [&](auto type) {
    const auto* source = static_cast<decltype(type)>(data);
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<Acc>(widen(source[i]));
  });
  return out;
}

// fn(i) for i in [0, count), each worth one dot product of length n.
template <class Fn>
void for_each_dot(int64_t count, int64_t n, const Fn& fn) {
  const int64_t grain = std::max<int64_t>(1, kDotGrain / std::max<int64_t>(1, n));
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) fn(i);
  });
}

}  // namespace rgtg
