// What the CUDA ops share of torch's stable ABI: device, stream, checks and outputs.
#pragma once

#include "cuda/dot.cuh"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <initializer_list>
#include <limits>

// Weak: a CPU-only libtorch does not have it, and this library must load there all the same.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace rgtg::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check(cudaError_t status) {
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

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "this torch was built without CUDA");
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device(), &stream));
  return static_cast<cudaStream_t>(stream);
}

template <size_t N>
Tensor empty_on_device_of(const Tensor& t, const std::array<int64_t, N>& sizes, ScalarType type) {
  return torch::stable::new_empty(t, torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), N),
                                  type);
}

// The tensor itself where its last dimension is dense in memory, else a contiguous copy.
inline Tensor with_dense_last_dim(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.sizes()[last] <= 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}

inline Element element_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return Element::fp64;
    case ScalarType::Float:
      return Element::fp32;
    case ScalarType::BFloat16:
      return Element::bf16;
    case ScalarType::Half:
      return Element::fp16;
    default:
      STD_TORCH_CHECK(false, name, " must be float64, float32, bfloat16 or float16");
  }
}

inline Operand operand(const Tensor& t, const char* name) {
  return {t.const_data_ptr(), element_of(t, name)};
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Without this check a kernel that reads another device's memory would fail with an illegal access,
// after which the process can use no GPU at all.
inline void check_same_device(const Tensor& first, std::initializer_list<const Tensor*> others) {
  for (const Tensor* other : others) {
    STD_TORCH_CHECK(other->is_cuda() && other->get_device() == first.get_device(),
                    "the tensors are on different devices");
  }
}

// Grids are (rows, groups of at least 8 candidates), limited to 2^31 - 1 and 65535 blocks.
inline void check_grid(int64_t rows, int64_t k) {
  STD_TORCH_CHECK(rows <= std::numeric_limits<int32_t>::max(), "too many rows: ", rows);
  STD_TORCH_CHECK(k <= 8 * 65535, "too many candidates: ", k);
}

}  // namespace rgtg::cuda
