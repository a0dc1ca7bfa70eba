#include "cpu/dot.h"
#include "cpu/ops.h"

#include <torch/csrc/stable/library.h>

namespace rgtg {

Tensor reward_head(const Tensor& hidden, const Tensor& weight, std::optional<Tensor> bias) {
  STD_TORCH_CHECK(hidden.dim() == 3 && weight.dim() == 1, "hidden must be [B, k, H], weight [H]");
  const int64_t rows = hidden.sizes()[0], k = hidden.sizes()[1], width = hidden.sizes()[2];
  STD_TORCH_CHECK(weight.sizes()[0] == width, "weight must have H=", width, " elements");
  STD_TORCH_CHECK(!bias || bias->numel() == 1, "bias must have one element");
  Tensor rewards = empty_cpu<2>({rows, k}, ScalarType::Float);
  if (rows * k == 0) return rewards;
  const Tensor dense = with_dense_last_dim(hidden), head = with_dense_last_dim(weight);
  const int64_t row_stride = dense.stride(0), candidate_stride = dense.stride(1);
  const double offset = bias ? widened<double>(*bias, bias->const_data_ptr(), 1)[0] : 0.0;
  float* out = static_cast<float*>(rewards.mutable_data_ptr());
  dispatch_dot(weight, hidden, "hidden", [&](auto acc, auto type) {
    const auto w = widened<decltype(acc)>(head, head.const_data_ptr(), width);
    const auto* x = static_cast<decltype(type)>(dense.const_data_ptr());
    for_each_dot(rows * k, width, [&](int64_t i) {
      const auto* candidate = x + i / k * row_stride + i % k * candidate_stride;
      out[i] = static_cast<float>(RGTG_DISPATCH_SIMD(dot, w.data(), candidate, width) + offset);
    });
  });
  return rewards;
}

STABLE_TORCH_LIBRARY_FRAGMENT(rgtg_fast, m) {
  m.def("reward_head(Tensor hidden, Tensor weight, Tensor? bias=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(rgtg_fast, CPU, m) { m.impl("reward_head", TORCH_BOX(&reward_head)); }

}  // namespace rgtg
