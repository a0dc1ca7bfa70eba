// Dot products of a widened vector with one that stays in its dtype. Included once per instruction
// set by simd.h.

template <class T>
float dot(const float* a, const T* b, int64_t n) {
  Vec total[4];
  for (int j = 0; j < 4; ++j) total[j] = splat(0.0f);
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
    for (int j = 0; j < 4; ++j) {
      total[j] = fma(load(a + i + j * kWidth), load(b + i + j * kWidth), total[j]);
    }
  }
  for (; i + kWidth <= n; i += kWidth) total[0] = fma(load(a + i), load(b + i), total[0]);
  float rest = 0.0f;
  for (; i < n; ++i) rest += a[i] * widen(b[i]);
  return sum_lanes(add(add(total[0], total[1]), add(total[2], total[3]))) + rest;
}

template <class T>
double dot(const double* a, const T* b, int64_t n) {
  double total[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int j = 0; j < 8; ++j) total[j] += a[i + j] * widen(b[i + j]);
  }
  double rest = 0.0;
  for (; i < n; ++i) rest += a[i] * widen(b[i]);
  for (double t : total) rest += t;
  return rest;
}
