// Element types as they lie in memory, and 16-byte loads of them.
#pragma once

#include "widen.h"

#include <cuda_runtime.h>

#include <type_traits>

namespace rgtg::cuda {

enum class Element { fp64, fp32, bf16, fp16 };

template <class T>
constexpr Element kElement = std::is_same_v<T, double>  ? Element::fp64
                             : std::is_same_v<T, float> ? Element::fp32
                             : std::is_same_v<T, bf16>  ? Element::bf16
                                                        : Element::fp16;

// fp32 arithmetic for everything but fp64.
template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Calls fn with a typed null pointer: fn(static_cast<const float*>(nullptr)).
template <class Fn>
auto dispatch_element(Element element, Fn&& fn) {
  switch (element) {
    case Element::fp64:
      return fn(static_cast<const double*>(nullptr));
    case Element::fp32:
      return fn(static_cast<const float*>(nullptr));
    case Element::bf16:
      return fn(static_cast<const bf16*>(nullptr));
    default:
      return fn(static_cast<const fp16*>(nullptr));
  }
}

template <class T>
union Vector {
  static constexpr int kWidth = 16 / sizeof(T);
  uint4 raw;
  T item[kWidth];
};

template <class T>
__device__ inline Vector<T> load_vector(const T* aligned) {
  Vector<T> vector;
  vector.raw = *reinterpret_cast<const uint4*>(aligned);
  return vector;
}

template <class T>
__device__ inline bool is_aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

template <class T>
__device__ inline T minus_infinity() {
  if constexpr (std::is_same_v<T, bf16>) {
    return {0xFF80};
  } else if constexpr (std::is_same_v<T, fp16>) {
    return {0xFC00};
  } else {
    return -kInf<T>;
  }
}

}  // namespace rgtg::cuda
