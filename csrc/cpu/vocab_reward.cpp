#include "cpu/dot.h"

#include <torch/csrc/stable/library.h>

namespace rgtg {
namespace {

Tensor vocab_reward(const Tensor& hidden, const Tensor& weight, const Tensor& ids) {
  STD_TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2 && ids.dim() == 2,
                  "hidden must be [B, H], weight [V, H], ids [B, k]");
  const int64_t rows = ids.sizes()[0], k = ids.sizes()[1];
  const int64_t vocab = weight.sizes()[0], width = weight.sizes()[1];
  STD_TORCH_CHECK(hidden.sizes()[0] == rows && hidden.sizes()[1] == width,
                  "hidden must be [B, H] with B=", rows, " and H=", width);
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Long, "ids must be int64");
  Tensor rewards = empty_cpu<2>({rows, k}, ScalarType::Float);
  if (rows * k == 0) return rewards;
  const Tensor vectors = torch::stable::contiguous(hidden), table = with_dense_last_dim(weight);
  const Tensor dense_ids = torch::stable::contiguous(ids);
  const int64_t* id = static_cast<const int64_t*>(dense_ids.const_data_ptr());
  for (int64_t i = 0; i < rows * k; ++i) {
    STD_TORCH_CHECK(id[i] >= 0 && id[i] < vocab, "ids: ", id[i], " is outside the vocabulary of ",
                    vocab, " tokens");
  }
  const int64_t stride = table.stride(0);
  float* out = static_cast<float*>(rewards.mutable_data_ptr());
  dispatch_dot(hidden, weight, "weight", [&](auto acc, auto type) {
    const auto h = widened<decltype(acc)>(vectors, vectors.const_data_ptr(), rows * width);
    const auto* w = static_cast<decltype(type)>(table.const_data_ptr());
    for_each_dot(rows * k, width, [&](int64_t i) {
      out[i] = static_cast<float>(
          RGTG_DISPATCH_SIMD(dot, h.data() + i / k * width, w + id[i] * stride, width));
    });
  });
  return rewards;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rgtg_fast, m) {
  m.def("vocab_reward(Tensor hidden, Tensor weight, Tensor ids) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(rgtg_fast, CPU, m) { m.impl("vocab_reward", TORCH_BOX(&vocab_reward)); }

}  // namespace rgtg
