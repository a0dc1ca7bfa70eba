// What lets one header serve g++ and nvcc.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#ifdef __CUDACC__
#define RGTG_HOST_DEVICE __host__ __device__
#else
#define RGTG_HOST_DEVICE
#endif

namespace rgtg {

// std::numeric_limits has host functions only.
template <class F>
constexpr F kInf = std::numeric_limits<F>::infinity();
template <class F>
constexpr F kNaN = std::numeric_limits<F>::quiet_NaN();

RGTG_HOST_DEVICE inline uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

RGTG_HOST_DEVICE inline float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

}  // namespace rgtg
