// What one block of candidate_attention does with one tile of the prefix.
#pragma once

#include "cuda/attention_state.cuh"

#include <algorithm>

namespace rgtg::cuda {

constexpr int kAttentionThreads = 128;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
constexpr int kMostBlocks = 2;  // the memory of sm_80 holds no third; on sm_100 it would spill
#else
constexpr int kMostBlocks = 3;
#endif

// Queries as the left side of products, in registers.
template <class T, int kWidth>
struct QueryFragments {
  static constexpr bool kInMemory = kWidth > 128;  // they would take too many registers
  uint32_t kept[kInMemory ? 1 : kWidth / 16][4];
  uint4* memory;

  __device__ QueryFragments(const AttentionArguments& a, int row, int head, int first,
                            unsigned char* shared)
      : memory(reinterpret_cast<uint4*>(shared) + threadIdx.x) {
    const int lane = threadIdx.x % 32;
    const T* rows[2] = {query_row<T>(a, row, head, first + lane / 4),
                        query_row<T>(a, row, head, first + lane / 4 + 8)};
    // All at once, the loads of wide queries would take registers that the results need.
    constexpr int kAtOnce = kInMemory ? 1 : kWidth / 16;
#pragma unroll kAtOnce
    for (int t = 0; t < kWidth / 16; ++t) {
      uint32_t part[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = load_pair(rows[i % 2], 16 * t + i / 2 * 8 + lane % 4 * 2, a);
        part[i] = pack<T>(pair.x, pair.y);
        if constexpr (!kInMemory) kept[t][i] = part[i];
      }
      if constexpr (kInMemory) memory[kAttentionThreads * t] = {part[0], part[1], part[2], part[3]};
    }
  }

  __device__ void get(int t, uint32_t (&part)[4]) const {
    if constexpr (kInMemory) {
      const uint4 four = memory[kAttentionThreads * t];
      part[0] = four.x, part[1] = four.y, part[2] = four.z, part[3] = four.w;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) part[i] = kept[t][i];
    }
  }
};

// fp32 reads its queries where they lie: they are too many for registers.
template <int kWidth>
struct QueryFragments<float, kWidth> {
  const float* rows[2];

  __device__ QueryFragments(const AttentionArguments& a, int row, int head, int first,
                            unsigned char*)
      : rows{query_row<float>(a, row, head, first + threadIdx.x % 32 / 4),
             query_row<float>(a, row, head, first + threadIdx.x % 32 / 4 + 8)} {}
};

template <class T, int kPaddedWidth, int kWarpsOfKeys>
struct AttentionTile {
  using Element = T;
  static constexpr int kWidth = kPaddedWidth, kKeyWarps = kWarpsOfKeys;
  static constexpr int kQueryWarps = 4 / kKeyWarps, kQueries = 16 * kQueryWarps;
  static constexpr int kPer = 16 / sizeof(T);  // elements of a copy
  static constexpr int kLeastKeys = kKeyWarps * (sizeof(T) == 2 ? 16 : 8);
  static constexpr int kKeys = std::max(kLeastKeys, 8192 / kWidth / static_cast<int>(sizeof(T)));
  static constexpr int kOwnKeys = kKeys / kKeyWarps;
  // An odd number of 16-byte chunks: rows that are read together lie in different banks.
  static constexpr int kStride = kWidth + kPer;
  static constexpr int kStages = kKeys * kWidth * sizeof(T) > 8192 ? 2 : 4;
  static constexpr int kRingBytes = kStages * 2 * kKeys * kStride * sizeof(T);  // keys and values
  static constexpr int kQueryBytes =
      sizeof(T) == 2 && kWidth > 128 ? kAttentionThreads * kWidth : 0;
  static constexpr int kBytes = kRingBytes + kQueryBytes;
  static constexpr int kBlocks = kWidth > 128 ? 2 : kMostBlocks;  // per multiprocessor
  static_assert(kOwnKeys % (sizeof(T) == 2 ? 16 : 8) == 0);
  using State = AttentionState<kWidth>;
  using Queries = QueryFragments<T, kWidth>;

  __device__ static T* stage(int tile) {
    return reinterpret_cast<T*>(shared_memory()) + tile % kStages * 2 * kKeys * kStride;
  }

  // Starts to bring tile `tile` of the split's `count` positions; zeros beyond them.
  __device__ static void copy(const AttentionArguments& a, const T* keys, const T* values, int tile,
                              int count) {
    copy_rows(a, stage(tile), keys, a.k_step, tile * kKeys, count);
    copy_rows(a, stage(tile) + kKeys * kStride, values, a.v_step, tile * kKeys, count);
  }

