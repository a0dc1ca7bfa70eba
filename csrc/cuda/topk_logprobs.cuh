// topk_logprobs on the device, in two launches and one read of the vocabulary.
//
//   slices:  block (slice, row) holds kTile logits in registers, takes the k best by k block-wide
//            maxima of 64-bit keys, and sums exp(x - max).
//   merge:   block (row) merges the sorted lists of its slices the same way and writes the result.
//
// Keys make the order total, so the result does not depend on the slicing.
#pragma once

#include "ordered_key.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace rgtg::cuda {

constexpr int kThreads = 256;
constexpr int kItems = 8;
constexpr int kTile = kThreads * kItems;
constexpr int kWarps = kThreads / 32;
// Below every key of a real token, whose low word is ~id.
constexpr uint64_t kNoKey = 0;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

// Sums are fp32, and double for fp64 logits.
template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

__device__ inline float negative_infinity(float) { return -CUDART_INF_F_BITS(); }
