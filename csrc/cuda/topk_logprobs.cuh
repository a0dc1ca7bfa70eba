// topk_logprobs on the device, in two launches and one read of the vocabulary.
//
//   topk_slices: a block reads one slice of one row, a tile at a time in registers, and leaves its
//                k best keys and its part of the log-sum-exp.
//   topk_merge:  a block selects among the keys of one row's slices.
//
// Keys make the order total, so the result does not depend on the slicing.
#pragma once

#include "cuda/element.cuh"
#include "cuda/launch.h"
#include "cuda/select.cuh"
#include "log_sum.h"

#include <algorithm>
#include <cmath>

namespace rgtg::cuda {

constexpr int kVectors = 4;      // 16-byte loads in flight per thread
constexpr int kSliceBlocks = 3;  // per multiprocessor: a fourth would make registers spill
constexpr int kMaxSlices = 64;   // so that the keys of a row's slices fit in the queue of the merge

static_assert(kMaxSlices * kMaxCandidates <= kQueue, "the merge queues every key");

template <class T>
constexpr int kTileItems = kThreads * kVectors * Vector<T>::kWidth;

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

// What one thread holds of a row: kVectors vectors, kThreads vectors apart, aligned in memory.
// Items outside the row are -inf and have ids outside 0 .. vocab - 1.
template <class T>
struct Tile {
  static constexpr int kWidth = Vector<T>::kWidth;
  static constexpr int kItems = kVectors * kWidth;
  Vector<T> vector[kVectors];
  int64_t first;  // id of item 0

  __device__ Tile(const T* row, int64_t vocab, int64_t tile) {
    const int head = reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T);
    first = tile * kTileItems<T> + threadIdx.x * kWidth - head;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64_t id = first + v * kThreads * kWidth;
      if (id >= 0 && id + kWidth <= vocab) {
        vector[v] = load_vector(row + id);
      } else {
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          const bool inside = id + e >= 0 && id + e < vocab;
          vector[v].item[e] = inside ? row[id + e] : minus_infinity<T>();
        }
      }
    }
  }

  __device__ int64_t id(int item) const {
    return first + item / kWidth * (kThreads * kWidth) + item % kWidth;
  }
  __device__ Accumulator<T> logit(int item) const {
    return widen(vector[item / kWidth].item[item % kWidth]);
  }
};

// Part of the log-sum-exp of one thread's items, relative to their maximum.
template <class T>
__device__ LogSum<Accumulator<T>> tile_sum(const Tile<T>& tile, Accumulator<T> largest) {
  using Acc = Accumulator<T>;
  // -inf minus -inf would be NaN.
  const Acc reference = largest == -kInf<Acc> ? Acc(0) : largest;
  LogSum<Acc> sum = {largest, 0};
#pragma unroll
  for (int i = 0; i < Tile<T>::kItems; ++i) sum.total += exp_near(tile.logit(i) - reference);
  return sum;
}

// The largest key of one thread's items, and their part of the log-sum-exp added to `sum`.
template <class T>
__device__ uint64_t scan_tile(const Tile<T>& tile, int64_t vocab, LogSum<Accumulator<T>>& sum) {
  using Acc = Accumulator<T>;
  Acc largest = -kInf<Acc>;
  float top = -kInf<float>;
  int at = 0;
#pragma unroll
  for (int i = 0; i < Tile<T>::kItems; ++i) {
    const Acc logit = tile.logit(i);
    const float rounded = static_cast<float>(logit);
    if (rounded > top) {
      top = rounded;
      at = i;
    }
    if (logit > largest) largest = logit;
  }
  const LogSum<Acc> part = tile_sum(tile, largest);
  sum.merge(part);
  if (part.total == part.total) {
    // In a tile of -inf alone `at` is still item 0, which may lie before the row.
    const int64_t id = tile.id(at) < 0 ? 0 : tile.id(at);
    return id < vocab ? pack_key(top, static_cast<uint32_t>(id)) : kNoKey;
  }
  uint64_t best = kNoKey;  // the tile holds a NaN, which the loop above overlooks, or +inf
#pragma unroll
  for (int i = 0; i < Tile<T>::kItems; ++i) {
    const int64_t id = tile.id(i);
    if (id < 0 || id >= vocab) continue;
    best = Larger()(best, pack_key(static_cast<float>(tile.logit(i)), static_cast<uint32_t>(id)));
  }
  return best;
}

template <class T>
__device__ void push_tile(const Tile<T>& tile, int64_t vocab, uint64_t threshold,
                          Selection& shared) {
  const float least = key_logit(threshold);  // NaN for kNoKey: nothing is skipped
#pragma unroll
  for (int i = 0; i < Tile<T>::kItems; ++i) {
    const float logit = static_cast<float>(tile.logit(i));
    if (logit < least) continue;
    const int64_t id = tile.id(i);
    if (id < 0 || id >= vocab) continue;
    const uint64_t key = pack_key(logit, static_cast<uint32_t>(id));
    if (key >= threshold) shared.push(key);
  }
}

