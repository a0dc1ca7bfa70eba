#include "ratio_policy.h"

#include "cpu/ops.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace rgtg {
namespace {

constexpr int64_t kGrain = 2048;  // candidates per thread; fewer do not pay for waking it

struct RowInput {
  const float *logprobs, *rewards;  // [k]
  const int64_t* ids;               // [k]
  float beta, temperature;
  int64_t seed, position;
};

// Returns the chosen slot and fills logq[k], or returns -1 and fills it with NaN.
int64_t sample_row(const RowInput& row, int64_t k, bool do_sample, float* logq) {
  int64_t slot = -1;
  bool undefined = false;
  float best = 0.0f, largest = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < k; ++i) {
    const Score score(row.logprobs[i], row.rewards[i], row.beta, row.temperature);
    logq[i] = score.tempered;
    largest = std::max(largest, score.tempered);
    undefined |= score.undefined();
    if (!score.possible()) continue;
    const float value = score.value(do_sample, row.seed, row.position, row.ids[i]);
    if (slot < 0 || value > best) {
      slot = i;
      best = value;
    }
  }
  if (undefined || slot < 0) {
    std::fill_n(logq, k, std::numeric_limits<float>::quiet_NaN());
    return -1;
  }
  double total = 0.0;
  for (int64_t i = 0; i < k; ++i) total += std::exp(static_cast<double>(logq[i]) - largest);
  const double log_sum_exp = largest + std::log(total);
  for (int64_t i = 0; i < k; ++i) logq[i] = static_cast<float>(logq[i] - log_sum_exp);
  return slot;
}

}  // namespace

std::tuple<Tensor, Tensor> ratio_sample(const Tensor& logprobs, const Tensor& rewards,
                                        const Tensor& ids, const Tensor& beta,
                                        const Tensor& temperature, const Tensor& seed,
                                        const Tensor& position, bool do_sample) {
  STD_TORCH_CHECK(logprobs.dim() == 2, "logprobs must be [B, k]");
  const int64_t rows = logprobs.sizes()[0], k = logprobs.sizes()[1];
  for (const Tensor* t : {&logprobs, &rewards, &beta, &temperature}) {
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float, "ratio_sample takes float32 here");
  }
  for (const Tensor* t : {&ids, &seed, &position}) {
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Long, "ratio_sample takes int64 here");
  }
  for (const Tensor* t : {&rewards, &ids}) {
    STD_TORCH_CHECK(t->dim() == 2 && t->sizes()[0] == rows && t->sizes()[1] == k,
                    "rewards and ids must be [B, k] like logprobs");
  }
  for (const Tensor* t : {&beta, &temperature, &seed, &position}) {
    STD_TORCH_CHECK(t->dim() == 1 && t->sizes()[0] == rows,
                    "beta, temperature, seed and position must be [B]");
  }
  Tensor slot = empty_cpu<1>({rows}, ScalarType::Long);
  Tensor logq = empty_cpu<2>({rows, k}, ScalarType::Float);
  const Dense<float> l(logprobs), r(rewards), b(beta), t(temperature);
  const Dense<int64_t> id(ids), s(seed), p(position);
  auto* slots = static_cast<int64_t*>(slot.mutable_data_ptr());
  auto* q = static_cast<float*>(logq.mutable_data_ptr());
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, k));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const RowInput row = {l.data + i * k, r.data + i * k, id.data + i * k, b.data[i],
                            t.data[i],      s.data[i],      p.data[i]};
      slots[i] = sample_row(row, k, do_sample, q + i * k);
    }
  });
  return {slot, logq};
}

STABLE_TORCH_LIBRARY_FRAGMENT(rgtg_fast, m) {
  m.def(
      "ratio_sample(Tensor logprobs, Tensor rewards, Tensor ids, Tensor beta, Tensor temperature, "
      "Tensor seed, Tensor position, bool do_sample) -> (Tensor slot, Tensor logq)");
}

STABLE_TORCH_LIBRARY_IMPL(rgtg_fast, CPU, m) { m.impl("ratio_sample", TORCH_BOX(&ratio_sample)); }

}  // namespace rgtg
