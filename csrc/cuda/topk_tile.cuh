// What topk_logprobs reads: slices of rows, in tiles that the threads of a block hold in registers.
#pragma once

#include "cuda/element.cuh"
#include "cuda/select.cuh"
#include "log_sum.h"

#include <cmath>

namespace rgtg::cuda {

constexpr int kVectors = 4;  // 16-byte loads in flight per thread

// A stripe is one vector of every thread, a tile kVectors stripes.
template <class T>
constexpr int kStripeItems = kThreads * Vector<T>::kWidth;
template <class T>
constexpr int kTileItems = kVectors * kStripeItems<T>;

// Part of a row. Positions count from an aligned address; those of the row are begin .. end - 1.
template <class T>
struct Slice {
  const T* data;   // position 0
  int64_t id;      // of position 0
  int begin, end;  // a slice may hold nothing: begin >= end

  __device__ Slice(const T* row, int64_t vocab, int first_stripe, int stripes) {
    const int head = reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T);
    id = static_cast<int64_t>(first_stripe) * kStripeItems<T> - head;
    data = row + id;
    begin = id < 0 ? head : 0;
    const int64_t left = vocab - id, all = static_cast<int64_t>(stripes) * kStripeItems<T>;
    end = static_cast<int>(left < all ? left : all);
  }

  __device__ bool holds(int position) const { return position >= begin && position < end; }
  // Whether kTileItems from `position` on are all there.
  __device__ bool holds_tile(int position) const {
    return position >= begin && position + kTileItems<T> <= end;
  }

  // Items that are not there are -inf.
  __device__ Vector<T> load(int position) const {
    if (position >= begin && position + Vector<T>::kWidth <= end) {
      return load_vector(data + position);
    }
    Vector<T> vector;
#pragma unroll
    for (int e = 0; e < Vector<T>::kWidth; ++e) {
      vector.item[e] = holds(position + e) ? data[position + e] : minus_infinity<T>();
    }
    return vector;
  }
};

template <class T>
__device__ inline void load_tile(const Slice<T>& slice, int position, Vector<T> (&tile)[kVectors]) {
#pragma unroll
  for (int v = 0; v < kVectors; ++v) tile[v] = slice.load(position + v * kStripeItems<T>);
}

// The larger of two, or NaN where either is.
template <class F>
__device__ inline F larger_or_nan(F a, F b) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<F, float>) {
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
  }
#endif
  return b > a || b != b ? b : a;
}

// The same of two pairs of 16-bit floats.
template <class T>
__device__ inline uint32_t larger_or_nan_pairs(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  uint32_t y;
  if constexpr (std::is_same_v<T, bf16>) {
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  } else {
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  }
  return y;
#else
  const auto larger = [](uint32_t x, uint32_t y) {
    const float wide = widen(T{static_cast<uint16_t>(x)});
    return larger_or_nan(wide, widen(T{static_cast<uint16_t>(y)})) == wide ? x : y;
  };
  return larger(a & 0xFFFF, b & 0xFFFF) | larger(a >> 16, b >> 16) << 16;
#endif
}

// The largest of one thread's items, NaN where one is NaN.
template <class T>
__device__ Accumulator<T> largest_item(const Vector<T> (&tile)[kVectors]) {
  if constexpr (sizeof(T) == 2) {
    uint32_t pairs = tile[0].raw.x;
#pragma unroll
    for (const Vector<T>& vector : tile) {
      pairs = larger_or_nan_pairs<T>(pairs, vector.raw.x);
      pairs = larger_or_nan_pairs<T>(pairs, vector.raw.y);
      pairs = larger_or_nan_pairs<T>(pairs, vector.raw.z);
      pairs = larger_or_nan_pairs<T>(pairs, vector.raw.w);
    }
    return larger_or_nan(widen(T{static_cast<uint16_t>(pairs)}),
                         widen(T{static_cast<uint16_t>(pairs >> 16)}));
  } else {
    Accumulator<T> largest = tile[0].item[0];
#pragma unroll
    for (const Vector<T>& vector : tile) {
#pragma unroll
      for (int e = 0; e < Vector<T>::kWidth; ++e) largest = larger_or_nan(largest, vector.item[e]);
    }
    return largest;
  }
}

