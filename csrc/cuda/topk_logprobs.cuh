// topk_logprobs on the device, in one launch and one read of the vocabulary.
//
// A block reads one slice of one row, a tile at a time. The first tile gives a threshold that k of
// its items reach; then what exceeds the threshold is queued and all else costs a maximum and an
// exponential. The block of a row that finishes last selects among what its slices left. Keys make
// the order total, so the ids do not depend on the slicing.
#pragma once

#include "cuda/last_block.cuh"
#include "cuda/launch.h"
#include "cuda/topk_tile.cuh"

#include <algorithm>

namespace rgtg::cuda {

template <class T>
constexpr int kTopkBlocks = sizeof(T) == 8 ? 3 : 4;  // per multiprocessor, as registers allow
constexpr int kMaxSlices = 128;                      // of a row
constexpr int64_t kMaxVocab = int64_t{1} << 30;      // positions in a slice are ints
constexpr int kSegmentGrowth = 4;
constexpr int kSliceKeys = 192;  // left by a slice: to cut them to k costs more than to merge them
constexpr int kBatch = 5;        // 16-byte loads in flight per thread of the merge

static_assert(kSliceKeys <= kThreads && kMostCandidates <= kSliceKeys);

// What a slice leaves beside its keys.
struct SliceSummary {
  LogSum<double> sum;
  int32_t count;     // of keys
  uint32_t largest;  // high word of the largest key
};

constexpr int64_t kWorkspaceWords = kSliceKeys + sizeof(SliceSummary) / 8 + 1;  // per slice

struct TopkArguments {
  const void* logits;  // [rows, vocab], dense rows
  int64_t rows, vocab, row_stride;
  int k;
  int slices, stripes;  // a row is cut into `slices` blocks of `stripes` stripes
  uint64_t* workspace;  // [rows, slices, kWorkspaceWords], aligned to 16 bytes
  uint64_t token;       // nonzero and different for every launch
  float* logprobs;      // [rows, k]
  int64_t* ids;         // [rows, k]
};

// The parts of the workspace; the last two are [rows, slices].
struct Workspace {
  uint64_t* keys;  // [rows, kSliceKeys / 2, slices, 2]: see key_place
  SliceSummary* summary;
  uint64_t* done;

  __device__ Workspace(uint64_t* words, int64_t blocks)
      : keys(words),
        summary(reinterpret_cast<SliceSummary*>(words + blocks * kSliceKeys)),
        done(words + blocks * (kWorkspaceWords - 1)) {}

  __device__ Workspace of(int64_t block) const {
    Workspace part = *this;
    part.keys += block * kSliceKeys, part.summary += block, part.done += block;
    return part;
  }
};

template <class Acc>
struct TopkShared {
  Queue queue;
  Rounds::Memory rounds;
  Acc warp_reference[kWarps];
  double warp_total[kWarps];
  double merge_reference[kWarps], merge_total[kWarps];
  int slice_count[kMaxSlices];
  int last;
};

// Queues the stripes from `first` on one by one, where more items passed the threshold than the
// queue holds: many are equal, or ascend. Candidates exceed `floor`.
template <class T>
__device__ void queue_stripes(const Slice<T>& slice, int first, int last, int k, Queue& queue,
                              Rounds& rounds, int& count, uint32_t& floor) {
  for (int stripe = first; stripe < last; ++stripe) {
    const int position = stripe * kStripeItems<T> + threadIdx.x * Vector<T>::kWidth;
    const Vector<T> vector[1] = {slice.load(position)};
    push_items(slice, position, items_above(vector, bound_of(floor)), queue);
    count = queue.settle();
    if (count > kQueue - kStripeItems<T>) shrink(queue, k, rounds, count, floor);
  }
}

// Leaves in the queue at most kSliceKeys keys, all of the slice's k largest among them. Sets
// `count` to their number; returns this thread's part of the log-sum-exp.
template <class T>
__device__ LogSum<Accumulator<T>> scan_slice(const Slice<T>& slice, int stripes, int k,
                                             Queue& queue, Rounds& rounds, int& count) {
  using Acc = Accumulator<T>;
  const int tiles = (stripes + kVectors - 1) / kVectors;
  const int thread_position = static_cast<int>(threadIdx.x) * Vector<T>::kWidth;
  Vector<T> tile[kVectors];
  load_tile(slice, thread_position, tile);

  LogSum<Acc> sum;
  const uint32_t code = ordered(static_cast<float>(largest_item(tile)));
  if (threadIdx.x == 0) queue.count = 0;
  // Candidates exceed `floor`. Of equal items in the first tile any may have the smaller id.
  uint32_t floor = cut(1, [&](int) { return code; }, k, most_of(k), rounds).value - 1;
  count = 0;
  for (int first = 0, last = 1; first < tiles;) {
    const float above = bound_of(floor);
    for (int t = first; t < last; ++t) {
      const int position = t * kTileItems<T> + thread_position;
      const Acc largest = largest_item(tile);
      if (__any_sync(kWholeWarp, !(largest <= above))) {
        push_items(slice, position, items_above(tile, above), queue);
        forget_widened(tile);
      }
      add_tile(tile, largest, sum);
      const bool whole = slice.holds_tile((t + 1) * kTileItems<T>);
      const T* next = slice.data + position + kTileItems<T>;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (whole) tile[v] = load_vector(next + v * kStripeItems<T>);
      }
      if (!whole && t + 1 < tiles) load_tile(slice, position + kTileItems<T>, tile);
    }
    const int before = count;
    count = queue.settle();
    if (count > kQueue) {
      if (threadIdx.x == 0) queue.count = before;
      __syncthreads();
      const int end = Smaller()(last * kVectors, stripes);
      queue_stripes(slice, first * kVectors, end, k, queue, rounds, count, floor);
    } else if (first == 0) {
      floor += 1;
    }
    if (count > (last < tiles ? 2 * most_of(k) : kSliceKeys)) {
      shrink(queue, k, rounds, count, floor);
    }
    first = last;
    last = Smaller()(last * kSegmentGrowth, tiles);
  }
  return sum;
}

