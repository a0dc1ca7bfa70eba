#include "cuda/tensors.h"
#include "cuda/topk_logprobs.cuh"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <random>
#include <tuple>

namespace rgtg::cuda {
namespace {

// A value that no launch of any thread had before, and that memory holds by accident once in 2^64.
uint64_t launch_token() {
  static const auto random = [] {
    std::random_device device;
    return static_cast<uint64_t>(device()) << 32 | device();
  }();
  static std::atomic<uint64_t> launches{0};
  // The mixing of splitmix64: one to one, so that tokens differ, and nothing like a small number.
  uint64_t token = random + 0x9E3779B97F4A7C15ull * ++launches;
  token = (token ^ token >> 30) * 0xBF58476D1CE4E5B9ull;
  token = (token ^ token >> 27) * 0x94D049BB133111EBull;
  token ^= token >> 31;
  return token == 0 ? launch_token() : token;
}

int processors_of(int device) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

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
