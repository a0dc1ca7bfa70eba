// topk_logprobs on the device, in two launches and one read of the vocabulary.
//
//   topk_slices: a block holds kTile logits of one row in registers, takes the k best by k
//   block-wide
//                maxima of 64-bit keys, and sums exp(x - max).
//   topk_merge:  a block merges the sorted lists of one row's slices the same way.
//
// Keys make the order total, so the result does not depend on the slicing.
#pragma once

#include "log_sum.h"
#include "ordered_key.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math_constants.h>

#include <cstdint>

namespace rgtg::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kItems = 8;
constexpr int kTile = kThreads * kItems;
constexpr int kMaxCandidates = 64;
// Below the key of every token: even -inf has a nonzero high word.
constexpr uint64_t kNoKey = 0;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

struct Larger {
  template <class V>
  __device__ V operator()(V a, V b) const {
    return a > b ? a : b;
  }
};

struct Sum {
  template <class V>
  __device__ V operator()(V a, V b) const {
    return a + b;
  }
};

// Combines one value per thread; every thread gets the result. The two rows of `shared` alternate
// with the parity of `round`, so that one barrier per round is enough.
template <class V, class Op>
__device__ V block_reduce(V value, Op op, V (&shared)[2][kWarps], int round) {
  for (int offset = 16; offset > 0; offset >>= 1) {
    value = op(value, __shfl_xor_sync(0xFFFFFFFFu, value, offset));
  }
  V* row = shared[round & 1];
  if (threadIdx.x % 32 == 0) row[threadIdx.x / 32] = value;
  __syncthreads();
  value = row[0];
  for (int warp = 1; warp < kWarps; ++warp) value = op(value, row[warp]);
  return value;
}

// Grid: rows * slices blocks. Writes keys [rows, slices, k] in descending order and sums [rows,
// slices].
template <class T, class Acc>
__global__ void __launch_bounds__(kThreads)
    topk_slices(const T* logits, int64_t row_stride, int64_t vocab, int slices, int k,
                uint64_t* keys, LogSum<Acc>* sums) {
  __shared__ Acc reduce_values[2][kWarps];
  __shared__ uint64_t reduce_keys[2][kWarps];
  const int64_t row = blockIdx.x / slices;
  const int64_t first = static_cast<int64_t>(blockIdx.x % slices) * kTile;
  const Acc minus_infinity = -static_cast<Acc>(CUDART_INF);

  Acc value[kItems];
  uint64_t key[kItems];
  Acc thread_max = minus_infinity;
  uint64_t thread_key = kNoKey;
  for (int i = 0; i < kItems; ++i) {
    const int64_t id = first + i * kThreads + threadIdx.x;
    const bool inside = id < vocab;
    value[i] = inside ? static_cast<Acc>(widen(logits[row * row_stride + id])) : minus_infinity;
    key[i] = inside ? pack_key(static_cast<float>(value[i]), static_cast<uint32_t>(id)) : kNoKey;
    thread_max = Larger()(value[i], thread_max);
    thread_key = Larger()(key[i], thread_key);
  }

  const Acc slice_max = block_reduce(thread_max, Larger(), reduce_values, 0);
  Acc thread_sum = 0;
  for (int i = 0; i < kItems; ++i) {
    thread_sum += value[i] == minus_infinity ? Acc(0) : exp(value[i] - slice_max);
  }
  const Acc slice_sum = block_reduce(thread_sum, Sum(), reduce_values, 1);
  if (threadIdx.x == 0) sums[blockIdx.x] = {slice_max, slice_sum};

  for (int slot = 0; slot < k; ++slot) {
    const uint64_t best = block_reduce(thread_key, Larger(), reduce_keys, slot);
    if (threadIdx.x == 0) keys[static_cast<int64_t>(blockIdx.x) * k + slot] = best;
    if (thread_key != best) continue;
    thread_key = kNoKey;
    for (int i = 0; i < kItems; ++i) {
      if (key[i] == best) key[i] = kNoKey;
      thread_key = Larger()(key[i], thread_key);
    }
  }
}

// Grid: rows blocks. Dynamic shared memory: one byte per slice, how much of its list is used up.
template <class T, class Acc>
__global__ void __launch_bounds__(kThreads)
    topk_merge(const T* logits, int64_t row_stride, int slices, int k, const uint64_t* keys,
               const LogSum<Acc>* sums, float* logprobs, int64_t* ids) {
  extern __shared__ uint8_t used[];
  __shared__ Acc reduce_values[2][kWarps];
  __shared__ uint64_t reduce_keys[2][kWarps];
  __shared__ uint64_t chosen[kMaxCandidates];
  const int64_t row = blockIdx.x;
  const uint64_t* row_keys = keys + row * slices * k;
  const LogSum<Acc>* row_sums = sums + row * slices;
  const Acc minus_infinity = -static_cast<Acc>(CUDART_INF);

  Acc row_max = minus_infinity;
  for (int s = threadIdx.x; s < slices; s += kThreads) {
    used[s] = 0;
    row_max = Larger()(row_sums[s].reference, row_max);
  }
  row_max = block_reduce(row_max, Larger(), reduce_values, 0);
  Acc row_sum = 0;
  for (int s = threadIdx.x; s < slices; s += kThreads) {
    LogSum<Acc> part = row_sums[s];
    part.rebase(row_max);
    row_sum += part.total;
  }
  const LogSum<Acc> sum = {row_max, block_reduce(row_sum, Sum(), reduce_values, 1)};

  for (int slot = 0; slot < k; ++slot) {
    uint64_t head = kNoKey;
    int head_slice = -1;
    for (int s = threadIdx.x; s < slices; s += kThreads) {
      const uint64_t candidate =
          used[s] < k ? row_keys[static_cast<int64_t>(s) * k + used[s]] : kNoKey;
      if (candidate > head) {
        head = candidate;
        head_slice = s;
      }
    }
    const uint64_t best = block_reduce(head, Larger(), reduce_keys, slot);
    if (threadIdx.x == 0) chosen[slot] = best;
    if (head == best && head_slice >= 0) ++used[head_slice];
  }
  __syncthreads();

  for (int slot = threadIdx.x; slot < k; slot += kThreads) {
    const int64_t id = key_id(chosen[slot]);
    const Acc logit = widen(logits[row * row_stride + id]);
    ids[row * k + slot] = id;
    logprobs[row * k + slot] = static_cast<float>(sum.logprob(logit));
  }
}

}  // namespace rgtg::cuda