__device__ inline float exp_near(float x) {
  constexpr float kLog2E = 1.44269504088896341f;
#ifdef __CUDA_ARCH__
  float y;  // two ulps, and a few instructions fewer than exp2f: subnormal results become zero
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * kLog2E));
  return y;
#else
  return exp2f(x * kLog2E);
#endif
}

__device__ inline double exp_near(double x) { return exp(x); }

// Adds a tile to one thread's part of the log-sum-exp. The reference is the exact maximum, so that
// of a row with one likely token the sum is exactly 1.
template <class T>
__device__ void add_tile(const Vector<T> (&tile)[kVectors], Accumulator<T> largest,
                         LogSum<Accumulator<T>>& sum) {
  using Acc = Accumulator<T>;
  largest = Larger()(largest, sum.reference);  // the latter where the former is NaN
  // -inf minus -inf would be NaN.
  const Acc reference = largest == -kInf<Acc> ? Acc(0) : largest;
  Acc part[kVectors] = {};
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int e = 0; e < Vector<T>::kWidth; ++e) {
      part[v] += exp_near(widen(tile[v].item[e]) - reference);
    }
  }
  sum.total *= exp_near(sum.reference - reference);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) sum.total += part[v];
  sum.reference = largest;
}

// The float y for which !(x <= y) says that ordered(x) > code.
__device__ inline float bound_of(uint32_t code) {
  if (code >= ordered(kInf<float>)) return kInf<float>;  // NaN alone is above
  // The bits of -0, which is ordered as +0: zero is above, the largest negative number is not.
  if (code == 0x7FFFFFFFu) return bits_float(0x80000001u);
  return key_logit(static_cast<uint64_t>(code) << 32);  // below -inf NaN: all are above
}

// Without this the compiler widens a tile once for the comparisons and the exponentials alike, and
// keeps twice the registers.
template <class T>
__device__ inline void forget_widened(Vector<T> (&tile)[kVectors]) {
#ifdef __CUDA_ARCH__
#pragma unroll
  for (Vector<T>& vector : tile) {
    asm("" : "+r"(vector.raw.x), "+r"(vector.raw.y), "+r"(vector.raw.z), "+r"(vector.raw.w));
  }
#endif
}

// Bit i tells that item i may be among the largest.
template <class T, int kCount>
__device__ uint32_t items_above(const Vector<T> (&tile)[kCount], float bound) {
  constexpr int kWidth = Vector<T>::kWidth;
  uint32_t mask = 0;
#pragma unroll
  for (int i = 0; i < kCount * kWidth; ++i) {
    const float logit = static_cast<float>(widen(tile[i / kWidth].item[i % kWidth]));
    if (!(logit <= bound)) mask |= 1u << i;
  }
  return mask;
}

// Queues the items of `mask`. Their values are read again: an index into registers that is known at
// run time only would put the tile into local memory.
template <class T>
__device__ void push_items(const Slice<T>& slice, int position, uint32_t mask, Queue& queue) {
  constexpr int kWidth = Vector<T>::kWidth;
#pragma unroll 1
  for (; mask != 0; mask &= mask - 1) {
    const int item = __ffs(static_cast<int>(mask)) - 1;
    const int at = position + item / kWidth * kStripeItems<T> + item % kWidth;
    if (!slice.holds(at)) continue;
    const float logit = static_cast<float>(widen(slice.data[at]));
    queue.push(pack_key(logit, static_cast<uint32_t>(slice.id + at)));
  }
}

}  // namespace rgtg::cuda
