// The kernels of candidate_attention; candidate_attention.cuh says what they do.
#pragma once

#include "cuda/attention_tile.cuh"

namespace rgtg::cuda {

constexpr int kMaxSplits = 64;
constexpr int kMergeQueries = 4;  // of one block: a warp each

// Merges the states of the warps of one block that had positions of their own.
template <class Tile>
__device__ void merge_warps(typename Tile::State& state, int key_warp, int query_warp) {
  constexpr int kFloats = 16 * Tile::kWidth + 32;
  const int lane = threadIdx.x % 32, row = lane / 4, column = lane % 4 * 2;
  float* memory = reinterpret_cast<float*>(shared_memory());
  float* own = memory + (key_warp * Tile::kQueryWarps + query_warp) * kFloats;
  if (key_warp > 0) {
    for (int r = 0; r < 2; ++r) {
      for (int t = 0; t < Tile::kWidth / 8; ++t) {
        own[(row + 8 * r) * Tile::kWidth + 8 * t + column] = state.mixed[t][2 * r];
        own[(row + 8 * r) * Tile::kWidth + 8 * t + column + 1] = state.mixed[t][2 * r + 1];
      }
      own[16 * Tile::kWidth + row + 8 * r] = state.peak[r];
      own[16 * Tile::kWidth + 16 + row + 8 * r] = state.total[r];
    }
  }
  __syncthreads();
  if (key_warp > 0) return;
  for (int other = 1; other < Tile::kKeyWarps; ++other) {
    const float* theirs = memory + (other * Tile::kQueryWarps + query_warp) * kFloats;
    for (int r = 0; r < 2; ++r) {
      const float peak = theirs[16 * Tile::kWidth + row + 8 * r];
      const float top = fmaxf(state.peak[r], peak);
      const float reference = top == -kInf<float> ? 0.0f : top;
      const float keep = exp2_near(state.peak[r] - reference);
      const float add = exp2_near(peak - reference);
      state.peak[r] = top;
      state.total[r] = state.total[r] * keep + theirs[16 * Tile::kWidth + 16 + row + 8 * r] * add;
#pragma unroll
      for (int t = 0; t < Tile::kWidth / 8; ++t) {
        const float* from = theirs + (row + 8 * r) * Tile::kWidth + 8 * t + column;
        state.mixed[t][2 * r] = state.mixed[t][2 * r] * keep + from[0] * add;
        state.mixed[t][2 * r + 1] = state.mixed[t][2 * r + 1] * keep + from[1] * add;
      }
    }
  }
}

// What a warp works on.
template <class Tile>
struct Place {
  int pair, row, head, key_warp, query_warp, first_query;

