// The checked arguments of a reward head, for reward_head and ratio_step.
#pragma once

#include "cuda/reward_head.cuh"
#include "cuda/tensors.h"

#include <optional>

namespace rgtg::cuda {

// Holds the tensors that `arguments` points to.
struct HeadInputs {
  Tensor hidden, weight, rewards;
  std::optional<Tensor> bias;
  HeadArguments arguments;

  // hidden [B, k, H], weight [H], one bias.
  HeadInputs(const Tensor& given_hidden, const Tensor& given_weight,
             std::optional<Tensor> given_bias)
      : hidden(checked(given_hidden)),
        weight(with_dense_last_dim(given_weight)),
        rewards(empty_on_device_of<2>(hidden, {hidden.sizes()[0], hidden.sizes()[1]},
                                      ScalarType::Float)),
        bias(given_bias) {
    const int64_t rows = hidden.sizes()[0], k = hidden.sizes()[1], width = hidden.sizes()[2];
    STD_TORCH_CHECK(weight.dim() == 1 && weight.sizes()[0] == width,
                    "weight must be [H] with H=", width);
    check_same_device(hidden, {&weight});
    check_grid(rows, k);
    Operand bias_operand = {nullptr, Element::fp32};
    if (bias) {
      STD_TORCH_CHECK(bias->numel() == 1, "bias must have one element");
      check_same_device(hidden, {&*bias});
      bias_operand = operand(*bias, "bias");
    }
    arguments = {operand(hidden, "hidden"),
                 rows,
                 k,
                 width,
                 hidden.stride(0),
                 hidden.stride(1),
                 operand(weight, "weight"),
                 bias_operand,
                 mutable_data<float>(rewards)};
  }

 private:
  static Tensor checked(const Tensor& hidden) {
    STD_TORCH_CHECK(hidden.dim() == 3, "hidden must be [B, k, H]");
    return with_dense_last_dim(hidden);
  }
};

}  // namespace rgtg::cuda
