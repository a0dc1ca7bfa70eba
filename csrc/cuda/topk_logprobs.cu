#include "cuda/topk_logprobs.cuh"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <limits>
#include <tuple>

// Weak: a CPU-only libtorch does not have it, and this library must load there all the same.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace rgtg::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(cudaError_t status) {
  STD_TORCH_CHECK(status == cudaSuccess, "CUDA: ", cudaGetErrorString(status));
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_));
    check(cudaSetDevice(device));
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "this torch was built without CUDA");
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

template <size_t N>
Tensor empty_like_device(const Tensor& t, const std::array<int64_t, N>& sizes, ScalarType type) {
  return torch::stable::new_empty(t, torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), N),
                                  type);
}

template <class T, class Acc>
void launch(const Tensor& logits, int k, const Tensor& logprobs, const Tensor& ids) {
  const int64_t rows = logits.sizes()[0], vocab = logits.sizes()[1];
  const int64_t slices = (vocab + kTile - 1) / kTile;
  STD_TORCH_CHECK(rows * slices <= std::numeric_limits<int32_t>::max(), "logits has too many rows");
  const Tensor keys = empty_like_device<1>(logits, {rows * slices * k}, ScalarType::Long);
  const Tensor sums = empty_like_device<1>(
      logits, {rows * slices * static_cast<int64_t>(sizeof(LogSum<Acc>))}, ScalarType::Byte);
  const auto* x = static_cast<const T*>(logits.const_data_ptr());
  auto* key = static_cast<uint64_t*>(keys.mutable_data_ptr());
  auto* sum = static_cast<LogSum<Acc>*>(sums.mutable_data_ptr());
  const cudaStream_t stream = current_stream(logits.get_device());
  topk_slices<T, Acc>
      <<<rows * slices, kThreads, 0, stream>>>(x, logits.stride(0), vocab, slices, k, key, sum);
  check(cudaGetLastError());
  topk_merge<T, Acc><<<rows, kThreads, slices, stream>>>(
      x, logits.stride(0), slices, k, key, sum, static_cast<float*>(logprobs.mutable_data_ptr()),
      static_cast<int64_t*>(ids.mutable_data_ptr()));
  check(cudaGetLastError());
}

std::tuple<Tensor, Tensor> topk_logprobs(const Tensor& logits, int64_t k) {
  STD_TORCH_CHECK(logits.dim() == 2, "logits must be [B, V]");
  const int64_t rows = logits.sizes()[0], vocab = logits.sizes()[1];
  STD_TORCH_CHECK(k >= 1 && k <= std::min<int64_t>(vocab, kMaxCandidates), "k=", k,
                  " must be between 1 and min(V, ", kMaxCandidates, ") with V=", vocab);
  const DeviceGuard guard(logits.get_device());
  const Tensor logprobs = empty_like_device<2>(logits, {rows, k}, ScalarType::Float);
  const Tensor ids = empty_like_device<2>(logits, {rows, k}, ScalarType::Long);
  if (rows == 0) return {logprobs, ids};
  const bool dense_rows = vocab == 1 || logits.stride(1) == 1;
  const Tensor dense = dense_rows ? logits : torch::stable::contiguous(logits);
  const int count = static_cast<int>(k);
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      launch<float, float>(dense, count, logprobs, ids);
      break;
    case ScalarType::Double:
      launch<double, double>(dense, count, logprobs, ids);
      break;
    case ScalarType::BFloat16:
      launch<__nv_bfloat16, float>(dense, count, logprobs, ids);
      break;
    case ScalarType::Half:
      launch<__half, float>(dense, count, logprobs, ids);
      break;
    default:
      STD_TORCH_CHECK(false, "logits must be float64, float32, bfloat16 or float16");
  }
  return {logprobs, ids};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rgtg_fast, CUDA, m) {
  m.impl("topk_logprobs", TORCH_BOX(&topk_logprobs));
}

}  // namespace rgtg::cuda
