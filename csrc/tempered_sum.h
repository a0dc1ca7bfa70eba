// Sums over a policy exp(t), in pieces that can be merged: total = sum(exp(t - reference)) and
// gap = sum(exp(t - reference) (t - x)), from which its divergence from softmax(x) follows.
#pragma once

#include "host_device.h"

#include <cmath>

namespace rgtg {

struct TemperedSum {
  float reference = -kInf<float>;
  double total = 0, gap = 0;

  RGTG_HOST_DEVICE void rebase(float new_reference) {
    // Nothing yet, or -inf minus -inf: the factor would be NaN.
    const double factor =
        total == 0 ? 0 : exp(static_cast<double>(reference) - static_cast<double>(new_reference));
    total *= factor, gap *= factor, reference = new_reference;
  }
  RGTG_HOST_DEVICE void merge(TemperedSum other) {
    if (other.total == 0) return;
    if (other.reference > reference) {
      rebase(other.reference);
    } else {
      other.rebase(reference);
    }
    total += other.total, gap += other.gap;
  }
};

}  // namespace rgtg