  __device__ static void copy_rows(const AttentionArguments& a, T* to, const T* rows, int64_t step,
                                   int first, int count) {
    constexpr int kChunks = kWidth / kPer, kAtOnce = kAttentionThreads / kChunks;
    const int thread = anew(threadIdx.x), d = thread % kChunks * kPer, key = thread / kChunks;
    const T* from = rows + (first + key) * step + d;
    to += key * kStride + d;
    if (a.aligned) {
#pragma unroll
      for (int i = 0; i < kKeys; i += kAtOnce, from += kAtOnce * step) {
        const bool inside = first + key + i < count && d < a.width;
        copy_async(to + i * kStride, inside ? from : rows, inside ? 16 : 0);
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < kKeys; i += kAtOnce, from += kAtOnce * step) {
        const bool inside = first + key + i < count;
#pragma unroll 1
        for (int e = 0; e < kPer; ++e) {
          to[i * kStride + e] = inside && d + e < a.width ? from[e] : T{};
        }
      }
    }
  }

  // Adds the warp's positions of a tile to its queries' state.
  __device__ static void attend(const AttentionArguments& a, const Queries& queries, int key_warp,
                                int tile, int count, State& state) {
    const T* keys = stage(tile) + key_warp * kOwnKeys * kStride;
    const T* values = keys + kKeys * kStride;
    float scores[kOwnKeys / 8][4] = {};
    if constexpr (sizeof(T) == 2) {
      multiply_keys(queries, keys, scores);
    } else {
      dot_keys(a, queries, keys, scores);
    }
    make_scores(a, scores);
    const int left = count - tile * kKeys - key_warp * kOwnKeys - anew(threadIdx.x) % 4 * 2;
#pragma unroll
    for (int n = 0; n < kOwnKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (8 * n + i % 2 >= left) scores[n][i] = -kInf<float>;
      }
    }
    state.rebase(scores);
    if constexpr (sizeof(T) == 2) {
      multiply_values(scores, values, state);
    } else {
      add_values(scores, values, state);
    }
  }

  __device__ static void multiply_keys(const Queries& queries, const T* keys,
                                       float (&scores)[kOwnKeys / 8][4]) {
    const int lane = anew(threadIdx.x) % 32;
    const T* from = keys + (lane / 16 * 8 + lane % 8) * kStride + lane / 8 % 2 * 8;
#pragma unroll
    for (int t = 0; t < kWidth / 16; ++t) {
      uint32_t query[4];
      queries.get(t, query);
#pragma unroll
      for (int n = 0; n < kOwnKeys / 16; ++n) {
        uint32_t key[4];
        load_matrices(key, from + 16 * n * kStride + 16 * t);
        multiply_add<T>(scores[2 * n], query, key[0], key[1]);
        multiply_add<T>(scores[2 * n + 1], query, key[2], key[3]);
      }
    }
  }

  // The weights are taken in two parts of the values' type: rounding them to one would cost more
  // accuracy than rounding the result does.
  __device__ static void multiply_values(const float (&weights)[kOwnKeys / 8][4], const T* values,
                                         State& state) {
    const int lane = anew(threadIdx.x) % 32;
    const T* from = values + (lane / 8 % 2 * 8 + lane % 8) * kStride + lane / 16 * 8;
#pragma unroll
    for (int n = 0; n < kOwnKeys / 16; ++n) {
      uint32_t high[4], low[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = weights[2 * n + i / 2] + i % 2 * 2;
        high[i] = pack<T>(pair[0], pair[1]);
        low[i] = pack<T>(pair[0] - widen(T{static_cast<uint16_t>(high[i])}),
                         pair[1] - widen(T{static_cast<uint16_t>(high[i] >> 16)}));
      }
#pragma unroll
      for (int t = 0; t < kWidth / 16; ++t) {
        uint32_t value[4];
        load_transposed(value, from + 16 * n * kStride + 16 * t);
        multiply_add<T>(state.mixed[2 * t], high, value[0], value[1]);
        multiply_add<T>(state.mixed[2 * t + 1], high, value[2], value[3]);
        multiply_add<T>(state.mixed[2 * t], low, value[0], value[1]);
        multiply_add<T>(state.mixed[2 * t + 1], low, value[2], value[3]);
      }
    }
  }

  // fp32: no tensor core takes it whole. Sums in runs of 32, as long ones lose digits.
  __device__ static void dot_keys(const AttentionArguments& a, const Queries& queries,
                                  const T* keys, float (&scores)[kOwnKeys / 8][4]) {
    const T* from = keys + threadIdx.x % 4 * 2 * kStride;
#pragma unroll 1
    for (int run = 0; run < kWidth; run += 32) {
      float part[kOwnKeys / 8][4] = {};
#pragma unroll 1
      for (int d = run; d < run + 32; d += 4) {
        float2 query[2][2];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          query[i / 2][i % 2] = load_pair(queries.rows[i / 2], d + i % 2 * 2, a);
#pragma unroll
        for (int n = 0; n < kOwnKeys / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float4 key =
                *reinterpret_cast<const float4*>(from + (8 * n + i % 2) * kStride + d);
            const float2(&x)[2] = query[i / 2];
            part[n][i] += x[0].x * key.x + x[0].y * key.y + x[1].x * key.z + x[1].y * key.w;
          }
        }
      }
#pragma unroll
      for (int n = 0; n < kOwnKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[n][i] += part[n][i];
      }
    }
  }

  __device__ static void add_values(const float (&weights)[kOwnKeys / 8][4], const T* values,
                                    State& state) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < kOwnKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll 1
        for (int j = 0; j < 4; ++j) {
          const float first = __shfl_sync(~0u, weights[n][i], lane / 4 * 4 + j);
          const float second = __shfl_sync(~0u, weights[n][2 + i], lane / 4 * 4 + j);
          const T* from = values + (8 * n + 2 * j + i) * kStride + lane % 4 * 2;
#pragma unroll
          for (int t = 0; t < kWidth / 8; ++t) {
            const float2 value = *reinterpret_cast<const float2*>(from + 8 * t);
            state.mixed[t][0] += first * value.x;
            state.mixed[t][1] += first * value.y;
            state.mixed[t][2] += second * value.x;
            state.mixed[t][3] += second * value.y;
          }
        }
      }
    }
  }
};

