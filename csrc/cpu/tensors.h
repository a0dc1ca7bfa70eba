// The few tensor helpers that the CPU ops share, on torch's stable ABI.
#pragma once

#include "widen.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <utility>

namespace rgtg {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Calls fn with a typed null pointer for the floating type: fn(static_cast<const float*>(nullptr)).
template <class Fn>
void dispatch_float(ScalarType type, const char* name, Fn&& fn) {
  switch (type) {
    case ScalarType::Float:
      return fn(static_cast<const float*>(nullptr));
    case ScalarType::Double:
      return fn(static_cast<const double*>(nullptr));
    case ScalarType::BFloat16:
      return fn(static_cast<const bf16*>(nullptr));
    case ScalarType::Half:
      return fn(static_cast<const fp16*>(nullptr));
    default:
      STD_TORCH_CHECK(false, name, " must be float64, float32, bfloat16 or float16");
  }
}

inline bool last_dim_dense(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.sizes()[last] <= 1 || t.stride(last) == 1;
}

// The tensor itself where its last dimension is dense in memory, else a contiguous copy.
inline Tensor with_dense_last_dim(const Tensor& t) {
  return last_dim_dense(t) ? t : torch::stable::contiguous(t);
}

// The tensor itself where it is contiguous, else a copy that is.
template <class T>
struct Dense {
  Tensor tensor;
  const T* data;
  explicit Dense(const Tensor& t)
      : tensor(torch::stable::contiguous(t)),
        data(static_cast<const T*>(tensor.const_data_ptr())) {}
};

template <size_t N>
Tensor empty_cpu(const std::array<int64_t, N>& sizes, ScalarType type) {
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), N), type);
}

}  // namespace rgtg