// Grid: rows * slices blocks. Writes keys [rows, slices, k] in descending order and sums [rows,
// slices].
template <class T>
__global__ void __launch_bounds__(kThreads, kSliceBlocks)
    topk_slices(const T* logits, int64_t row_stride, int64_t vocab, int slices, int64_t tiles,
                int k, uint64_t* keys, LogSum<double>* sums) {
  using Acc = Accumulator<T>;
  __shared__ Selection selection;
  __shared__ Acc warp_largest[kWarps];
  __shared__ double warp_total[kWarps];
  const int thread = threadIdx.x;
  const T* row = logits + static_cast<int64_t>(blockIdx.x / slices) * row_stride;
  const int64_t first_tile = blockIdx.x % slices * tiles;

  LogSum<Acc> sum;
  for (int64_t t = 0; t < tiles; ++t) {
    const Tile<T> tile(row, vocab, first_tile + t);
    const uint64_t thread_best = scan_tile(tile, vocab, sum);
    set_threshold(selection, thread_best, k);
    const uint64_t kept = t == 0 ? kNoKey : selection.best[k - 1];
    const uint64_t threshold = Larger()(selection.threshold, kept);
    if (t > 0 && thread < k && selection.best[thread] != kNoKey) {
      selection.push(selection.best[thread]);
    }
    if (thread_best != kNoKey && thread_best >= threshold) {
      push_tile(tile, vocab, threshold, selection);
    }
    __syncthreads();
    select_best(selection, k);
  }
  if (thread < k) keys[static_cast<int64_t>(blockIdx.x) * k + thread] = selection.best[thread];

  const Acc largest = block_reduce(sum.reference, Larger(), warp_largest);
  sum.rebase(largest);
  const double total = block_reduce(static_cast<double>(sum.total), Sum(), warp_total);
  if (thread == 0) sums[blockIdx.x] = {largest, total};
}

// Grid: rows blocks.
template <class T>
__global__ void __launch_bounds__(kThreads)
    topk_merge(const T* logits, int64_t row_stride, int slices, int k, const uint64_t* keys,
               const LogSum<double>* sums, float* logprobs, int64_t* ids) {
  __shared__ Selection selection;
  __shared__ double warp_largest[kWarps];
  __shared__ double warp_total[kWarps];
  const int thread = threadIdx.x;
  const int64_t row = blockIdx.x;
  const uint64_t* row_keys = keys + row * slices * k;
  for (int i = thread; i < slices * k; i += kThreads) selection.queue[i] = row_keys[i];
  if (thread == 0) selection.count = slices * k;

  LogSum<double> part;
  if (thread < slices) part = sums[row * slices + thread];
  const double largest = block_reduce(part.reference, Larger(), warp_largest);
  part.rebase(largest);
  const LogSum<double> sum = {largest, block_reduce(part.total, Sum(), warp_total)};

  select_best(selection, k);
  if (thread >= k) return;
  const uint64_t key = selection.best[thread];
  const int64_t id = key_id(key);
  double logit = key_logit(key);
  if constexpr (std::is_same_v<T, double>) logit = logits[row * row_stride + id];
  ids[row * k + thread] = id;
  logprobs[row * k + thread] = static_cast<float>(sum.logprob(logit));
}

// How a row is cut: `slices` blocks of `tiles` tiles.
struct Slicing {
  int slices;
  int64_t tiles;
};

template <class T>
Slicing slicing(int64_t vocab) {
  // A row that begins unaligned reaches up to a vector further.
  const int64_t all = (vocab + Vector<T>::kWidth - 1 + kTileItems<T> - 1) / kTileItems<T>;
  const int64_t tiles = (all + kMaxSlices - 1) / kMaxSlices;
  return {static_cast<int>((all + tiles - 1) / tiles), tiles};
}

struct TopkArguments {
  const void* logits;  // [rows, vocab], dense rows
  int64_t rows, vocab, row_stride;
  int k;
  uint64_t* keys;        // [rows, slices, k]
  LogSum<double>* sums;  // [rows, slices]
  float* logprobs;       // [rows, k]
  int64_t* ids;          // [rows, k]
};

inline int topk_slice_count(Element element, int64_t vocab) {
  return dispatch_element(element, [&](auto type) {
    return slicing<std::remove_const_t<std::remove_pointer_t<decltype(type)>>>(vocab).slices;
  });
}

inline cudaError_t launch_topk_logprobs(Element element, const TopkArguments& a,
                                        cudaStream_t stream) {
  return dispatch_element(element, [&](auto type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    const auto* logits = static_cast<const T*>(a.logits);
    const auto [slices, tiles] = slicing<T>(a.vocab);
    const cudaError_t status =
        launch(topk_slices<T>, dim3(static_cast<unsigned>(a.rows * slices)), kThreads, stream,
               logits, a.row_stride, a.vocab, slices, tiles, a.k, a.keys, a.sums);
    if (status != cudaSuccess) return status;
    return launch(topk_merge<T>, dim3(static_cast<unsigned>(a.rows)), kThreads, stream, logits,
                  a.row_stride, slices, a.k, a.keys, a.sums, a.logprobs, a.ids);
  });
}

}  // namespace rgtg::cuda
