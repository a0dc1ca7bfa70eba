#include "cuda/ratio_inputs.h"
#include "cuda/ratio_sample.cuh"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace rgtg::cuda {
namespace {

std::tuple<Tensor, Tensor> ratio_sample(const Tensor& logprobs, const Tensor& rewards,
                                        const Tensor& ids, const Tensor& beta,
                                        const Tensor& temperature, const Tensor& seed,
                                        const Tensor& position, bool do_sample) {
  const DeviceGuard guard(logprobs.get_device());
  const RatioInputs ratio(logprobs, rewards, ids, beta, temperature, seed, position, do_sample);
  if (ratio.arguments.rows > 0) {
    check(launch_ratio_sample(ratio.arguments, current_stream(logprobs)));
  }
  return {ratio.slot, ratio.logq};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rgtg_fast, CUDA, m) { m.impl("ratio_sample", TORCH_BOX(&ratio_sample)); }

}  // namespace rgtg::cuda
