// Loss and gradients of one pair over a range of prefix lengths, in one read. Included once per
// instruction set by simd.h.
#include "cpu/exp_simd.h"

// log(1 + t) and 1 / (1 + e^d) for t = e^-|d|.
struct Logistic {
  Vec log1p, below;
};

RGTG_INLINE Logistic logistic(Vec d) {
  const Vec zero = splat(0.0f), one = splat(1.0f), size = max(sub(zero, d), d);
  const Vec t = size < splat(87.0f) ? exp_clamped(sub(zero, size)) : zero;
  // 2 artanh(s), s = t / (2 + t) <= 1/3; the polynomial is minimax for its tail in s^2.
  const Vec s = t / add(splat(2.0f), t), z = s * s;
  Vec p = splat(2.3239051e-1f);
  p = fma(p, z, splat(2.1703315e-1f));
  p = fma(p, z, splat(2.8592583e-1f));
  p = fma(p, z, splat(3.9999701e-1f));
  p = fma(p, z, splat(6.6666667e-1f));
  const Vec log1p = fma(s * z, p, add(s, s));
  // A NaN fails both comparisons and is passed on.
  const Vec numerator = d > zero ? t : (d <= zero ? one : d);
  return {log1p, numerator / add(one, t)};
}

struct PairVectors {
  Vec loss, grad_chosen, grad_rejected;
};

RGTG_INLINE PairVectors pair_terms(Vec chosen, Vec rejected, Vec weight,
                                   const PairOptions<float>& o) {
  const Vec gap = sub(sub(chosen, rejected), splat(o.margin));
  const Vec share = weight * splat(o.scale);
  const Logistic l = logistic(gap);
  Vec loss = add(max(splat(0.0f), sub(splat(0.0f), gap)), l.log1p);
  const Vec slope = sub(splat(o.smoothing), l.below);
  Vec pull = splat(0.0f);
  if (o.smoothing != 0) loss = fma(splat(o.smoothing), gap, loss);
  if (o.centering != 0) {
    const Vec total = add(chosen, rejected), scaled = splat(o.centering) * total;
    loss = fma(scaled, total, loss);
    pull = add(scaled, scaled);
  }
  return {share * loss, share * add(pull, slope), share * sub(pull, slope)};
}

// A null gradient pointer means that the answer has ended before this range: its reward stays that
// of its last token, *chosen or *rejected.
template <class T>
PairSums pair_segment(const T* chosen, const T* rejected, const float* weight, int64_t n,
                      const PairOptions<float>& o, float* grad_chosen, float* grad_rejected) {
  constexpr int kFlush = 32;  // vectors summed in fp32 before the sum goes to fp64
  const Vec held_chosen = splat(widen(*chosen)), held_rejected = splat(widen(*rejected));
  PairSums sums;
  for (int64_t start = 0; start < n; start += kFlush * kWidth) {
    const int64_t end = std::min<int64_t>(n, start + kFlush * kWidth);
    PairVectors total = {splat(0.0f), splat(0.0f), splat(0.0f)};
    const auto add_terms = [&](Vec x, Vec y, const float* w, float* gc, float* gr) {
      const PairVectors v = pair_terms(x, y, load(w), o);
      total.loss = add(total.loss, v.loss);
      total.grad_chosen = add(total.grad_chosen, v.grad_chosen);
      total.grad_rejected = add(total.grad_rejected, v.grad_rejected);
      if (gc) memcpy(gc, &v.grad_chosen, sizeof(Vec));
      if (gr) memcpy(gr, &v.grad_rejected, sizeof(Vec));
    };
    int64_t i = start;
    for (; i + kWidth <= end; i += kWidth) {
      add_terms(grad_chosen ? load(chosen + i) : held_chosen,
                grad_rejected ? load(rejected + i) : held_rejected, weight + i,
                grad_chosen ? grad_chosen + i : nullptr,
                grad_rejected ? grad_rejected + i : nullptr);
    }
    if (i < end) {
      // Lanes beyond the end hold 0 in rewards and weights: an infinite held reward times a weight
      // of 0 would be NaN.
      T c[kWidth] = {}, r[kWidth] = {};
      float w[kWidth] = {}, gc[kWidth], gr[kWidth];
      const int64_t rest = end - i;
      for (int64_t j = 0; j < rest; ++j) {
        c[j] = chosen[grad_chosen ? i + j : 0];
        r[j] = rejected[grad_rejected ? i + j : 0];
        w[j] = weight[i + j];
      }
      add_terms(load(c), load(r), w, gc, gr);
      if (grad_chosen) std::copy_n(gc, rest, grad_chosen + i);
      if (grad_rejected) std::copy_n(gr, rest, grad_rejected + i);
    }
    sums.loss += sum_lanes(total.loss);
    sums.grad_chosen += sum_lanes(total.grad_chosen);
    sums.grad_rejected += sum_lanes(total.grad_rejected);
  }
  return sums;
}

inline PairSums pair_segment(const double* chosen, const double* rejected, const double* weight,
                             int64_t n, const PairOptions<double>& o, double* grad_chosen,
                             double* grad_rejected) {
  PairSums sums;
  for (int64_t i = 0; i < n; ++i) {
    const double c = chosen[grad_chosen ? i : 0], r = rejected[grad_rejected ? i : 0];
    const PairTerms<double> term = pair_terms(c, r, weight[i] * o.scale, o);
    sums.loss += term.loss;
    sums.grad_chosen += term.grad_chosen;
    sums.grad_rejected += term.grad_rejected;
    if (grad_chosen) grad_chosen[i] = term.grad_chosen;
    if (grad_rejected) grad_rejected[i] = term.grad_rejected;
  }
  return sums;
}
