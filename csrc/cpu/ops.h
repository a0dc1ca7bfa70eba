// The ops that ratio_step is made of.
#pragma once

#include "cpu/tensors.h"

#include <optional>
#include <tuple>

namespace rgtg {

Tensor reward_head(const Tensor& hidden, const Tensor& weight, std::optional<Tensor> bias);

std::tuple<Tensor, Tensor> ratio_sample(const Tensor& logprobs, const Tensor& rewards,
                                        const Tensor& ids, const Tensor& beta,
                                        const Tensor& temperature, const Tensor& seed,
                                        const Tensor& position, bool do_sample);

}  // namespace rgtg
