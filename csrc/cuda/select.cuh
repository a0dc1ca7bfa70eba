// Selection by the threads of a block: of many keys the k largest.
//
// Most keys are dropped by a threshold that at least k keys reach; the few that remain go to a
// queue in shared memory. A threshold is found by bisection (cut), which stops as soon as few
// enough keys reach it. A queue that grows long is cut again; the last few keys are ranked by
// counting.
#pragma once

#include "ordered_key.h"

#include <cuda_runtime.h>

namespace rgtg::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kQueue = 9 * kThreads;  // a stripe of 16-bit logits and what is kept of those before
constexpr uint32_t kWholeWarp = 0xFFFFFFFFu;
// Below the key of every token: even -inf has a nonzero high word.
constexpr uint64_t kNoKey = 0;

struct Larger {
  template <class V>
  __device__ V operator()(V a, V b) const {
    return a > b ? a : b;
  }
};

struct Smaller {
  template <class V>
  __device__ V operator()(V a, V b) const {
    return a < b ? a : b;
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

// Sums and extremes over the block at one barrier each, as often as wanted: the next round uses the
// other half of the shared memory, so a thread still reading the last one loses nothing.
class Rounds {
 public:
  struct Memory {
    uint32_t count[2][kWarps], least[2][kWarps], largest[2][kWarps];
  };

  __device__ explicit Rounds(Memory& shared) : shared_(shared) {}

  __device__ int sum(int count) {
    turn_ ^= 1;
    write(shared_.count, __reduce_add_sync(kWholeWarp, static_cast<uint32_t>(count)), turn_);
    __syncthreads();
    uint32_t total = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) total += shared_.count[turn_][warp];
    return static_cast<int>(total);
  }

  // The number of values that are not 0, and their extremes.
  template <class Value>
  __device__ int range(int items, Value value, uint32_t& least, uint32_t& largest) {
    int count = 0;
    least = ~0u, largest = 0;
#pragma unroll 1
    for (int i = 0; i < items; ++i) {
      const uint32_t x = value(i);
      count += x != 0;
      if (x != 0) least = Smaller()(x, least);
      largest = Larger()(x, largest);
    }
    write(shared_.least, __reduce_min_sync(kWholeWarp, least), turn_ ^ 1);
    write(shared_.largest, __reduce_max_sync(kWholeWarp, largest), turn_ ^ 1);
    count = sum(count);
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      least = Smaller()(shared_.least[turn_][warp], least);
      largest = Larger()(shared_.largest[turn_][warp], largest);
    }
    return count;
  }

 private:
  __device__ void write(uint32_t (&part)[2][kWarps], uint32_t value, int turn) {
    if (threadIdx.x % 32 == 0) part[turn][threadIdx.x / 32] = value;
  }

  Memory& shared_;
  int turn_ = 0;
};

// A value that `reached` of the block's values reach.
struct Cut {
  uint32_t value;
  int reached;
};

// A value that at least k of the block's values reach, and at most `most` unless more are equal.
// value(0 .. items - 1) are those of a thread. Values of 0 do not count; where fewer than k others
// are there, the cut is 0.
template <class Value>
__device__ Cut cut(int items, Value value, int k, int most, Rounds& rounds) {
  uint32_t low, high;
  int reached = rounds.range(items, value, low, high);
  if (reached < k) return {0, reached};
  while (reached > most && low < high) {
    const uint32_t middle = high - (high - low) / 2;
    int count = 0;
#pragma unroll 1
    for (int i = 0; i < items; ++i) count += value(i) >= middle;
    count = rounds.sum(count);
    if (count >= k) {
      low = middle;
      reached = count;
    } else {
      high = middle - 1;
    }
  }
  return {low, reached};
}

// Of k candidates `most` may be kept where that saves work.
__device__ inline int most_of(int k) { return k + (k + 1) / 2; }
constexpr int kMostCandidates = kMaxCandidates + kMaxCandidates / 2;

// The keys that were pushed. A count beyond kQueue says that keys were lost.
struct Queue {
  uint64_t key[kQueue];
  int count;

  // The count once all threads have pushed, the same for all though some may push again.
  __device__ int settle() const {
    __syncthreads();
    const int settled = count;
    __syncthreads();
    return settled;
  }

  __device__ void push(uint64_t pushed) {
    const int slot = atomicAdd(&count, 1);
    if (slot < kQueue) key[slot] = pushed;
  }
};

// Keeps from k to most_of(k) keys of a queue of `count` > most_of(k), all of the k largest among
// them, and raises `floor` to the high word of a key that those kept reach. The caller must
// synchronise between its pushes and this. Ends with a barrier.
__device__ inline void shrink(Queue& queue, int k, Rounds& rounds, int& count, uint32_t& floor) {
  const int items = (count + kThreads - 1) / kThreads, most = most_of(k);
  const auto key = [&, count](int i) {
    const int at = i * kThreads + static_cast<int>(threadIdx.x);
    return at < count ? queue.key[at] : kNoKey;
  };
  const auto high = [&](int i) { return static_cast<uint32_t>(key(i) >> 32); };
  const Cut first = cut(items, high, k, most, rounds);
  Cut second = {0, 0};
  int above = 0;
  if (first.reached > most) {  // many are equal: cut those by id
#pragma unroll 1
    for (int i = 0; i < items; ++i) above += high(i) > first.value;
    above = rounds.sum(above);
    const auto tied = [&](int i) {
      return high(i) == first.value ? static_cast<uint32_t>(key(i)) : 0;
    };
    second = cut(items, tied, k - above, most - above, rounds);
  }
  const uint64_t least = static_cast<uint64_t>(first.value) << 32 | second.value;
  if (threadIdx.x == 0) queue.count = 0;
#pragma unroll 1
  for (int i = 0; i < items; ++i) {
    const uint64_t kept = key(i);
    __syncthreads();  // or pushes overwrite what is not read yet
    if (kept >= least) queue.push(kept);
  }
  __syncthreads();
  // Not read from the queue, to which other threads may push again.
  count = first.reached > most ? above + second.reached : first.reached;
  floor = Larger()(floor, first.value);
}

// Calls emit(rank, key) for the k largest of a queue of at most kThreads keys, each by one thread.
template <class Emit>
__device__ void rank_queue(const Queue& queue, int count, int k, Emit emit) {
  const int slot = static_cast<int>(threadIdx.x);
  if (slot >= count) return;
  const uint64_t key = queue.key[slot];
  int rank = 0;
#pragma unroll 4
  for (int i = 0; i < count; ++i) rank += queue.key[i] > key;
  if (rank < k) emit(rank, key);
}

}  // namespace rgtg::cuda
