// Gumbel noise that is the same bit for bit in C++, CUDA and torch.
//
// A library logf differs between machines by an ulp, which is enough to turn a sampled token. So
// the logarithm here is one polynomial (coefficients of Cephes logf) made of fp32 multiplications
// and additions that are each rounded once: this code must be compiled with -ffp-contract=off, and
// the device build names the rounding explicitly. rgtg_fast/ops/reference.py performs the same
// operations.
#pragma once

#include "host_device.h"
#include "philox.h"

namespace rgtg {

RGTG_HOST_DEVICE inline float mul_rn(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

RGTG_HOST_DEVICE inline float add_rn(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

RGTG_HOST_DEVICE inline float div_rn(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

// log(2^exponent * (1 + f)) for f in [sqrt(1/2) - 1, sqrt(2) - 1].
RGTG_HOST_DEVICE inline float log_near_one(float f, float exponent) {
  constexpr float kCoefficients[9] = {7.0376836292e-2f,  -1.1514610310e-1f, 1.1676998740e-1f,
                                      -1.2420140846e-1f, 1.4249322787e-1f,  -1.6668057665e-1f,
                                      2.0000714765e-1f,  -2.4999993993e-1f, 3.3333331174e-1f};
  // ln 2 = kLn2High + kLn2Low; the high part has few bits, so exponent * kLn2High is exact.
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  const float square = mul_rn(f, f);
  float y = kCoefficients[0];
  for (int i = 1; i < 9; ++i) y = add_rn(mul_rn(y, f), kCoefficients[i]);
  y = mul_rn(mul_rn(y, f), square);
  y = add_rn(y, mul_rn(exponent, kLn2Low));
  y = add_rn(y, mul_rn(square, -0.5f));
  return add_rn(add_rn(f, y), mul_rn(exponent, kLn2High));
}

// Natural logarithm of a positive normal number.
RGTG_HOST_DEVICE inline float log_positive(float x) {
  constexpr float kSqrtHalf = 0.707106781186547524f;
  const uint32_t bits = float_bits(x);
  int32_t exponent = static_cast<int32_t>(bits >> 23) - 126;
  float mantissa = bits_float((bits & 0x007FFFFFu) | 0x3F000000u);  // in [1/2, 1)
  if (mantissa < kSqrtHalf) {
    exponent -= 1;
    mantissa = add_rn(mantissa, mantissa);
  }
  return log_near_one(add_rn(mantissa, -1.0f), static_cast<float>(exponent));
}

// g = -log(-log(1 - v)) with v = (word + 1/2) / 2^32, keeping relative precision for v near 0
// (large g) and for v near 1 (small g).
RGTG_HOST_DEVICE inline float gumbel_from_word(uint32_t word) {
  constexpr float kScale = 2.3283064365386963e-10f;           // 2^-32
  constexpr float kOneMinusSqrtHalf = 0.292893218813452476f;  // f = -v must stay >= sqrt(1/2) - 1
  const float v = mul_rn(add_rn(static_cast<float>(word), 0.5f), kScale);
  const float w = mul_rn(add_rn(static_cast<float>(~word), 0.5f), kScale);  // 1 - v
  const float exponential = v <= kOneMinusSqrtHalf ? -log_near_one(-v, 0.0f) : -log_positive(w);
  return -log_positive(exponential);
}

// The noise of one token: keyed by (row seed), counted by (token id, position in the answer).
RGTG_HOST_DEVICE inline float gumbel_noise(int64_t seed, int64_t position, int64_t token_id) {
  const uint64_t s = static_cast<uint64_t>(seed);
  const uint64_t p = static_cast<uint64_t>(position);
  const uint64_t t = static_cast<uint64_t>(token_id);
  const Philox4x32 counter = {{static_cast<uint32_t>(t), static_cast<uint32_t>(t >> 32),
                               static_cast<uint32_t>(p), static_cast<uint32_t>(p >> 32)}};
  return gumbel_from_word(
      philox4x32_10(counter, static_cast<uint32_t>(s), static_cast<uint32_t>(s >> 32)).word[0]);
}

}  // namespace rgtg
