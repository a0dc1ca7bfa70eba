// AVX2 + FMA + F16C: eight floats.

constexpr int kWidth = 8;
constexpr bool kFused = true;  // fma rounds once
using Vec = __m256;

RGTG_INLINE Vec splat(float x) { return _mm256_set1_ps(x); }
RGTG_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
RGTG_INLINE Vec load(const bf16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
RGTG_INLINE Vec load(const fp16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
RGTG_INLINE void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
RGTG_INLINE void store(fp16* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
RGTG_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
RGTG_INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
RGTG_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
RGTG_INLINE Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
RGTG_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
RGTG_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
RGTG_INLINE uint32_t greater_mask(Vec a, Vec b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
}
// a > b ? x : y
RGTG_INLINE Vec where_greater(Vec a, Vec b, Vec x, Vec y) {
  return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
}
RGTG_INLINE Vec scale_by_shifted(Vec x, Vec shifted) {
  const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), n));
}
RGTG_INLINE float sum_lanes(Vec v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
RGTG_INLINE float max_lanes(Vec v) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
}
