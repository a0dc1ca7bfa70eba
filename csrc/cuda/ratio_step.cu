#include "cuda/head_inputs.h"
#include "cuda/ratio_inputs.h"
#include "cuda/ratio_step.cuh"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace rgtg::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> ratio_step(const Tensor& logprobs, const Tensor& hidden,
                                              const Tensor& weight, const Tensor& ids,
                                              const Tensor& beta, const Tensor& temperature,
                                              const Tensor& seed, const Tensor& position,
                                              bool do_sample, std::optional<Tensor> bias) {
  const DeviceGuard guard(hidden.get_device());
  const HeadInputs head(hidden, weight, bias);
  check_same_device(hidden, {&logprobs});
  const RatioInputs ratio(logprobs, head.rewards, ids, beta, temperature, seed, position,
                          do_sample);
  if (ratio.arguments.rows > 0) {
    check(launch_ratio_step(head.arguments, ratio.arguments, current_stream(hidden)));
  }
  return {ratio.slot, head.rewards, ratio.logq};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rgtg_fast, CUDA, m) { m.impl("ratio_step", TORCH_BOX(&ratio_step)); }

}  // namespace rgtg::cuda
