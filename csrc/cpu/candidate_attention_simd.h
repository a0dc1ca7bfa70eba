// Attention of all queries of one KV head to one chunk of its prefix in one read, and the sum of
// the chunks. Included once per instruction set by simd.h.
//
// Two layouts of the scores. Many queries: scores[t][query], a lane per query, so that neither the
// keys are transposed nor lanes summed. Few queries would leave most lanes idle: there each score
// is a dot product over D and the layout is scores[query][t], a lane per key.
#include "cpu/dot_simd.h"
#include "cpu/exp_simd.h"

constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr int kFewQueries = kWidth / 4;
// Sizes of register blocks: larger ones would spill their sums or operands.
constexpr int kKeyBlock = kWidth == 16 ? 8 : 4;
constexpr int kVectorBlock = 3;  // of queries
constexpr int64_t kRun = 32;
constexpr int kQueryBlock = 6;
constexpr int kValueBlock = kWidth == 16 ? 4 : 2;  // vectors of values

constexpr int64_t whole_vectors(int64_t n) { return (n + kWidth - 1) / kWidth; }

// Row as fp32, padded with zeros to a whole vector.
template <class T>
RGTG_INLINE void widen_row(const T* row, int64_t width, float* out) {
  int64_t d = 0;
  for (; d + kWidth <= width; d += kWidth) store(out + d, load(row + d));
  if (d == width) return;
  store(out + whole_vectors(width) * kWidth - kWidth, splat(0.0f));
  for (; d < width; ++d) out[d] = widen(row[d]);
}

inline void narrow_row(const float* row, int64_t width, float* out) {
  memcpy(out, row, width * sizeof(float));
}
inline void narrow_row(const float* row, int64_t width, bf16* out) {
  for (int64_t d = 0; d < width; ++d) out[d] = narrow_bf16(row[d]);
}
inline void narrow_row(const float* row, int64_t width, fp16* out) {
  int64_t d = 0;
  for (; d + kWidth <= width; d += kWidth) store(out + d, load(row + d));
  for (; d < width; ++d) out[d] = narrow_fp16(row[d]);
}

template <class T>
RGTG_INLINE void prefetch_rows(const T* rows, int64_t step, int64_t count, int64_t width) {
  for (int64_t t = 0; t < count; ++t) {
    const char* line = reinterpret_cast<const char*>(rows + t * step);
    const char* end = line + width * sizeof(T);
    for (; line < end; line += 64) __builtin_prefetch(line);
  }
}

struct Rows {
  const float* data;
  int64_t step;
};

// fp32 rows of whole vectors are used in place; others are widened into `buffer`.
template <class T>
RGTG_INLINE Rows whole_rows(const T* rows, int64_t step, int64_t count, int64_t width,
                            float* buffer) {
  if constexpr (std::is_same_v<T, float>) {
    if (width % kWidth == 0) return {rows, step};
  }
  const int64_t wide = whole_vectors(width) * kWidth;
  for (int64_t t = 0; t < count; ++t) widen_row(rows + t * step, width, buffer + t * wide);
  return {buffer, wide};
}

RGTG_INLINE float first_lane(Vec v) {
  float x;
  memcpy(&x, &v, sizeof x);
  return x;
}

RGTG_INLINE Vec capped(Vec score, float softcap) {
  return mul(splat(softcap), tanh(div(score, splat(softcap))));
}

template <class T>
const T* query_row(const AttentionShape& shape, const AttentionHead<T>& head, int64_t query) {
  return head.query + query / shape.group * head.query_slot + query % shape.group * head.query_head;
}

// Packs as [queries][padded D] for few queries, else as [D][padded queries].
template <class T>
void pack_queries(const AttentionShape& shape, const AttentionHead<T>& head, float* out) {
  const int64_t pad = padded(shape.queries);
  for (int64_t i = 0; i < shape.queries; ++i) {
    const T* row = query_row(shape, head, i);
    if (shape.queries <= kFewQueries) {
      widen_row(row, shape.width, out + i * padded(shape.width));
    } else {
      for (int64_t d = 0; d < shape.width; ++d) out[d * pad + i] = widen(row[d]);
    }
  }
  if (shape.queries <= kFewQueries) return;
  for (int64_t d = 0; d < shape.width; ++d) {
    for (int64_t i = shape.queries; i < pad; ++i) out[d * pad + i] = 0.0f;
  }
}

