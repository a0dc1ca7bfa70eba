// candidate_attention on the device: flash decoding over siblings, one or two launches.
//
//   attend_prefix: a block takes the queries of one key head, up to 64 of k * group, and one split
//                  of the row's live positions. Each of its warps has 16 queries (or, of few
//                  queries, its own positions of every tile); products are of tensor cores, in fp32
//                  of plain multiply-adds. Tiles of keys and values are copied to shared memory
//                  while the one before is worked on.
//   merge_splits:  a warp merges the splits of one query by their log-sum-exp.
//
// The first split begins with the sibling's own key and value, so a single split needs no merge.
// The merge is a launch of its own, overlapping the end of the first, and not the last block's: at
// batch 1 the splits of a head are 330 KB, which one multiprocessor reads in 3 us and 80 blocks in
// less than one; and no counter has to be zeroed, or shared by launches in flight.
#pragma once

#include "cuda/attention_kernels.cuh"
#include "cuda/element.cuh"
#include "cuda/launch.h"

#include <algorithm>

namespace rgtg::cuda {

// How many splits: enough for every multiprocessor, and of long prefixes for all blocks that fit
// on one; but splits of few positions cost more to merge than they save.
inline int attention_splits(int64_t programs, int64_t prefix, int64_t processors) {
  constexpr int64_t kShortest = 128, kShortestOfMany = 512;
  const int64_t one_each = std::min(processors / programs, (prefix + kShortest - 1) / kShortest);
  const int64_t all_full = std::min(3 * processors / programs, prefix / kShortestOfMany);
  return static_cast<int>(std::clamp<int64_t>(std::max(one_each, all_full), 1, kMaxSplits));
}

// The width to which heads are padded in shared memory and in the partial results.
inline int padded_width(int64_t width) { return width <= 64 ? 64 : width <= 128 ? 128 : 256; }

// The queries that a block takes; `few` that each warp works on positions of its own.
inline bool few_queries(int64_t queries, int64_t width) {
  return queries <= (width > 128 ? 32 : 16);
}
inline int64_t query_tiles(int64_t queries) { return (queries + 63) / 64; }

template <class T, int kWidth>
cudaError_t launch_attention(const AttentionArguments& a, bool overlap, cudaStream_t stream) {
  using Many = AttentionTile<T, kWidth, 1>;
  using Few = AttentionTile<T, kWidth, kWidth == 256 ? 2 : 4>;
  const dim3 grid(static_cast<unsigned>(a.batch * a.heads), static_cast<unsigned>(a.splits),
                  static_cast<unsigned>(query_tiles(a.queries())));
  const cudaError_t status =
      few_queries(a.queries(), kWidth)
          ? launch_with_memory(attend_prefix<Few>, grid, kAttentionThreads, Few::kBytes, stream, a)
          : launch_with_memory(attend_prefix<Many>, grid, kAttentionThreads, Many::kBytes, stream,
                               a);
  if (status != cudaSuccess || a.splits == 1) return status;
  const dim3 queries(grid.x,
                     static_cast<unsigned>((a.queries() + kMergeQueries - 1) / kMergeQueries));
  return launch_behind(merge_splits<T, kWidth>, queries, 32 * kMergeQueries, overlap, stream, a);
}

// `overlap`: whether the device is of capability 9 or above.
inline cudaError_t launch_candidate_attention(Element element, const AttentionArguments& a,
                                              bool overlap, cudaStream_t stream) {
  const auto of_width = [&](auto type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    switch (padded_width(a.width)) {
      case 64:
        return launch_attention<T, 64>(a, overlap, stream);
      case 128:
        return launch_attention<T, 128>(a, overlap, stream);
      default:
        return launch_attention<T, 256>(a, overlap, stream);
    }
  };
  if (element == Element::fp32) return of_width(static_cast<const float*>(nullptr));
  if (element == Element::bf16) return of_width(static_cast<const bf16*>(nullptr));
  return of_width(static_cast<const fp16*>(nullptr));
}

}  // namespace rgtg::cuda
