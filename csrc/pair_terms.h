// One prefix length of one pair: its part of the Bradley-Terry loss and the derivatives.
#pragma once

#include "host_device.h"

#include <cmath>

namespace rgtg {

template <class Acc>
struct PairOptions {
  Acc margin, smoothing, centering;
  Acc scale;  // 1 / sum of the weights of the pair's prefix lengths
};

template <class Acc>
struct PairTerms {
  Acc loss, grad_chosen, grad_rejected;
};

// Terms of several prefix lengths.
struct PairSums {
  double loss = 0, grad_chosen = 0, grad_rejected = 0;
};

// With gap = chosen - rejected - margin, share times softplus(-gap) + smoothing * gap
// + centering * (chosen + rejected)^2. An option that is 0 is left out: 0 * inf would be NaN.
template <class Acc>
RGTG_HOST_DEVICE PairTerms<Acc> pair_terms(Acc chosen, Acc rejected, Acc share,
                                           const PairOptions<Acc>& o) {
  const Acc gap = chosen - rejected - o.margin;
  const Acc t = std::exp(-std::fabs(gap));
  Acc loss = std::log1p(t) + (gap > 0 ? Acc(0) : -gap);
  const Acc below = (gap > 0 ? t : Acc(1)) / (1 + t);  // 1 / (1 + e^gap)
  const Acc slope = o.smoothing - below;
  Acc pull = 0;
  if (o.smoothing != 0) loss += o.smoothing * gap;
  if (o.centering != 0) {
    const Acc total = chosen + rejected;
    loss += o.centering * total * total;
    pull = 2 * o.centering * total;
  }
  return {share * loss, share * (pull + slope), share * (pull - slope)};
}

}  // namespace rgtg
