// log(sum(exp(x))) in pieces that can be merged: total = sum(exp(x - reference)), where reference
// is the maximum or close to it. A NaN total stands for a NaN or +inf among the x.
#pragma once

#include "host_device.h"

#include <cmath>

namespace rgtg {

template <class Acc>
struct LogSum {
  Acc reference = -kInf<Acc>;
  Acc total = 0;

  RGTG_HOST_DEVICE void rebase(Acc new_reference) {
    if (total != Acc(0)) total *= exp(reference - new_reference);
    reference = new_reference;
  }

  RGTG_HOST_DEVICE void merge(LogSum other) {
    if (other.reference > reference) rebase(other.reference);
    if (other.total != Acc(0)) total += other.total * exp(other.reference - reference);
  }

  // Subtracting in this order keeps the small digits where x and reference are huge.
  RGTG_HOST_DEVICE Acc logprob(Acc x) const {
    const bool impossible = x == -kInf<Acc> && total == total;
    return impossible ? x : (x - reference) - log(total);
  }
};

}  // namespace rgtg
