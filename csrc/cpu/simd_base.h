// Portable vectors of four floats; the compiler maps them to whatever the platform guarantees.
// One of three files with the same names, included once each inside its own namespace.

constexpr int kWidth = 4;
constexpr bool kFused = false;  // fma rounds once
using Vec = float __attribute__((vector_size(16)));
using VecBits = int32_t __attribute__((vector_size(16)));

RGTG_INLINE Vec splat(float x) { return Vec{x, x, x, x}; }
RGTG_INLINE Vec load(const float* p) {
  Vec v;
  memcpy(&v, p, sizeof v);
  return v;
}
RGTG_INLINE Vec load(const bf16* p) {
  return Vec{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
}
RGTG_INLINE Vec load(const fp16* p) {
  return Vec{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
}
RGTG_INLINE void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }
RGTG_INLINE void store(fp16* p, Vec v) {
  for (int i = 0; i < kWidth; ++i) p[i] = narrow_fp16(v[i]);
}
RGTG_INLINE Vec add(Vec a, Vec b) { return a + b; }
RGTG_INLINE Vec sub(Vec a, Vec b) { return a - b; }
RGTG_INLINE Vec mul(Vec a, Vec b) { return a * b; }
RGTG_INLINE Vec div(Vec a, Vec b) { return a / b; }
RGTG_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
// Returns the second operand where either is NaN, as the x86 instruction does.
RGTG_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
RGTG_INLINE uint32_t greater_mask(Vec a, Vec b) {
  const VecBits m = a > b;
  return (m[0] & 1) | (m[1] & 2) | (m[2] & 4) | (m[3] & 8);
}
// a > b ? x : y
RGTG_INLINE Vec where_greater(Vec a, Vec b, Vec x, Vec y) { return a > b ? x : y; }
// x * 2^n for the n that was added to 1.5 * 2^23, so that the low bits of `shifted` hold it.
RGTG_INLINE Vec scale_by_shifted(Vec x, Vec shifted) {
  return reinterpret_cast<Vec>(reinterpret_cast<VecBits>(x) +
                               (reinterpret_cast<VecBits>(shifted) << 23));
}
RGTG_INLINE float sum_lanes(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }
RGTG_INLINE float max_lanes(Vec v) {
  const float a = v[0] > v[2] ? v[0] : v[2], b = v[1] > v[3] ? v[1] : v[3];
  return a > b ? a : b;
}
