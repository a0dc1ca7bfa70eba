// The k largest of the keys that the threads of a block hold, in descending order.
//
// The threads form kGroups groups. The k-th largest of the groups' maxima is the threshold: at
// least k keys reach it, and only k groups hold such keys, so few are queued (about 90 for k = 64
// and keys in random order). A queue longer than the block is filtered again in the same way; then
// each thread counts the rank of one key.
#pragma once

#include "ordered_key.h"

#include <cuda_runtime.h>

namespace rgtg::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kGroups = 128;
constexpr int kGroupThreads = kThreads / kGroups;
constexpr int kQueueItems = 17;  // keys per thread in a full queue
constexpr int kQueue = kQueueItems * kThreads;
constexpr uint32_t kWholeWarp = 0xFFFFFFFFu;
// Below the key of every token: even -inf has a nonzero high word.
constexpr uint64_t kNoKey = 0;

static_assert(kGroups >= kMaxCandidates, "a threshold needs k groups");

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

// Combines one value per thread; every thread gets the result. `shared` is used once per kernel, so
// that one barrier is enough.
template <class V, class Op>
__device__ V block_reduce(V value, Op op, V (&shared)[kWarps]) {
  for (int offset = 16; offset > 0; offset >>= 1) {
    value = op(value, __shfl_xor_sync(kWholeWarp, value, offset));
  }
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  value = shared[0];
  for (int warp = 1; warp < kWarps; ++warp) value = op(value, shared[warp]);
  return value;
}

// The shared memory of a selection.
struct Selection {
  uint64_t group_best[kGroups];
  uint64_t queue[kQueue];
  uint64_t best[kMaxCandidates];
  uint64_t threshold;
  int count;

  __device__ void push(uint64_t key) { queue[atomicAdd(&count, 1)] = key; }
};

// Empties the queue and sets the threshold, given the largest key of each thread. A threshold of
// kNoKey says that fewer than k groups hold a key. Synchronises before it resets count and before
// it returns; callers need no barrier between reading the queue and this, nor between this and
// pushes.
__device__ inline void set_threshold(Selection& shared, uint64_t thread_best, int k) {
  uint64_t best = thread_best;
  for (int offset = kGroupThreads / 2; offset > 0; offset >>= 1) {
    best = Larger()(best, __shfl_xor_sync(kWholeWarp, best, offset));
  }
  const int part = threadIdx.x % kGroupThreads;
  if (part == 0) shared.group_best[threadIdx.x / kGroupThreads] = best;
  if (threadIdx.x == 0) shared.threshold = kNoKey;
  __syncthreads();
  if (threadIdx.x == 0) shared.count = 0;
  int greater = 0;
#pragma unroll 8
  for (int group = part; group < kGroups; group += kGroupThreads) {
    greater += shared.group_best[group] > best;
  }
  for (int offset = kGroupThreads / 2; offset > 0; offset >>= 1) {
    greater += __shfl_xor_sync(kWholeWarp, greater, offset);
  }
  if (part == 0 && best != kNoKey && greater == k - 1) shared.threshold = best;
  __syncthreads();
}

// Moves the k best keys of the queue to shared.best, padded with kNoKey. The caller must
// synchronise between its pushes and this call, or keys are missed. Ends with a barrier.
__device__ inline void select_best(Selection& shared, int k) {
  int count = shared.count;
  while (count > kThreads) {
    uint64_t key[kQueueItems];
    uint64_t thread_best = kNoKey;
#pragma unroll
    for (int i = 0; i < kQueueItems; ++i) {
      const int at = i * kThreads + threadIdx.x;
      key[i] = at < count ? shared.queue[at] : kNoKey;
      thread_best = Larger()(key[i], thread_best);
    }
    set_threshold(shared, thread_best, k);
    const uint64_t threshold = shared.threshold;
#pragma unroll
    for (int i = 0; i < kQueueItems; ++i) {
      if (key[i] != kNoKey && key[i] >= threshold) shared.push(key[i]);
    }
    __syncthreads();
    count = shared.count;
  }
  const int slot = threadIdx.x;
  if (slot < count) {
    const uint64_t key = shared.queue[slot];
    int rank = 0;
#pragma unroll 4
    for (int i = 0; i < count; ++i) rank += shared.queue[i] > key;
    if (rank < k && key != kNoKey) shared.best[rank] = key;
  }
  if (slot >= count && slot < k) shared.best[slot] = kNoKey;
  __syncthreads();
}

}  // namespace rgtg::cuda
