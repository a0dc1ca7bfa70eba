// What the ops that read a vocabulary share: blocks of a row, the log-sum-exp over them, and their
// best keys. Included once per instruction set by the kernel headers.
#include "cpu/exp_simd.h"

// Small enough to stay in the L1 cache: a block with a new maximum or a new candidate is read
// again.
constexpr int kBlock = 1024;
// The items of `length` with those that fill its last vectors.
RGTG_INLINE int whole_vectors(int length) {
  return (length + 4 * kWidth - 1) / (4 * kWidth) * (4 * kWidth);
}

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest();

struct BlockStats {
  float max;  // NaNs ignored
  float sum;  // of exp(x - reference); NaN if the block holds a NaN or +inf
};

template <class T>
RGTG_INLINE BlockStats block_stats(const T* x, int n, float reference) {
  Vec largest[4], total[4];
  for (int j = 0; j < 4; ++j) {
    largest[j] = splat(-kInfinity);
    total[j] = splat(0.0f);
  }
  for (int i = 0; i < n; i += 4 * kWidth) {
    for (int j = 0; j < 4; ++j) {
      const Vec v = load(x + i + j * kWidth);
      largest[j] = max(v, largest[j]);
      total[j] = add(total[j], exp_clamped(sub(v, splat(reference))));
    }
  }
  return {max_lanes(max(max(largest[0], largest[1]), max(largest[2], largest[3]))),
          sum_lanes(add(add(total[0], total[1]), add(total[2], total[3])))};
}

template <class T>
inline void insert_all(const T* x, int n, int64_t first_id, TopkList& best) {
  for (int i = 0; i < n; ++i) {
    best.insert(pack_key(widen(x[i]), static_cast<uint32_t>(first_id + i)));
  }
}

// Only for whole vectors without NaN and a full list: greater_mask overlooks NaN, and any key
// enters a list that is not full.
template <class T>
inline void insert_greater(const T* x, int n, int64_t first_id, TopkList& best) {
  for (int i = 0; i < n; i += kWidth) {
    uint32_t mask = greater_mask(load(x + i), splat(best.threshold()));
    for (; mask; mask &= mask - 1) {
      const int j = i + __builtin_ctz(mask);
      best.insert(pack_key(widen(x[j]), static_cast<uint32_t>(first_id + j)));
    }
  }
}

// The reference is moved only when a logit exceeds it by this much: moving it reads the block
// again, and below that exp(x - reference) costs no digits.
constexpr float kSlack = 2.0f;

// The log-sum-exp of a slice, a block at a time.
struct SliceSum {
  LogSum<double> sum;
  float reference = -kInfinity;

  // What the stats of the next block are taken against. -inf minus -inf would be NaN: a finite
  // stand-in until there is a finite logit.
  float base() const { return std::max(reference, kLowest); }

  // Adds a block of `length` logits; returns whether it holds a NaN or +inf.
  template <class T>
  bool add(BlockStats stats, const T* x, int length) {
    if (stats.max > reference + kSlack && stats.max < kInfinity) {
      reference = stats.max;
      sum.rebase(reference);
      // Count the maxima instead of adding exp(0) = 1 in fp32: terms below 1e-7 would be rounded
      // away beside them.
      float padded[kBlock];
      int maxima = 0;
      const int whole = whole_vectors(length);
      for (int i = 0; i < whole; ++i) {
        const float v = i < length ? widen(x[i]) : -kInfinity;
        maxima += v == reference;
        padded[i] = v == reference ? -kInfinity : v;
      }
      stats.sum = block_stats(padded, whole, reference).sum;
      sum.total += maxima;
    }
    const bool undefined = stats.sum != stats.sum || stats.max == kInfinity;
    if (undefined) {
      sum.total = std::numeric_limits<double>::quiet_NaN();
    } else if (stats.max > -kInfinity) {
      sum.total += stats.sum;
    }
    return undefined;
  }
};

// fp64 rows are summed in fp64, in the plain two-pass form.
inline LogSum<double> sum_slice(const double* x, int64_t n) {
  LogSum<double> sum;
  bool undefined = false;
  for (int64_t i = 0; i < n; ++i) {
    sum.reference = std::max(sum.reference, x[i]);
    undefined |= x[i] != x[i];
  }
  if (undefined || sum.reference == kInfinity) {
    sum.total = std::numeric_limits<double>::quiet_NaN();
  } else if (sum.reference > -kInfinity) {
    for (int64_t i = 0; i < n; ++i) sum.total += std::exp(x[i] - sum.reference);
  }
  return sum;
}