// Sums a dot product of D elements in runs of kRun: one chain of additions would have a larger
// error than torch's matrix product.
template <int KEYS, int VECTORS>
void score_block(const float* queries, int64_t pad, Rows keys, const AttentionShape& shape,
                 float* scores) {
  for (int64_t d = 0; d < shape.width;) {
    const int64_t end = std::min(d + kRun, shape.width);
    const bool first = d == 0, last = end == shape.width;
    Vec sums[KEYS][VECTORS], q[VECTORS];
    for (int c = 0; c < VECTORS; ++c) q[c] = load(queries + d * pad + c * kWidth);
    for (int t = 0; t < KEYS; ++t) {
      const Vec key = splat(keys.data[t * keys.step + d]);
      for (int c = 0; c < VECTORS; ++c) sums[t][c] = mul(key, q[c]);
    }
    while (++d < end) {
      for (int c = 0; c < VECTORS; ++c) q[c] = load(queries + d * pad + c * kWidth);
      for (int t = 0; t < KEYS; ++t) {
        const Vec key = splat(keys.data[t * keys.step + d]);
        for (int c = 0; c < VECTORS; ++c) sums[t][c] = fma(key, q[c], sums[t][c]);
      }
    }
    const Vec factor = splat(last ? shape.scale : 1.0f);
    for (int t = 0; t < KEYS; ++t) {
      for (int c = 0; c < VECTORS; ++c) {
        float* score = scores + t * pad + c * kWidth;
        const Vec sum = first ? sums[t][c] : add(load(score), sums[t][c]);
        store(score, mul(sum, factor));
      }
    }
  }
}

// Scores of n keys in blocks. The last block is moved back to stay within n; the keys it shares
// with the one before get the same scores again.
template <int VECTORS, class Fn>
RGTG_INLINE void score_keys(const float* queries, int64_t pad, Rows keys, int64_t n,
                            const AttentionShape& shape, float* scores, const Fn& before) {
  if (n < kKeyBlock) {
    before(0, n);
    for (int64_t t = 0; t < n; ++t) {
      score_block<1, VECTORS>(queries, pad, {keys.data + t * keys.step, keys.step}, shape,
                              scores + t * pad);
    }
    return;
  }
  for (int64_t t = 0; t < n; t += kKeyBlock) {
    t = std::min(t, n - kKeyBlock);
    before(t, kKeyBlock);
    score_block<kKeyBlock, VECTORS>(queries, pad, {keys.data + t * keys.step, keys.step}, shape,
                                    scores + t * pad);
  }
}

// scores[t][query] of n keys. `before(t, count)` is called once for every block of keys, to
// prefetch what is needed next.
template <class Fn>
void score_many(const float* queries, Rows keys, int64_t n, const AttentionShape& shape,
                float* scores, const Fn& before) {
  const int64_t pad = padded(shape.queries), vectors = whole_vectors(shape.queries);
  const auto nothing = [](int64_t, int64_t) {};
  for (int64_t c = 0; c < vectors;) {
    const int64_t left = vectors - c, take = left == 4 ? 2 : std::min<int64_t>(left, kVectorBlock);
    const float* q = queries + c * kWidth;
    float* s = scores + c * kWidth;
    const auto block = [&](const auto& fetch) {
      if (take == 3) return score_keys<3>(q, pad, keys, n, shape, s, fetch);
      if (take == 2) return score_keys<2>(q, pad, keys, n, shape, s, fetch);
      return score_keys<1>(q, pad, keys, n, shape, s, fetch);
    };
    c == 0 ? block(before) : block(nothing);
    c += take;
  }
}

// Online softmax, scores[t][query]: turns scores into weights exp(score - peak) and leaves in
// `shrink` the factor by which sums relative to the old peak must be scaled.
inline void softmax_many(const AttentionShape& shape, int64_t n, float* scores, float* shrink,
                         const AttentionState& state) {
  const int64_t pad = padded(shape.queries);
  for (int64_t c = 0; c < shape.queries; c += kWidth) {
    float* s = scores + c;
    if (shape.softcap != 0.0f) {
      for (int64_t t = 0; t < n; ++t) store(s + t * pad, capped(load(s + t * pad), shape.softcap));
    }
    const Vec before = load(state.peak + c);
    Vec largest[2] = {before, before}, sum[2] = {splat(0.0f), splat(0.0f)};
    for (int64_t t = 0; t + 2 <= n; t += 2) {
      largest[0] = max(load(s + t * pad), largest[0]);
      largest[1] = max(load(s + (t + 1) * pad), largest[1]);
    }
    if (n % 2) largest[0] = max(load(s + (n - 1) * pad), largest[0]);
    const Vec peak = max(largest[0], largest[1]);
    const auto weigh = [&](int64_t t) {
      const Vec weight = exp_clamped(sub(load(s + t * pad), peak));
      store(s + t * pad, weight);
      return weight;
    };
    for (int64_t t = 0; t + 2 <= n; t += 2) {
      sum[0] = add(sum[0], weigh(t));
      sum[1] = add(sum[1], weigh(t + 1));
    }
    if (n % 2) sum[0] = add(sum[0], weigh(n - 1));
    const Vec less = exp_clamped(sub(before, peak));
    store(shrink + c, less);
    store(state.peak + c, peak);
    store(state.sum + c, fma(load(state.sum + c), less, add(sum[0], sum[1])));
  }
}