// Where in a row's part of the workspace the key `at` of a slice is: pairs of keys, those of all
// slices side by side, so that the merge reads what is there and not what is left free.
__device__ inline int key_place(int slices, int slice, int at) {
  return (at / 2 * slices + slice) * 2 + at % 2;
}

// Queues the keys of slices first .. last - 1 whose high word reaches `least`. No slice has more
// than `longest` keys.
__device__ inline void queue_slices(const uint64_t* keys, const int (&counts)[kMaxSlices],
                                    int slices, int longest, int first, int last, uint32_t least,
                                    Queue& queue) {
  const auto* pairs = reinterpret_cast<const uint4*>(keys);
  const int total = (longest + 1) / 2 * slices;
  int slice = static_cast<int>(threadIdx.x) % slices,
      at = static_cast<int>(threadIdx.x) / slices * 2;
  for (int start = static_cast<int>(threadIdx.x); start < total; start += kBatch * kThreads) {
    uint4 batch[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int count = slice >= first && slice < last ? counts[slice] : 0;
      batch[i] = at < count ? pairs[start + i * kThreads] : uint4{0, 0, 0, 0};
      if (at + 1 == count) batch[i].w = 0;
      slice += kThreads % slices;
      at += kThreads / slices * 2;
      if (slice >= slices) slice -= slices, at += 2;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const uint4& pair = batch[i];
      if (pair.y >= least && pair.y != 0) {
        queue.push(static_cast<uint64_t>(pair.y) << 32 | pair.x);
      }
      if (pair.w >= least && pair.w != 0) {
        queue.push(static_cast<uint64_t>(pair.w) << 32 | pair.z);
      }
    }
  }
}

// Leaves in the queue candidates of a row whose slices have all been scanned, the k largest keys
// among them; sets `count` to their number and returns the row's log-sum-exp.
template <class Acc>
__device__ LogSum<double> merge_slices(const Workspace& row, int slices, int k,
                                       TopkShared<Acc>& shared, Rounds& rounds, int& count) {
  constexpr int kFitting = (kQueue - kMostCandidates) / kSliceKeys;
  const int thread = static_cast<int>(threadIdx.x);
  Queue& queue = shared.queue;
  SliceSummary summary = {};
  if (thread < slices) {
    summary = row.summary[thread];
    shared.slice_count[thread] = summary.count;
  }
  if (thread == 0) queue.count = 0;
  LogSum<double> part = thread < slices ? summary.sum : LogSum<double>();
  const double largest = block_reduce(part.reference, Larger(), shared.merge_reference);
  part.rebase(largest);
  const LogSum<double> sum = {largest, block_reduce(part.total, Sum(), shared.merge_total)};

  uint32_t shortest, longest;
  const auto count_of = [&](int) { return static_cast<uint32_t>(summary.count); };
  rounds.range(1, count_of, shortest, longest);
  // k slices have a key that reaches the k-th of their largest keys.
  const auto first_code = [&](int) { return summary.largest; };
  uint32_t least = slices >= k ? cut(1, first_code, k, most_of(k), rounds).value : 0;
  const auto queue_some = [&](int first, int last) {
    queue_slices(row.keys, shared.slice_count, slices, static_cast<int>(longest), first, last,
                 least, queue);
    count = queue.settle();
  };
  queue_some(0, slices);
  if (count > kQueue) {
    if (thread == 0) queue.count = 0;
    __syncthreads();
    for (int first = 0; first < slices; first += kFitting) {
      queue_some(first, first + kFitting);
      if (count > kMostCandidates) shrink(queue, k, rounds, count, least);
    }
  }
  return sum;
}

