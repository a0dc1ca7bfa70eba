// The total order of candidates in one 64-bit key: logit descending, then token id ascending.
#pragma once

#include "host_device.h"

namespace rgtg {

constexpr int kMaxCandidates = 64;  // k of the compiled topk_logprobs

// Unsigned integers that order like the floats: -inf < ... < -0 == +0 < ... < +inf < NaN.
RGTG_HOST_DEVICE inline uint32_t ordered(float x) {
  if (x != x) return 0xFFFFFFFFu;
  const uint32_t bits = x == 0.0f ? 0u : float_bits(x);
  return (bits & 0x80000000u) ? ~bits : bits | 0x80000000u;
}

RGTG_HOST_DEVICE inline uint64_t pack_key(float logit, uint32_t id) {
  return static_cast<uint64_t>(ordered(logit)) << 32 | static_cast<uint32_t>(~id);
}

RGTG_HOST_DEVICE inline uint32_t key_id(uint64_t key) { return ~static_cast<uint32_t>(key); }

// The logit of a key (+0 for either zero).
RGTG_HOST_DEVICE inline float key_logit(uint64_t key) {
  const uint32_t code = static_cast<uint32_t>(key >> 32);
  if (code == 0xFFFFFFFFu) return bits_float(0x7FC00000u);
  return bits_float((code & 0x80000000u) ? code & 0x7FFFFFFFu : ~code);
}

}  // namespace rgtg
