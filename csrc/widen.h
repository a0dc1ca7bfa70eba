// 16-bit floats as they lie in memory, and their fp32 value.
#pragma once

#include "host_device.h"

namespace rgtg {

struct bf16 {
  uint16_t bits;
};

struct fp16 {
  uint16_t bits;
};

RGTG_HOST_DEVICE inline float widen(float x) { return x; }
RGTG_HOST_DEVICE inline double widen(double x) { return x; }
RGTG_HOST_DEVICE inline float widen(bf16 x) {
  return bits_float(static_cast<uint32_t>(x.bits) << 16);
}

RGTG_HOST_DEVICE inline float widen(fp16 x) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7FFFu;
  if (magnitude >= 0x7C00u) return bits_float(sign | 0x7F800000u | magnitude << 13);
  // 2^112 moves the exponent bias from 15 to 127 and is exact, subnormals included.
  return bits_float(sign | float_bits(bits_float(magnitude << 13) * 0x1p112f));
#endif
}

}  // namespace rgtg