  __device__ Place(const AttentionArguments& a, int block, int thread)
      : pair(block),
        row(block / a.heads),
        head(block % a.heads),
        key_warp(thread / 32 / Tile::kQueryWarps),
        query_warp(thread / 32 % Tile::kQueryWarps),
        first_query(blockIdx.z * Tile::kQueries + 16 * query_warp) {}
};

// Grid: batch * heads, splits, tiles of Tile::kQueries queries.
template <class Tile>
__global__ void __launch_bounds__(kAttentionThreads, Tile::kBlocks)
    attend_prefix(AttentionArguments a) {
  using T = typename Tile::Element;
  let_next_grid_start();
  const auto [pair, row, head, key_warp, query_warp, first_query] =
      Place<Tile>(a, blockIdx.x, threadIdx.x);
  const bool works = first_query < a.queries();

  const int64_t store = a.rows ? a.rows[row] : row;
  const bool known = store >= 0 && store < a.stores;
  const LiveRange range = live_range(a, row, known, blockIdx.y, Tile::kKeys);
  const int64_t at = known ? store : 0;
  const T* keys =
      static_cast<const T*>(a.k_prefix) + at * a.k_row + head * a.k_head + range.begin * a.k_step;
  const T* values =
      static_cast<const T*>(a.v_prefix) + at * a.v_row + head * a.v_head + range.begin * a.v_step;
  const int tiles = (range.count + Tile::kKeys - 1) / Tile::kKeys;
  for (int i = 0; i < Tile::kStages - 1; ++i) {
    if (i < tiles) Tile::copy(a, keys, values, i, range.count);
    commit_copies();
  }

  typename Tile::State state;
  state.clear();
  if (works && blockIdx.y == 0 && key_warp == 0) {
    start_with_own<Tile>(a, row, head, first_query, known, state);
  }
  const typename Tile::Queries queries(a, row, head, first_query,
                                       shared_memory() + Tile::kRingBytes);
  for (int i = 0; i < tiles; ++i) {
    const int coming = i + Tile::kStages - 1;
    if (coming < tiles) Tile::copy(a, keys, values, coming, range.count);
    commit_copies();
    wait_copies<Tile::kStages - 1>();
    __syncthreads();
    if (works) Tile::attend(a, queries, key_warp, i, range.count, state);
    __syncthreads();
  }
  state.sum_over_lanes();
  if constexpr (Tile::kKeyWarps > 1) merge_warps<Tile>(state, key_warp, query_warp);
  const Place<Tile> again(a, anew(blockIdx.x), anew(threadIdx.x));
  if (again.first_query >= a.queries() || again.key_warp > 0) return;
  a.splits > 1 ? store_split<Tile>(a, again.pair, again.first_query, state)
               : store_result<Tile>(a, again.row, again.head, again.first_query, state);
}

// Grid: batch * heads, groups of kMergeQueries queries.
template <class T, int kWidth>
__global__ void __launch_bounds__(32 * kMergeQueries) merge_splits(AttentionArguments a) {
  wait_for_previous_grid();
  const int query = blockIdx.y * kMergeQueries + threadIdx.x / 32;
  if (query >= a.queries()) return;
  const int lane = threadIdx.x % 32;
  const int pair = blockIdx.x;
  const int64_t first = (static_cast<int64_t>(pair) * a.queries() + query) * a.splits;
  constexpr int kHalves = kMaxSplits / 32, kPerLane = (kWidth + 127) / 128;
  float peak[kHalves], sum[kHalves], top = -kInf<float>;
#pragma unroll
  for (int h = 0; h < kHalves; ++h) {
    const int split = 32 * h + lane;
    peak[h] = split < a.splits ? a.peaks[first + split] : -kInf<float>;
    sum[h] = split < a.splits ? a.sums[first + split] : 0.0f;
    top = fmaxf(top, peak[h]);
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    top = fmaxf(top, __shfl_xor_sync(~0u, top, offset));
  }
  const float reference = top == -kInf<float> ? 0.0f : top;
  float total = 0.0f;
  float4 mixed[kPerLane] = {};
#pragma unroll
  for (int h = 0; h < kHalves; ++h) {
    const float weight = exp2_near(peak[h] - reference);
    total += weight * sum[h];
    const int here = a.splits - 32 * h < 32 ? a.splits - 32 * h : 32;
#pragma unroll 8
    for (int split = 0; split < here; ++split) {
      const float share = __shfl_sync(~0u, weight, split);
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        const int d = 4 * (32 * j + lane);
        if (share == 0.0f || d >= kWidth) continue;  // a split without positions wrote no values
        const float4 part =
            *reinterpret_cast<const float4*>(a.partials + (first + 32 * h + split) * kWidth + d);
        mixed[j].x += share * part.x;
        mixed[j].y += share * part.y;
        mixed[j].z += share * part.z;
        mixed[j].w += share * part.w;
      }
    }
  }
  for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(~0u, total, offset);
  const float share_of_all = 1.0f / total;
  T* out = result_of<T>(a, pair / a.heads, pair % a.heads, query);
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const int d = 4 * (32 * j + lane);
    store_pair(out, d, a.width, mixed[j].x * share_of_all, mixed[j].y * share_of_all);
    store_pair(out, d + 2, a.width, mixed[j].z * share_of_all, mixed[j].w * share_of_all);
  }
}

}  // namespace rgtg::cuda
