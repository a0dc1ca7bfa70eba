// One slice of one row of a mixture, each tensor read once. Included once per instruction set by
// simd.h.
#include "cpu/vocab_simd.h"

// A block of a mixture. What lies behind the end of a tensor is -inf.
struct MixedBlock {
  float mixed[kBlock];  // -inf where impossible
  float padded[kBlock], first[kBlock];
  float most;  // of mixed, NaN ignored
  bool odd;    // a NaN or +inf somewhere
};

// Mixes in a block of a tensor; logits below `floor` are impossible, and what is -inf stays so:
// -inf plus inf would be NaN. Every product and sum is rounded once: a fused multiply-add would
// order tokens otherwise than the other backends do.
template <bool kFirst, class T>
RGTG_INLINE BlockStats mix_in(const T* x, int n, float weight, float floor, float reference,
                              MixedBlock& block) {
  const Vec minus = splat(-kInfinity), zero = splat(0.0f), lowest = splat(kLowest);
  const Vec scale = splat(weight), bound = splat(floor);
  Vec largest[4], total[4], most = minus;
  for (int j = 0; j < 4; ++j) largest[j] = minus, total[j] = zero;
  for (int i = 0; i < n; i += 4 * kWidth) {
    for (int j = 0; j < 4; ++j) {
      const int at = i + j * kWidth;
      const Vec v = load(x + at);
      largest[j] = max(v, largest[j]);
      total[j] = add(total[j], exp_clamped(sub(v, splat(reference))));
      Vec m;
      if constexpr (kFirst) {
        m = weight != 0.0f ? mul(scale, v) : zero;
      } else {
        const Vec before = load(block.mixed + at);
        m = where_greater(lowest, before, minus, add(before, mul(scale, v)));
      }
      m = where_greater(bound, v, minus, m);
      most = max(m, most);
      store(block.mixed + at, m);
    }
  }
  block.most = max_lanes(most);
  block.odd |= block.most == kInfinity;
  return {max_lanes(max(max(largest[0], largest[1]), max(largest[2], largest[3]))),
          sum_lanes(add(add(total[0], total[1]), add(total[2], total[3])))};
}

// Adds the block, divided by the temperature, to the sums of the tempered policy. exp_clamped does
// not give 0 for -inf, and -inf minus -inf would be NaN: both are kept out of the gap.
inline void add_tempered(const MixedBlock& block, int n, float temperature, TemperedSum& sum) {
  const Vec zero = splat(0.0f), lowest = splat(kLowest), divisor = splat(temperature);
  const float most = block.most / temperature;
  if (most > sum.reference + kSlack) sum.rebase(most);
  const Vec reference = splat(std::max(sum.reference, kLowest));
  Vec total = zero, gap = zero;
  for (int i = 0; i < n; i += kWidth) {
    const Vec t = div(load(block.mixed + i), divisor);
    Vec e = exp_clamped(sub(t, reference));
    e = where_greater(lowest, t, zero, e);
    total = add(total, e);
    gap = add(gap, where_greater(lowest, t, zero, mul(e, sub(t, load(block.first + i)))));
  }
  sum.total += sum_lanes(total);
  sum.gap += sum_lanes(gap);
}

// At least what gumbel_from_word gives for a word, by its first byte: the noise falls with the
// word.
struct NoiseBounds {
  float most[256];
  NoiseBounds() {
    for (uint32_t i = 0; i < 256; ++i) most[i] = gumbel_from_word(i << 24) + 1e-4f;
  }
};

// The best of mixed / temperature + noise. The noise of a token is worked out only where its bound
// could bring the token into the list.
inline void insert_noisy(const MixedBlock& block, int n, int64_t first_id, const Mixture& mixture,
                         TopkList& best) {
  static const NoiseBounds bounds;
  const uint64_t seed = static_cast<uint64_t>(mixture.seed);
  const uint64_t position = static_cast<uint64_t>(mixture.position);
  uint32_t words[kBlock];
  for (int i = 0; i < n; ++i) {
    const uint64_t id = static_cast<uint64_t>(first_id) + static_cast<uint64_t>(i);
    const Philox4x32 counter = {{static_cast<uint32_t>(id), static_cast<uint32_t>(id >> 32),
                                 static_cast<uint32_t>(position),
                                 static_cast<uint32_t>(position >> 32)}};
    words[i] =
        philox4x32_10(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32))
            .word[0];
  }
  for (int i = 0; i < n; ++i) {
    const float t = block.mixed[i] / mixture.temperature;
    if (best.full() && t + bounds.most[words[i] >> 24] <= best.threshold()) continue;
    const float value = t == -kInfinity ? t : t + gumbel_from_word(words[i]);
    best.insert(pack_key(value, static_cast<uint32_t>(first_id + i)));
  }
}

