// What a launch needs that ends in a merge by the last block: see last_block.cuh.
#pragma once

#include "cuda/tensors.h"

#include <atomic>
#include <random>

namespace rgtg::cuda {

// A value that no launch of any thread had before, and that memory holds by accident once in 2^64.
inline uint64_t launch_token() {
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

inline int processors_of(int device) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

}  // namespace rgtg::cuda
