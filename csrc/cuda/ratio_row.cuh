// The draw of one row by one warp, which ratio_sample and ratio_step share.
#pragma once

#include "ratio_policy.h"

#include <cuda_runtime.h>

#include <cmath>

namespace rgtg::cuda {

struct RatioArguments {
  const float* logprobs;            // [rows, k]
  const float* rewards;             // [rows, k]
  const int64_t* ids;               // [rows, k]
  const float *beta, *temperature;  // [rows]
  const int64_t *seed, *position;   // [rows]
  int64_t rows, k;
  bool do_sample;
  int64_t* slot;  // [rows]
  float* logq;    // [rows, k]
};

// The best candidate so far; slot -1 where there is none.
struct Choice {
  float value = 0.0f;
  int64_t slot = -1;

  __device__ void offer(float other_value, int64_t other_slot) {
    const bool wins = other_slot >= 0 && (slot < 0 || other_value > value ||
                                          (other_value == value && other_slot < slot));
    if (!wins) return;
    value = other_value;
    slot = other_slot;
  }
};

__device__ inline void sample_row(const RatioArguments& a, int64_t row) {
  constexpr uint32_t kWholeWarp = 0xFFFFFFFFu;
  const int lane = threadIdx.x % 32;
  const float beta = a.beta[row], temperature = a.temperature[row];
  const int64_t seed = a.seed[row], position = a.position[row], first = row * a.k;
  Choice choice;
  bool undefined = false;
  float largest = -kInf<float>;
  for (int64_t slot = lane; slot < a.k; slot += 32) {
    const Score score(a.logprobs[first + slot], a.rewards[first + slot], beta, temperature);
    a.logq[first + slot] = score.tempered;
    undefined |= score.undefined();
    largest = fmaxf(largest, score.tempered);
    if (!score.possible()) continue;
    choice.offer(score.value(a.do_sample, seed, position, a.ids[first + slot]), slot);
  }
  for (int offset = 16; offset > 0; offset >>= 1) {
    largest = fmaxf(largest, __shfl_xor_sync(kWholeWarp, largest, offset));
    const float other_value = __shfl_xor_sync(kWholeWarp, choice.value, offset);
    choice.offer(other_value, __shfl_xor_sync(kWholeWarp, choice.slot, offset));
  }
  undefined = __any_sync(kWholeWarp, undefined) || choice.slot < 0;
  if (lane == 0) a.slot[row] = undefined ? -1 : choice.slot;

  double total = 0;
  for (int64_t slot = lane; slot < a.k; slot += 32) {
    total += exp(static_cast<double>(a.logq[first + slot]) - largest);
  }
  for (int offset = 16; offset > 0; offset >>= 1) {
    total += __shfl_xor_sync(kWholeWarp, total, offset);
  }
  const double log_sum_exp = largest + log(total);
  for (int64_t slot = lane; slot < a.k; slot += 32) {
    float& logq = a.logq[first + slot];
    logq = undefined ? kNaN<float> : static_cast<float>(logq - log_sum_exp);
  }
}

}  // namespace rgtg::cuda