// Mixes in `length` logits of a tensor from x on, filled up with -inf to n.
template <bool kFirst, class T>
inline void mix_tensor(const T* x, int length, int n, float weight, float floor, SliceSum& sum,
                       MixedBlock& block) {
  if (length < n) {
    for (int i = 0; i < n; ++i) block.padded[i] = i < length ? widen(x[i]) : -kInfinity;
    const BlockStats stats = mix_in<kFirst>(block.padded, n, weight, floor, sum.base(), block);
    block.odd |= sum.add(stats, block.padded, length);
  } else {
    block.odd |= sum.add(mix_in<kFirst>(x, n, weight, floor, sum.base(), block), x, length);
  }
}

// fp64 tensors are mixed in fp32, and summed elsewhere.
template <bool kFirst>
inline void mix_tensor(const double* x, int length, int n, float weight, float floor, SliceSum&,
                       MixedBlock& block) {
  for (int i = 0; i < n; ++i) {
    block.padded[i] = i < length ? static_cast<float>(x[i]) : -kInfinity;
    block.odd |= !(block.padded[i] < kInfinity);
  }
  mix_in<kFirst>(block.padded, n, weight, floor, 0.0f, block);
}

// Columns of a tensor in the block that begins at `start`, of a slice up to `end`.
inline int length_of(const MixedRow& row, int64_t start, int64_t end) {
  return static_cast<int>(std::clamp<int64_t>(std::min(end, row.vocab) - start, 0, kBlock));
}

template <bool kFirst>
inline void mix_block(const MixedRow& row, int64_t start, int64_t end, int n, float floor,
                      SliceSum& sum, MixedBlock& block) {
  const int length = length_of(row, start, end);
  const auto mix = [&](auto* x) {
    mix_tensor<kFirst>(x + start, length, n, row.weight, floor, sum, block);
  };
  switch (row.type) {
    case ScalarType::Double:
      return mix(static_cast<const double*>(row.data));
    case ScalarType::Float:
      return mix(static_cast<const float*>(row.data));
    case ScalarType::BFloat16:
      return mix(static_cast<const bf16*>(row.data));
    default:
      return mix(static_cast<const fp16*>(row.data));
  }
}

inline void mix_slice(const Mixture& mixture, int64_t begin, int64_t end, MixedSlice& slice) {
  SliceSum sums[kMaxMixed];
  MixedBlock block;
  const MixedRow& first = mixture.rows[0];
  const float floor = mixture.floor > kLowest ? mixture.floor : kLowest;
  for (int64_t start = begin; start < end; start += kBlock) {
    const int n = whole_vectors(static_cast<int>(std::min<int64_t>(kBlock, end - start)));
    block.odd = false;
    mix_block<true>(first, start, end, n, floor, sums[0], block);
    for (int i = 1; i < mixture.count; ++i) {
      const MixedRow& row = mixture.rows[i];
      if (row.used()) mix_block<false>(row, start, end, n, kLowest, sums[i], block);
    }
    const int own = length_of(first, start, end);
    if (mixture.temperature != 0.0f) {
      for (int i = 0; i < n; ++i) {
        block.first[i] = i < own ? static_cast<float>(first.at(start + i)) : -kInfinity;
      }
      add_tempered(block, n, mixture.temperature, slice.tempered);
    }
    if (mixture.noise) {
      insert_noisy(block, own, start, mixture, slice.best);
    } else if (!slice.best.full() || block.odd) {
      insert_all(block.mixed, own, start, slice.best);
    } else if (block.most > slice.best.threshold()) {
      insert_greater(block.mixed, n, start, slice.best);
    }
  }
  for (int i = 0; i < mixture.count; ++i) {
    const MixedRow& row = mixture.rows[i];
    slice.sums[i] = sums[i].sum;
    if (row.type == ScalarType::Double && (i == 0 || row.used())) {
      const int64_t stop = std::min(end, row.vocab);
      slice.sums[i] = sum_slice(static_cast<const double*>(row.data) + begin,
                                std::max<int64_t>(0, stop - begin));
    }
  }
}
