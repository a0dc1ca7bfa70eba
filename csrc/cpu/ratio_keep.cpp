#include "ratio_policy.h"

#include "cpu/tensors.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

namespace rgtg {
namespace {

struct RowPolicy {
  float beta, temperature;
  int64_t seed, position;
  bool do_sample;

  // The value that ratio_sample compares for this candidate; -inf where it cannot be chosen.
  float value(const Score& score, int64_t id) const {
    return score.possible() ? score.value(do_sample, seed, position, id) : -kInf<float>;
  }
};

// Drops a candidate whose best possible value is below another's worst. Every operation is rounded
// once and so monotonic in the reward: values for rewards in between stay within those at the two
// bounds, and no safety margin is needed.
void keep_row(const RowPolicy& row, const float* logprobs, const int64_t* ids, int64_t k, float low,
              float high, float* best, bool* keep) {
  float floor = -kInf<float>;  // the winner's value is at least this
  bool undefined = false;
  for (int64_t i = 0; i < k; ++i) {
    const Score at_low(logprobs[i], low, row.beta, row.temperature);
    const Score at_high(logprobs[i], high, row.beta, row.temperature);
    undefined |= at_low.undefined() || at_high.undefined();
    const float one = row.value(at_low, ids[i]), other = row.value(at_high, ids[i]);
    best[i] = std::max(one, other);
    floor = std::max(floor, std::min(one, other));
  }
  for (int64_t i = 0; i < k; ++i) keep[i] = undefined || !(best[i] < floor);
}

}  // namespace

Tensor ratio_keep(const Tensor& logprobs, const Tensor& ids, const Tensor& beta,
                  const Tensor& temperature, const Tensor& seed, const Tensor& position,
                  bool do_sample, double low, double high) {
  STD_TORCH_CHECK(logprobs.dim() == 2, "logprobs must be [B, k]");
  const int64_t rows = logprobs.sizes()[0], k = logprobs.sizes()[1];
  for (const Tensor* t : {&logprobs, &beta, &temperature}) {
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float, "ratio_keep takes float32 here");
  }
  for (const Tensor* t : {&ids, &seed, &position}) {
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Long, "ratio_keep takes int64 here");
  }
  STD_TORCH_CHECK(ids.dim() == 2 && ids.sizes()[0] == rows && ids.sizes()[1] == k,
                  "ids must be [B, k] like logprobs");
  for (const Tensor* t : {&beta, &temperature, &seed, &position}) {
    STD_TORCH_CHECK(t->dim() == 1 && t->sizes()[0] == rows,
                    "beta, temperature, seed and position must be [B]");
  }
  Tensor keep = empty_cpu<2>({rows, k}, ScalarType::Bool);
  const Dense<float> l(logprobs), b(beta), t(temperature);
  const Dense<int64_t> id(ids), s(seed), p(position);
  auto* kept = static_cast<bool*>(keep.mutable_data_ptr());
  std::vector<float> best(k);
  for (int64_t i = 0; i < rows; ++i) {
    const RowPolicy row = {b.data[i], t.data[i], s.data[i], p.data[i], do_sample};
    keep_row(row, l.data + i * k, id.data + i * k, k, static_cast<float>(low),
             static_cast<float>(high), best.data(), kept + i * k);
  }
  return keep;
}

STABLE_TORCH_LIBRARY_FRAGMENT(rgtg_fast, m) {
  m.def(
      "ratio_keep(Tensor logprobs, Tensor ids, Tensor beta, Tensor temperature, Tensor seed, "
      "Tensor position, bool do_sample, float low, float high) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(rgtg_fast, CPU, m) { m.impl("ratio_keep", TORCH_BOX(&ratio_keep)); }

}  // namespace rgtg
