// The exponential of a vector. Included once per instruction set by the kernels that use it.

// exp(d) for d <= 88, relative error below 1e-7: d = n * ln 2 + r with |r| <= ln(2) / 2, a minimax
// polynomial for exp(r), and n added to the exponent. Below 2^-126 it stays at 2^-126.
RGTG_INLINE Vec exp_clamped(Vec d) {
  constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.69314718055994531f;
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  d = max(splat(-87.3f), d);
  const Vec shifted = fma(d, splat(kLog2E), magic);
  const Vec r = fma(sub(shifted, magic), splat(-kLn2), d);
  Vec p = splat(1.38436537e-3f);
  p = fma(p, r, splat(8.3741555e-3f));
  p = fma(p, r, splat(4.16680016e-2f));
  p = fma(p, r, splat(1.66664317e-1f));
  p = fma(p, r, splat(4.9999994e-1f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
  return scale_by_shifted(p, shifted);
}