// The state of queries that have seen nothing but their siblings' own key and value.
template <class Tile>
__device__ void start_with_own(const AttentionArguments& a, int row, int head, int first_query,
                               bool known, typename Tile::State& state) {
  using T = typename Tile::Element;
  const int lane = threadIdx.x % 32, column = lane % 4 * 2;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int query = first_query + lane / 4 + 8 * r;
    const T* x = query_row<T>(a, row, head, query);
    const int slot = query / a.group;
    const T* key = x ? static_cast<const T*>(a.k_self) + row * a.own_k_row + slot * a.own_k_slot +
                           head * a.own_k_head
                     : nullptr;
    const T* value = x ? static_cast<const T*>(a.v_self) + row * a.own_v_row + slot * a.own_v_slot +
                             head * a.own_v_head
                       : nullptr;
    float dot = 0.0f;
#pragma unroll 4
    for (int t = 0; t < Tile::kWidth / 8; ++t) {
      const float2 left = load_pair(x, 8 * t + column, a),
                   right = load_pair(key, 8 * t + column, a);
      dot += left.x * right.x + left.y * right.y;
    }
    float scores[1][4] = {{row_sum(dot)}};
    make_scores(a, scores);
    const float score = scores[0][0];
    const bool counts = score != -kInf<float>;  // infinite or NaN, it makes the result NaN
    state.peak[r] = score;
    // One lane of the row, as the lanes' totals are added in the end.
    state.total[r] = !known ? kNaN<float> : counts && column == 0 ? 1.0f + (score - score) : 0.0f;
#pragma unroll
    for (int t = 0; t < Tile::kWidth / 8; ++t) {
      const float2 pair = load_pair(value, 8 * t + column, a);
      state.mixed[t][2 * r] = counts ? pair.x : 0.0f;
      state.mixed[t][2 * r + 1] = counts ? pair.y : 0.0f;
    }
  }
}

template <class Tile>
__device__ void store_split(const AttentionArguments& a, int pair, int first_query,
                            const typename Tile::State& state) {
  const int lane = threadIdx.x % 32, column = lane % 4 * 2;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int query = first_query + lane / 4 + 8 * r;
    if (query >= a.queries()) continue;
    const int64_t place =
        (static_cast<int64_t>(pair) * a.queries() + query) * a.splits + blockIdx.y;
    if (column == 0) {
      a.peaks[place] = state.peak[r];
      a.sums[place] = state.total[r];
    }
    if (state.peak[r] == -kInf<float>) continue;
    float* to = a.partials + place * Tile::kWidth + column;
#pragma unroll
    for (int t = 0; t < Tile::kWidth / 8; ++t) {
      *reinterpret_cast<float2*>(to + 8 * t) = {state.mixed[t][2 * r], state.mixed[t][2 * r + 1]};
    }
  }
}

template <class Tile>
__device__ void store_result(const AttentionArguments& a, int row, int head, int first_query,
                             const typename Tile::State& state) {
  using T = typename Tile::Element;
  const int lane = threadIdx.x % 32, column = lane % 4 * 2;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int query = first_query + lane / 4 + 8 * r;
    if (query >= a.queries()) continue;
    T* out = result_of<T>(a, row, head, query);
    const float share = 1.0f / state.total[r];
#pragma unroll
    for (int t = 0; t < Tile::kWidth / 8; ++t) {
      store_pair(out, 8 * t + column, a.width, state.mixed[t][2 * r] * share,
                 state.mixed[t][2 * r + 1] * share);
    }
  }
}

}  // namespace rgtg::cuda
