#include "cuda/launch_token.h"
#include "cuda/topk_logprobs.cuh"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace rgtg::cuda {
namespace {

std::tuple<Tensor, Tensor> topk_logprobs(const Tensor& logits, int64_t k) {
  STD_TORCH_CHECK(logits.dim() == 2, "logits must be [B, V]");
  const int64_t rows = logits.sizes()[0], vocab = logits.sizes()[1];
  STD_TORCH_CHECK(k >= 1 && k <= std::min<int64_t>(vocab, kMaxCandidates), "k=", k,
                  " must be between 1 and min(V, ", kMaxCandidates, ") with V=", vocab);
  STD_TORCH_CHECK(vocab <= kMaxVocab, "V=", vocab, " is larger than ", kMaxVocab);
  const Element element = element_of(logits, "logits");
  const DeviceGuard guard(logits.get_device());
  const Tensor logprobs = empty_on_device_of<2>(logits, {rows, k}, ScalarType::Float);
  const Tensor ids = empty_on_device_of<2>(logits, {rows, k}, ScalarType::Long);
  if (rows == 0) return {logprobs, ids};
  const auto [slices, stripes] =
      topk_slicing(element, rows, vocab, processors_of(logits.get_device()));
  check_grid(rows * slices, k);
  const Tensor dense = with_dense_last_dim(logits);
  const Tensor workspace =
      empty_on_device_of<1>(logits, {rows * slices * kWorkspaceWords}, ScalarType::Long);
  const TopkArguments arguments = {dense.const_data_ptr(),
                                   rows,
                                   vocab,
                                   dense.stride(0),
                                   static_cast<int>(k),
                                   slices,
                                   stripes,
                                   mutable_data<uint64_t>(workspace),
                                   launch_token(),
                                   mutable_data<float>(logprobs),
                                   mutable_data<int64_t>(ids)};
  check(launch_topk_logprobs(element, arguments, current_stream(logits)));
  return {logprobs, ids};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rgtg_fast, CUDA, m) {
  m.impl("topk_logprobs", TORCH_BOX(&topk_logprobs));
}

}  // namespace rgtg::cuda
