// The 16-bit floats nearest to an fp32 value, ties to even.
#pragma once

#include "widen.h"

#include <torch/headeronly/util/Half.h>

namespace rgtg {

inline bf16 narrow_bf16(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  return {static_cast<uint16_t>(x != x ? 0x7FC0u : rounded)};
}

inline fp16 narrow_fp16(float x) {
  return {torch::headeronly::detail::fp16_ieee_from_fp32_value(x)};
}

}  // namespace rgtg
