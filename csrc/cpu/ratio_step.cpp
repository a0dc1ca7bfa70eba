#include "cpu/ops.h"

#include <torch/csrc/stable/library.h>

namespace rgtg {
namespace {

std::tuple<Tensor, Tensor, Tensor> ratio_step(const Tensor& logprobs, const Tensor& hidden,
                                              const Tensor& weight, const Tensor& ids,
                                              const Tensor& beta, const Tensor& temperature,
                                              const Tensor& seed, const Tensor& position,
                                              bool do_sample, std::optional<Tensor> bias) {
  const Tensor rewards = reward_head(hidden, weight, bias);
  const auto [slot, logq] =
      ratio_sample(logprobs, rewards, ids, beta, temperature, seed, position, do_sample);
  return {slot, rewards, logq};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rgtg_fast, m) {
  m.def(
      "ratio_step(Tensor logprobs, Tensor hidden, Tensor weight, Tensor ids, Tensor beta, "
      "Tensor temperature, Tensor seed, Tensor position, bool do_sample, Tensor? bias=None) -> "
      "(Tensor slot, Tensor rewards, Tensor logq)");
}

STABLE_TORCH_LIBRARY_IMPL(rgtg_fast, CPU, m) { m.impl("ratio_step", TORCH_BOX(&ratio_step)); }

}  // namespace rgtg
