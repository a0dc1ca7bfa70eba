// Exponential and hyperbolic tangent of a vector. Included by kernel headers, once per instruction
// set.

// exp(d) for d <= 88, relative error below 1e-7: d = n * ln 2 + r with |r| <= ln(2) / 2, a minimax
// polynomial for exp(r), and n added to the exponent. Below 2^-126 it stays at 2^-126.
RGTG_INLINE Vec exp_clamped(Vec d) {
  constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.69314718055994531f;
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  d = max(splat(-87.3f), d);
  const Vec shifted = fma(d, splat(kLog2E), magic);
  const Vec n = sub(shifted, magic);
  Vec r;
  if constexpr (kFused) {
    r = fma(n, splat(-kLn2), d);
  } else {  // ln 2 in two parts, of which n * the first is exact
    r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), d));
  }
  Vec p = splat(1.38436537e-3f);
  p = fma(p, r, splat(8.3741555e-3f));
  p = fma(p, r, splat(4.16680016e-2f));
  p = fma(p, r, splat(1.66664317e-1f));
  p = fma(p, r, splat(4.9999994e-1f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
  return scale_by_shifted(p, shifted);
}

// Relative error below 3e-7. Near zero the odd polynomial of Cephes' tanhf, since 1 - 2 / (e + 1)
// cancels there.
RGTG_INLINE Vec tanh(Vec x) {
  const Vec zero = splat(0.0f), one = splat(1.0f);
  const Vec size = max(x, sub(zero, x));
  const Vec square = mul(x, x);
  Vec p = splat(-5.70498872745e-3f);
  p = fma(p, square, splat(2.06390887954e-2f));
  p = fma(p, square, splat(-5.37397155531e-2f));
  p = fma(p, square, splat(1.33314422036e-1f));
  p = fma(p, square, splat(-3.33332819422e-1f));
  const Vec near = fma(mul(p, square), x, x);
  const Vec capped = sub(zero, max(splat(-20.0f), sub(zero, size)));  // a NaN stays one
  const Vec far = sub(one, div(splat(2.0f), add(exp_clamped(add(capped, capped)), one)));
  const Vec signed_far = where_greater(zero, x, sub(zero, far), far);
  return where_greater(splat(0.625f), size, near, signed_far);
}