// The same for scores[query][t].
inline void softmax_few(const AttentionShape& shape, int64_t n, float* scores, float* shrink,
                        const AttentionState& state) {
  const int64_t end = whole_vectors(n) * kWidth;
  for (int64_t i = 0; i < shape.queries; ++i) {
    float* s = scores + i * kKeyTile;
    Vec largest = splat(state.peak[i]), sum = splat(0.0f);
    for (int64_t t = n; t < end; ++t) s[t] = kLowest;
    for (int64_t t = 0; t < end; t += kWidth) {
      if (shape.softcap != 0.0f) store(s + t, capped(load(s + t), shape.softcap));
      if (t + kWidth > n) {
        for (int64_t u = n; u < end; ++u) s[u] = kLowest;
      }
      largest = max(load(s + t), largest);
    }
    const float peak = max_lanes(largest);
    for (int64_t t = 0; t < end; t += kWidth) {
      const Vec weight = exp_clamped(sub(load(s + t), splat(peak)));
      store(s + t, weight);
      sum = add(sum, weight);
    }
    shrink[i] = first_lane(exp_clamped(splat(state.peak[i] - peak)));
    state.peak[i] = peak;
    state.sum[i] = state.sum[i] * shrink[i] + sum_lanes(sum);
  }
}

// total[query] = total[query] * shrink[query] + sum over t of weight(t, query) * values[t].
struct Weights {
  const float* data;
  int64_t key_step, query_step;
};

template <int QUERIES, int VECTORS>
void value_block(Weights weights, const float* shrink, Rows values, int64_t n, float* total,
                 int64_t total_step) {
  Vec sums[QUERIES][VECTORS];
  for (int i = 0; i < QUERIES; ++i) {
    for (int c = 0; c < VECTORS; ++c) sums[i][c] = splat(0.0f);
  }
  for (int64_t t = 0; t < n; ++t) {
    Vec v[VECTORS];
    for (int c = 0; c < VECTORS; ++c) v[c] = load(values.data + t * values.step + c * kWidth);
    for (int i = 0; i < QUERIES; ++i) {
      const Vec weight = splat(weights.data[t * weights.key_step + i * weights.query_step]);
      for (int c = 0; c < VECTORS; ++c) sums[i][c] = fma(weight, v[c], sums[i][c]);
    }
  }
  for (int i = 0; i < QUERIES; ++i) {
    for (int c = 0; c < VECTORS; ++c) {
      float* place = total + i * total_step + c * kWidth;
      store(place, fma(load(place), splat(shrink[i]), sums[i][c]));
    }
  }
}

template <int QUERIES>
void value_queries(Weights weights, const float* shrink, Rows values, int64_t n, int64_t vectors,
                   float* total, int64_t total_step) {
  int64_t c = 0;
  const auto run = [&](auto count) {
    constexpr int kCount = decltype(count)::value;
    for (; c + kCount <= vectors; c += kCount) {
      value_block<QUERIES, kCount>(weights, shrink, {values.data + c * kWidth, values.step}, n,
                                   total + c * kWidth, total_step);
    }
  };
  run(std::integral_constant<int, kValueBlock>{});
  if constexpr (kValueBlock > 2) run(std::integral_constant<int, 2>{});
  run(std::integral_constant<int, 1>{});
}

// `before(part, parts)` is called once for every block of queries, to prefetch the next keys.
template <class Fn>
void add_values(const AttentionShape& shape, Weights weights, const float* shrink, Rows values,
                int64_t n, float* total, const Fn& before) {
  const int64_t step = padded(shape.width), vectors = whole_vectors(shape.width);
  const int64_t parts = (shape.queries + kQueryBlock - 1) / kQueryBlock;
  for (int64_t part = 0; part < parts; ++part) {
    before(part, parts);
    const int64_t first = part * shape.queries / parts;
    const int64_t count = (part + 1) * shape.queries / parts - first;
    const Weights w{weights.data + first * weights.query_step, weights.key_step,
                    weights.query_step};
    const auto run = [&](auto queries) {
      value_queries<decltype(queries)::value>(w, shrink + first, values, n, vectors,
                                              total + first * step, step);
    };
    switch (count) {
      case 1:
        run(std::integral_constant<int, 1>{});
        break;
      case 2:
        run(std::integral_constant<int, 2>{});
        break;
      case 3:
        run(std::integral_constant<int, 3>{});
        break;
      case 4:
        run(std::integral_constant<int, 4>{});
        break;
      case 5:
        run(std::integral_constant<int, 5>{});
        break;
      default:
        run(std::integral_constant<int, 6>{});
    }
  }
}

