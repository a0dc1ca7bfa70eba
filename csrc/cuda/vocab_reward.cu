#include "cuda/tensors.h"
#include "cuda/vocab_reward.cuh"

#include <torch/csrc/stable/library.h>

namespace rgtg::cuda {
namespace {

Tensor vocab_reward(const Tensor& hidden, const Tensor& weight, const Tensor& ids) {
  STD_TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2 && ids.dim() == 2,
                  "hidden must be [B, H], weight [V, H], ids [B, k]");
  const int64_t rows = ids.sizes()[0], k = ids.sizes()[1];
  const int64_t vocab = weight.sizes()[0], width = weight.sizes()[1];
  STD_TORCH_CHECK(hidden.sizes()[0] == rows && hidden.sizes()[1] == width,
                  "hidden must be [B, H] with B=", rows, " and H=", width);
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Long, "ids must be int64");
  check_same_device(hidden, {&weight, &ids});
  check_grid(rows, k);
  const DeviceGuard guard(hidden.get_device());
  const Tensor rewards = empty_on_device_of<2>(hidden, {rows, k}, ScalarType::Float);
  if (rows * k == 0) return rewards;
  const Tensor vectors = with_dense_last_dim(hidden), table = with_dense_last_dim(weight);
  const Tensor dense_ids = torch::stable::contiguous(ids);
  const VocabArguments arguments = {operand(table, "weight"),
                                    vocab,
                                    width,
                                    table.stride(0),
                                    operand(vectors, "hidden"),
                                    vectors.stride(0),
                                    data<int64_t>(dense_ids),
                                    rows,
                                    k,
                                    mutable_data<float>(rewards)};
  check(launch_vocab_reward(arguments, current_stream(hidden)));
  return rewards;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rgtg_fast, CUDA, m) { m.impl("vocab_reward", TORCH_BOX(&vocab_reward)); }

}  // namespace rgtg::cuda
