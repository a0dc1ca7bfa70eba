#include "cuda/head_inputs.h"

#include <torch/csrc/stable/library.h>

namespace rgtg::cuda {
namespace {

Tensor reward_head(const Tensor& hidden, const Tensor& weight, std::optional<Tensor> bias) {
  const DeviceGuard guard(hidden.get_device());
  const HeadInputs head(hidden, weight, bias);
  if (head.arguments.rows * head.arguments.k == 0) return head.rewards;
  check(launch_reward_head(head.arguments, current_stream(hidden)));
  return head.rewards;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rgtg_fast, CUDA, m) { m.impl("reward_head", TORCH_BOX(&reward_head)); }

}  // namespace rgtg::cuda
