// One candidate under the ratio policy softmax((logprob + beta * reward) / T), in fp32 operations
// that are each rounded once, so that every backend has the same scores bit for bit. A reward of
// -inf says that it is no token, whatever beta is: 0 * -inf would be NaN, and -1 * -inf the best.
#pragma once

#include "gumbel.h"

namespace rgtg {

struct Score {
  float plain, tempered;

  RGTG_HOST_DEVICE Score(float logprob, float reward, float beta, float temperature)
      : plain(add_rn(logprob, reward == -kInf<float> ? reward : mul_rn(beta, reward))),
        tempered(div_rn(plain, temperature)) {}

  // One such candidate makes its whole row undefined.
  RGTG_HOST_DEVICE bool undefined() const {
    return tempered != tempered || tempered == kInf<float>;
  }
  RGTG_HOST_DEVICE bool possible() const { return !undefined() && tempered != -kInf<float>; }
  // The candidate with the largest value is taken, the lowest slot among equals.
  RGTG_HOST_DEVICE float value(bool do_sample, int64_t seed, int64_t position, int64_t id) const {
    return do_sample ? add_rn(tempered, gumbel_noise(seed, position, id)) : plain;
  }
};

}  // namespace rgtg
