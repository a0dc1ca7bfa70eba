// What a slice of a mixture is made of and what it leaves, the same for every instruction set.
#pragma once

#include "gumbel.h"
#include "log_sum.h"
#include "tempered_sum.h"
#include "topk_list.h"
#include "widen.h"

#include <torch/headeronly/core/ScalarType.h>

namespace rgtg {

using torch::headeronly::ScalarType;

constexpr int kMaxMixed = 4;  // tensors of a mixture

// One row of one tensor.
struct MixedRow {
  const void* data;
  ScalarType type;
  int64_t vocab;
  float weight;

  bool used() const { return weight != 0.0f; }
  double at(int64_t id) const {
    switch (type) {
      case ScalarType::Double:
        return static_cast<const double*>(data)[id];
      case ScalarType::Float:
        return static_cast<const float*>(data)[id];
      case ScalarType::BFloat16:
        return widen(static_cast<const bf16*>(data)[id]);
      default:
        return widen(static_cast<const fp16*>(data)[id]);
    }
  }
};

struct Mixture {
  MixedRow rows[kMaxMixed];
  int count;
  float floor;        // of the logits in rows[0]
  float temperature;  // 0: none
  bool noise;
  int64_t seed, position;
};

struct MixedSlice {
  TopkList best;
  LogSum<double> sums[kMaxMixed];
  TemperedSum tempered;
};

}  // namespace rgtg
