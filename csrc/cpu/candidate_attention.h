// What candidate_attention.cpp hands to the kernels of candidate_attention_simd.h.
#pragma once

#include <cstdint>

namespace rgtg {

constexpr int64_t kKeyTile =
    32;  // keys between two updates of the running maxima; their K and V stay in L1
constexpr int64_t kMaxChunks = 16;
constexpr int64_t kLanes = 16;  // the widest vector: what buffers are padded to

constexpr int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// The queries of one KV head are numbered slot * group + query head in the group.
struct AttentionShape {
  int64_t queries, group, width;  // width is D
  float scale, softcap;           // softcap 0: none
};

// One row and one KV head; the prefix begins at its first live position. Strides are in elements.
template <class T>
struct AttentionHead {
  const T *query, *key, *value, *own_key, *own_value;
  int64_t query_slot, query_head, key_step, value_step, own_key_slot, own_value_slot;
  T* out;
  int64_t out_slot;  // heads of a slot are dense
};

// The keys of the thread's next chunk, prefetched during this one: `count` rows, key_step apart.
template <class T>
struct Upcoming {
  const T* keys;
  int64_t count;
};

// Online softmax of each query over one chunk of the prefix, all of it relative to `peak`.
struct AttentionState {
  float *peak, *sum, *total;  // total: [queries][padded(width)]

  AttentionState(float* memory, const AttentionShape& shape)
      : peak(memory),
        sum(memory + padded(shape.queries)),
        total(memory + 2 * padded(shape.queries)) {}

  static int64_t floats(const AttentionShape& shape) {
    return 2 * padded(shape.queries) + shape.queries * padded(shape.width);
  }
};

// One thread's buffers, laid out in `memory`.
struct AttentionScratch {
  float *queries, *scores, *shrink, *keys, *values, *state;

  AttentionScratch(float* memory, const AttentionShape& shape) {
    const int64_t count = padded(shape.queries), width = padded(shape.width);
    queries = memory;
    scores = queries + count * width;
    shrink = scores + count * kKeyTile;
    keys = shrink + count;
    values = keys + kKeyTile * width;
    state = values + kKeyTile * width;
  }

  static int64_t floats(const AttentionShape& shape) {
    const int64_t count = padded(shape.queries), width = padded(shape.width);
    return count * (width + kKeyTile + 1) + 2 * kKeyTile * width + AttentionState::floats(shape);
  }
};

}  // namespace rgtg
