// AVX-512 F/BW/DQ/VL: sixteen floats.

constexpr int kWidth = 16;
constexpr bool kFused = true;  // fma rounds once
using Vec = __m512;

RGTG_INLINE Vec splat(float x) { return _mm512_set1_ps(x); }
RGTG_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
RGTG_INLINE Vec load(const bf16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
RGTG_INLINE Vec load(const fp16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
RGTG_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
RGTG_INLINE void store(fp16* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
RGTG_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
RGTG_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
RGTG_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
RGTG_INLINE Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
RGTG_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
RGTG_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
RGTG_INLINE uint32_t greater_mask(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
// a > b ? x : y
RGTG_INLINE Vec where_greater(Vec a, Vec b, Vec x, Vec y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), y, x);
}
RGTG_INLINE Vec scale_by_shifted(Vec x, Vec shifted) {
  const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x), n));
}
RGTG_INLINE float sum_lanes(Vec v) { return _mm512_reduce_add_ps(v); }
RGTG_INLINE float max_lanes(Vec v) { return _mm512_reduce_max_ps(v); }
