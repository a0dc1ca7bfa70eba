// AVX-512 F/BW/DQ/VL: sixteen floats.

constexpr int kWidth = 16;
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
RGTG_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
RGTG_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
RGTG_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
RGTG_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
RGTG_INLINE uint32_t greater_mask(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
RGTG_INLINE Vec scale_by_shifted(Vec x, Vec shifted) {
  const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x), n));
}
RGTG_INLINE float sum_lanes(Vec v) { return _mm512_reduce_add_ps(v); }
RGTG_INLINE float max_lanes(Vec v) { return _mm512_reduce_max_ps(v); }
