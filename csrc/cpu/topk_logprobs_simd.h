// One slice of one row: its k best keys and its log-sum-exp, in one read. Included once per
// instruction set by simd.h.

// A block stays in the L1 cache while it is looked at again, which happens only where it holds a new
// maximum or a new candidate.
constexpr int kBlock = 1024;
constexpr float kLog2E = 1.44269504088896341f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct BlockStats {
  float max;  // NaNs ignored
  float sum;  // of 2^(x * kLog2E - shift); NaN if the block holds a NaN or +inf
};

// 2^t for -126 <= t <= 127, relative error below 1e-7: t = n + r with |r| <= 1/2, and a minimax
// polynomial for 2^r.
RGTG_INLINE Vec exp2_clamped(Vec t) {
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = add(max(splat(-126.0f), t), magic);
  const Vec r = sub(max(splat(-126.0f), t), sub(shifted, magic));
  Vec p = splat(1.53458124e-4f);
  p = fma(p, r, splat(1.33999309e-3f));
  p = fma(p, r, splat(9.61848907e-3f));
  p = fma(p, r, splat(5.55032864e-2f));
  p = fma(p, r, splat(2.40226462e-1f));
  p = fma(p, r, splat(6.93147182e-1f));
  p = fma(p, r, splat(1.0f));
  return scale_by_shifted(p, shifted);
}

template <class T>
RGTG_INLINE BlockStats block_stats(const T* x, int n, float shift) {
  const Vec log2e = splat(kLog2E), minus_shift = splat(-shift);
  Vec largest[4], total[4];
  for (int j = 0; j < 4; ++j) {
    largest[j] = splat(-kInfinity);
    total[j] = splat(0.0f);
  }
  for (int i = 0; i < n; i += 4 * kWidth) {
    for (int j = 0; j < 4; ++j) {
      const Vec v = load(x + i + j * kWidth);
      largest[j] = max(v, largest[j]);
      total[j] = add(total[j], exp2_clamped(fma(v, log2e, minus_shift)));
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

// For a block without NaN and a full list.
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

// The plain two-pass form in double: for fp64 rows, and for logits so large (2e38) that scaling them
// by log2(e) leaves fp32.
template <class T>
inline double log_sum_exp_double(const T* x, int64_t n) {
  double largest = -std::numeric_limits<double>::infinity(), total = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    const double v = widen(x[i]);
    if (!(v <= largest)) largest = v;
    if (v != v) return v;
  }
  if (std::isinf(largest)) {
    return largest < 0 ? largest : std::numeric_limits<double>::quiet_NaN();
  }
  for (int64_t i = 0; i < n; ++i) total += std::exp(static_cast<double>(widen(x[i])) - largest);
  return largest + std::log(total);
}

// The running sum of 2^(x * kLog2E - shift), where shift follows the maximum at a small distance.
struct RunningSum {
  float reference = -kInfinity;
  float shift = 0.0f;
  double total = 0.0;
  bool exact_needed = false;

  // Up to here `reference` serves; beyond, rounding of the exponent would begin to show.
  float limit() const { return reference + 2.0f; }

  void rebase(float largest) {
    // At such magnitudes neighbouring floats differ by 1e31, so what was summed before is nothing.
    const bool drop = reference == -kInfinity || exact_needed;
    exact_needed = std::fabs(largest) > 2e38f;
    const float new_shift = exact_needed ? 0.0f : largest * kLog2E;
    total = drop ? 0.0 : total * std::exp2(static_cast<double>(shift) - new_shift);
    reference = largest;
    shift = new_shift;
  }

  double log_sum_exp() const {
    if (reference == -kInfinity) return -std::numeric_limits<double>::infinity();
    // total is scaled by 2^(reference * kLog2E - shift), not exactly 1 because shift is fp32.
    const double excess = static_cast<double>(reference) * kLog2E - shift;
    return reference + (std::log2(total) - excess) * 0.69314718055994530942;
  }
};

// Returns the log-sum-exp of x[0..n): NaN where it holds a NaN or +inf, -inf where all is -inf.
template <class T>
double topk_slice(const T* x, int64_t n, int64_t first_id, TopkList& best) {
  RunningSum sum;
  bool undefined = false;
  float padded[kBlock];
  for (int64_t start = 0; start < n; start += kBlock) {
    const int length = static_cast<int>(std::min<int64_t>(kBlock, n - start));
    const int64_t id = first_id + start;
    BlockStats stats;
    const auto scan = [&](float shift) {
      if (length == kBlock) return block_stats(x + start, kBlock, shift);
      const int whole = (length + 4 * kWidth - 1) / (4 * kWidth) * (4 * kWidth);
      for (int i = 0; i < whole; ++i) padded[i] = i < length ? widen(x[start + i]) : -kInfinity;
      return block_stats(padded, whole, shift);
    };
    stats = scan(sum.shift);
    if (stats.max > sum.limit() && stats.max < kInfinity) {
      sum.rebase(stats.max);
      stats = scan(sum.shift);
    }
    const bool has_nan_or_inf = stats.sum != stats.sum || stats.max == kInfinity;
    undefined |= has_nan_or_inf;
    sum.total += stats.sum;
    if (!best.full() || has_nan_or_inf) {
      insert_all(x + start, length, id, best);
    } else if (stats.max > best.threshold()) {
      if (length == kBlock) {
        insert_greater(x + start, kBlock, id, best);
      } else {
        insert_all(x + start, length, id, best);
      }
    }
  }
  if (sum.exact_needed) return log_sum_exp_double(x, n);
  return undefined ? std::numeric_limits<double>::quiet_NaN() : sum.log_sum_exp();
}

// fp64 rows are ordered by their fp32 rounding and summed as they are.
inline double topk_slice(const double* x, int64_t n, int64_t first_id, TopkList& best) {
  for (int64_t i = 0; i < n; ++i) {
    best.insert(pack_key(static_cast<float>(x[i]), static_cast<uint32_t>(first_id + i)));
  }
  return log_sum_exp_double(x, n);
}