// Grid: rows * slices blocks.
template <class T>
__global__ void __launch_bounds__(kThreads, kTopkBlocks<T>) topk_kernel(TopkArguments a) {
  using Acc = Accumulator<T>;
  __shared__ TopkShared<Acc> shared;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t row = blockIdx.x / a.slices;
  const int index = static_cast<int>(blockIdx.x % a.slices);
  const T* logits = static_cast<const T*>(a.logits) + row * a.row_stride;
  Rounds rounds(shared.rounds);

  int count;
  LogSum<Acc> part = scan_slice(Slice<T>(logits, a.vocab, index * a.stripes, a.stripes), a.stripes,
                                a.k, shared.queue, rounds, count);
  const Acc reference = block_reduce(part.reference, Larger(), shared.warp_reference);
  part.rebase(reference);
  LogSum<double> sum = {reference,
                        block_reduce(static_cast<double>(part.total), Sum(), shared.warp_total)};

  if (a.slices > 1) {
    const Workspace all(a.workspace, a.rows * a.slices);
    const Workspace slices = all.of(row * a.slices);
    const uint64_t key = thread < count ? shared.queue.key[thread] : kNoKey;
    if (thread < count) slices.keys[key_place(a.slices, index, thread)] = key;
    uint32_t least, largest;  // synchronises between the keys and the token
    rounds.range(1, [&](int) { return static_cast<uint32_t>(key >> 32); }, least, largest);
    if (thread == 0) slices.summary[index] = {sum, count, largest};
    if (!finishes_group(slices.done, a.slices, index, a.token, shared.last)) return;
    sum = merge_slices(slices, a.slices, a.k, shared, rounds, count);
    if (thread < a.slices) slices.done[thread] = 0;
  }

  uint32_t unused = 0;
  if (count > most_of(a.k)) shrink(shared.queue, a.k, rounds, count, unused);
  rank_queue(shared.queue, count, a.k, [&](int rank, uint64_t key) {
    const int64_t id = key_id(key);
    double logit = key_logit(key);
    if constexpr (std::is_same_v<T, double>) logit = logits[id];
    a.ids[row * a.k + rank] = id;
    a.logprobs[row * a.k + rank] = static_cast<float>(sum.logprob(logit));
  });
}

// How a row is cut: `slices` blocks of `stripes` stripes. All blocks run at once where there are
// not too many rows; a row has at least two, or the last rows would leave multiprocessors idle.
struct Slicing {
  int slices, stripes;
};

template <class T>
Slicing slicing(int64_t rows, int64_t vocab, int processors) {
  // A row that begins unaligned reaches up to a vector further.
  const int64_t reach = vocab + Vector<T>::kWidth - 1;
  const int64_t all = (reach + kStripeItems<T> - 1) / kStripeItems<T>;
  const int64_t wanted = std::max<int64_t>(2, kTopkBlocks<T> * processors / rows);
  const int64_t slices = std::min({wanted, all, int64_t{kMaxSlices}});
  const int64_t stripes = (all + slices - 1) / slices;
  return {static_cast<int>((all + stripes - 1) / stripes), static_cast<int>(stripes)};
}

inline Slicing topk_slicing(Element element, int64_t rows, int64_t vocab, int processors) {
  return dispatch_element(element, [&](auto type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    return slicing<T>(rows, vocab, processors);
  });
}

inline cudaError_t launch_topk_logprobs(Element element, const TopkArguments& a,
                                        cudaStream_t stream) {
  return dispatch_element(element, [&](auto type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    return launch(topk_kernel<T>, dim3(static_cast<unsigned>(a.rows * a.slices)), kThreads, stream,
                  a);
  });
}

}  // namespace rgtg::cuda
