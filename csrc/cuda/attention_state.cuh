// The arguments of candidate_attention and the online softmax of a warp.
//
// A warp has 16 queries. Lane l holds, of a [16, 8] tile of scores or of results, the elements of
// rows l / 4 and l / 4 + 8 in columns 2 * (l % 4) and the next: what mma.sync gives.
#pragma once

#include "cuda/mma.h"
#include "host_device.h"

#include <cmath>
#include <type_traits>

namespace rgtg::cuda {

struct AttentionArguments {
  const void *q, *k_prefix, *v_prefix, *k_self, *v_self;  // dense last dimensions
  const int64_t *start, *length, *rows;                   // [batch]; rows may be null
  int64_t q_row, q_slot, q_head, k_row, k_head, k_step, v_row, v_head, v_step;
  int64_t own_k_row, own_k_slot, own_k_head, own_v_row, own_v_slot, own_v_head;
  int64_t stores, prefix, window;  // window 0: none
  int batch, k, heads, group, width, splits;
  float scale, softcap;            // softcap 0: none
  bool aligned;                    // every row of every tensor begins at 16 bytes, and ends so
  float *partials, *peaks, *sums;  // [batch * heads, queries, splits], partials of padded_width
  void* out;                       // [batch, k, heads * group, width], contiguous

  RGTG_HOST_DEVICE int queries() const { return k * group; }
};

struct LiveRange {
  int64_t begin;
  int count;
};

// The positions of one split. What is live is dealt out evenly, in whole tiles.
__device__ inline LiveRange live_range(const AttentionArguments& a, int row, bool known, int split,
                                       int tile) {
  int64_t begin = a.start[row] > 0 ? a.start[row] : 0;
  int64_t end = a.length[row] > 0 ? a.length[row] : 0;
  // end - window overflows for no end that is not negative.
  if (a.window > 0 && begin < end - a.window + 1) begin = end - a.window + 1;
  if (end > a.prefix) end = a.prefix;
  if (!known || begin >= end) return {0, 0};
  const int64_t share = ((end - begin + a.splits - 1) / a.splits + tile - 1) / tile * tile;
  begin += split * share;
  if (begin >= end) return {0, 0};
  return {begin, static_cast<int>(end - begin < share ? end - begin : share)};
}

// Elements d and d + 1 of a row, 0 beyond the width; `row` may be null.
template <class T>
__device__ inline float2 load_pair(const T* row, int d, const AttentionArguments& a) {
  return {row && d < a.width ? widen(row[d]) : 0.0f,
          row && d + 1 < a.width ? widen(row[d + 1]) : 0.0f};
}

template <class T>
__device__ inline void store_pair(T* row, int d, int width, float first, float second) {
  if constexpr (sizeof(T) == 2) {
    const uint32_t both = pack<T>(first, second);
    if (d < width) row[d] = T{static_cast<uint16_t>(both)};
    if (d + 1 < width) row[d + 1] = T{static_cast<uint16_t>(both >> 16)};
  } else {
    if (d < width) row[d] = first;
    if (d + 1 < width) row[d + 1] = second;
  }
}

template <class T>
__device__ const T* query_row(const AttentionArguments& a, int row, int head, int query) {
  if (query >= a.queries()) return nullptr;
  return static_cast<const T*>(a.q) + row * a.q_row + query / a.group * a.q_slot +
         (head * a.group + query % a.group) * a.q_head;
}

template <class T>
__device__ T* result_of(const AttentionArguments& a, int row, int head, int query) {
  const int slot = query / a.group, query_head = head * a.group + query % a.group;
  return static_cast<T*>(a.out) +
         ((static_cast<int64_t>(row) * a.k + slot) * a.heads * a.group + query_head) * a.width;
}

constexpr float kLog2E = 1.44269504088896341f;

// tanh without a branch, which would be unrolled for every score; near 0 a series keeps its digits.
__device__ inline float tanh_near(float x) {
  const float square = x * x;
  float series = (square * (62.0f / 2835) - 17.0f / 315) * square + 2.0f / 15;
  series = x + x * square * (series * square - 1.0f / 3);
  const float decay = exp2_near(-2.0f * kLog2E * fabsf(x));
  const float far = divide_near(1.0f - decay, 1.0f + decay);
  return fabsf(x) < 0.25f ? series : copysignf(far, x);
}

// Scores in units of log2 e: exp(score) = 2^this.
template <int kTiles>
__device__ void make_scores(const AttentionArguments& a, float (&dots)[kTiles][4]) {
  if (a.softcap > 0.0f) {
    const float scale = a.scale / a.softcap, cap = a.softcap * kLog2E;
#pragma unroll
    for (auto& tile : dots) {
#pragma unroll
      for (float& x : tile) x = cap * tanh_near(x * scale);
    }
  } else {
    const float scale = a.scale * kLog2E;
#pragma unroll
    for (auto& tile : dots) {
#pragma unroll
      for (float& x : tile) x *= scale;
    }
  }
}

// Lanes of one row: l, l ^ 1, l ^ 2, l ^ 3.
__device__ inline float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ inline float row_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Online softmax of a warp's queries: of rows l / 4 and l / 4 + 8.
template <int kWidth>
struct AttentionState {
  float peak[2], total[2], mixed[kWidth / 8][4];

  __device__ void clear() {
    peak[0] = peak[1] = -kInf<float>;
    total[0] = total[1] = 0.0f;
#pragma unroll
    for (auto& tile : mixed) tile[0] = tile[1] = tile[2] = tile[3] = 0.0f;
  }

  // A lane's totals are of its own columns until the end.
  __device__ void sum_over_lanes() {
    total[0] = row_sum(total[0]);
    total[1] = row_sum(total[1]);
  }

  // Makes `scores`, in place, weights relative to the new peaks.
  template <int kTiles>
  __device__ void rebase(float (&scores)[kTiles][4]) {
    float top[2] = {peak[0], peak[1]};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      top[0] = fmaxf(top[0], fmaxf(scores[n][0], scores[n][1]));
      top[1] = fmaxf(top[1], fmaxf(scores[n][2], scores[n][3]));
    }
    float reference[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top[r] = row_max(top[r]);
      reference[r] = top[r] == -kInf<float> ? 0.0f : top[r];  // -inf minus -inf would be NaN
    }
    if (__any_sync(~0u, top[0] != peak[0] || top[1] != peak[1])) {
      const float keep[2] = {exp2_near(peak[0] - reference[0]), exp2_near(peak[1] - reference[1])};
#pragma unroll
      for (auto& tile : mixed) {
        tile[0] *= keep[0], tile[1] *= keep[0];
        tile[2] *= keep[1], tile[3] *= keep[1];
      }
      total[0] *= keep[0], total[1] *= keep[1];
      peak[0] = top[0], peak[1] = top[1];
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[n][i] = exp2_near(scores[n][i] - reference[i / 2]);
      total[0] += scores[n][0] + scores[n][1];
      total[1] += scores[n][2] + scores[n][3];
    }
  }
};

}  // namespace rgtg::cuda
