// Dot products of k candidates, two warps each. reward_head, ratio_step and vocab_reward add up in
// the same order, so their rewards agree bit for bit.
#pragma once

#include "cuda/element.cuh"

#include <cstdint>

namespace rgtg::cuda {

constexpr int kWarpsPerDot = 2;

// A vector or matrix whose type is known at run time only.
struct Operand {
  const void* data;
  Element element;

  __device__ double at(int64_t i) const {
    switch (element) {
      case Element::fp64:
        return static_cast<const double*>(data)[i];
      case Element::fp32:
        return static_cast<const float*>(data)[i];
      case Element::bf16:
        return widen(static_cast<const bf16*>(data)[i]);
      default:
        return widen(static_cast<const fp16*>(data)[i]);
    }
  }
};

template <class V>
__device__ V warp_sum(V value) {
  for (int offset = 16; offset > 0; offset >>= 1) {
    value += __shfl_xor_sync(0xFFFFFFFFu, value, offset);
  }
  return value;
}

template <class T>
__device__ void add_products(const Vector<T>& a, const Vector<T>& b,
                             Accumulator<T> (&total)[Vector<T>::kWidth]) {
#pragma unroll
  for (int e = 0; e < Vector<T>::kWidth; ++e) total[e] += widen(a.item[e]) * widen(b.item[e]);
}

// One thread's share of sum(a[i] * b[i]) where both are aligned, with kLoads 16-byte loads of each
// in flight. kLoads does not change the order of the additions.
template <int kLoads, class T>
__device__ Accumulator<T> aligned_dot(const T* a, const T* b, int64_t length) {
  constexpr int kWidth = Vector<T>::kWidth;
  constexpr int kStep = 32 * kWidth;
  const int lane = threadIdx.x % 32;
  Accumulator<T> total[kWidth] = {};
  int64_t i = lane * kWidth;
  for (; i + (kLoads - 1) * kStep + kWidth <= length; i += kLoads * kStep) {
    Vector<T> x[kLoads], y[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      x[j] = load_vector(a + i + j * kStep);
      y[j] = load_vector(b + i + j * kStep);
    }
#pragma unroll
    for (int j = 0; j < kLoads; ++j) add_products(x[j], y[j], total);
  }
  for (; i + kWidth <= length; i += kStep) {
    add_products(load_vector(a + i), load_vector(b + i), total);
  }
  const int64_t rest = length - length % kWidth + lane;
  if (rest < length) total[0] += widen(a[rest]) * widen(b[rest]);
  for (int e = 1; e < kWidth; ++e) total[0] += total[e];
  return total[0];
}

// sum(a[i] * b[i]) over begin <= i < end, by one warp; every lane gets it.
template <int kLoads, class T>
__device__ double warp_dot(const T* a, Operand b, int64_t b_offset, int64_t begin, int64_t end) {
  if (b.element == kElement<T>) {
    const T* x = a + begin;
    const T* y = static_cast<const T*>(b.data) + b_offset + begin;
    if (is_aligned(x) && is_aligned(y)) return warp_sum(aligned_dot<kLoads>(x, y, end - begin));
  }
  // Mixed or unaligned operands are rare, so this path may be slow: one element at a time, in fp64.
  double total = 0;
  for (int64_t i = begin + threadIdx.x % 32; i < end; i += 32) {
    total += static_cast<double>(widen(a[i])) * b.at(b_offset + i);
  }
  return warp_sum(total);
}

// emit(c, dot) for candidates first <= c < last, each by one thread; ends with a barrier. For
// blocks of kCandidates * kWarpsPerDot warps. row_of(c) is the candidate's vector or null, whose
// dot is NaN; the other operand is other[other_offset ..].
template <int kCandidates, int kLoads, class T, class RowOf, class Emit>
__device__ void candidate_dots(int64_t first, int64_t last, int64_t width, Operand other,
                               int64_t other_offset, RowOf row_of, Emit emit) {
  __shared__ double second_half[kCandidates];
  const int warp = threadIdx.x / 32;
  const int dot = warp / kWarpsPerDot;
  const bool second = warp % kWarpsPerDot == 1, leads = threadIdx.x % 32 == 0;
  constexpr int64_t kWidth = Vector<T>::kWidth;
  const int64_t whole = (width + kWarpsPerDot * kWidth - 1) / (kWarpsPerDot * kWidth) * kWidth;
  const int64_t middle = whole < width ? whole : width;
  for (int64_t start = first; start < last; start += kCandidates) {
    const int64_t candidate = start + dot;
    double half = 0;
    if (candidate < last) {
      const T* row = row_of(candidate);
      half = row == nullptr ? kNaN<double>
                            : warp_dot<kLoads>(row, other, other_offset, second ? middle : 0,
                                               second ? width : middle);
    }
    if (second && leads) second_half[dot] = half;
    __syncthreads();
    if (candidate < last && !second && leads) emit(candidate, half + second_half[dot]);
    __syncthreads();
  }
}

}  // namespace rgtg::cuda