// Attention to positions first .. first + count - 1 of the live prefix; pack_queries must have run
// for this head.
template <class T>
void attend(const AttentionShape& shape, const AttentionHead<T>& head, int64_t first, int64_t count,
            const Upcoming<T>& upcoming, const AttentionScratch& scratch,
            const AttentionState& state) {
  const bool few = shape.queries <= kFewQueries;
  const int64_t pad = padded(shape.queries), width = padded(shape.width);
  std::fill_n(state.peak, pad, kLowest);
  std::fill_n(state.sum, pad, 0.0f);
  std::fill_n(state.total, shape.queries * width, 0.0f);
  for (int64_t t = first; t < first + count; t += kKeyTile) {
    const int64_t n = std::min(kKeyTile, first + count - t);
    const int64_t left = first + count - t - n;
    const T* key = head.key + t * head.key_step;
    const T* value = head.value + t * head.value_step;
    const T* next_key = left ? key + n * head.key_step : upcoming.keys;
    const int64_t next = std::min(kKeyTile, left ? left : upcoming.count);
    if (few) {
      for (int64_t j = 0; j < n; ++j) {
        prefetch_rows(value + j * head.value_step, head.value_step, 1, shape.width);
        for (int64_t i = 0; i < shape.queries; ++i) {
          scratch.scores[i * kKeyTile + j] =
              shape.scale * dot(scratch.queries + i * width, key + j * head.key_step, shape.width);
        }
      }
      softmax_few(shape, n, scratch.scores, scratch.shrink, state);
    } else {
      const Rows keys = whole_rows(key, head.key_step, n, shape.width, scratch.keys);
      score_many(scratch.queries, keys, n, shape, scratch.scores, [&](int64_t j, int64_t rows) {
        prefetch_rows(value + j * head.value_step, head.value_step, rows, shape.width);
      });
      softmax_many(shape, n, scratch.scores, scratch.shrink, state);
    }
    const Rows values = whole_rows(value, head.value_step, n, shape.width, scratch.values);
    const Weights weights{scratch.scores, few ? 1 : pad, few ? kKeyTile : 1};
    const auto fetch_keys = [&](int64_t part, int64_t parts) {
      const int64_t j = next * part / parts, end = next * (part + 1) / parts;
      prefetch_rows(next_key + j * head.key_step, head.key_step, end - j, shape.width);
    };
    add_values(shape, weights, scratch.shrink, values, n, state.total, fetch_keys);
  }
}

// Adds each query's own key and value to the states of its `chunks` chunks, which lie `stride`
// floats apart in `states`.
template <class T>
void finish(const AttentionShape& shape, const AttentionHead<T>& head, float* states,
            int64_t stride, int64_t chunks, const AttentionScratch& scratch) {
  float *row = scratch.keys, *own_value = scratch.values;
  for (int64_t i = 0; i < shape.queries; ++i) {
    const int64_t slot = i / shape.group;
    widen_row(query_row(shape, head, i), shape.width, row);
    float own = shape.scale * dot(row, head.own_key + slot * head.own_key_slot, shape.width);
    if (shape.softcap != 0.0f) own = first_lane(capped(splat(own), shape.softcap));
    float top = own;
    for (int64_t c = 0; c < chunks; ++c) {
      const float peak = AttentionState(states + c * stride, shape).peak[i];
      top = peak > top ? peak : top;
    }
    const Vec own_weight = exp_clamped(splat(own - top));
    Vec weight[kMaxChunks], sum = own_weight;
    for (int64_t c = 0; c < chunks; ++c) {
      const AttentionState state(states + c * stride, shape);
      weight[c] = exp_clamped(splat(state.peak[i] - top));
      sum = fma(weight[c], splat(state.sum[i]), sum);
    }
    widen_row(head.own_value + slot * head.own_value_slot, shape.width, own_value);
    for (int64_t d = 0; d < shape.width; d += kWidth) {
      Vec mixed = mul(own_weight, load(own_value + d));
      for (int64_t c = 0; c < chunks; ++c) {
        const AttentionState state(states + c * stride, shape);
        mixed = fma(weight[c], load(state.total + i * padded(shape.width) + d), mixed);
      }
      store(row + d, div(mixed, sum));
    }
    narrow_row(row, shape.width, head.out + slot * head.out_slot + i % shape.group * shape.width);
  }
}
