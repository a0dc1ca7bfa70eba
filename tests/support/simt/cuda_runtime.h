// Stands in for CUDA's header of this name, so that a host compiler builds csrc/cuda/*.cuh: enough
// of the language and the runtime for these kernels, executed by simt.cpp.
//
// Blocks run one after another, the threads of a block as fibers. A fiber runs until it waits at a
// __syncthreads or a warp primitive, and a warp runs until __syncthreads stops it; which comes next
// is the order asked for, of blocks too. What a kernel gets wrong without a barrier shows as a
// result that depends on the order; what blocks see of each other's writes is in memory.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __host__
#define __device__
#define __global__
// The linker script gathers these in one section, which is filled with garbage before every block.
#define __shared__ static
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorLaunchFailure = 719 };

enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace simt {

cudaError_t run(dim3 grid, dim3 block, const std::function<void()>& kernel);

void block_barrier();
void fence();
uint64_t atomic_read(const void* address, size_t size);
// An exchange whose result is not used may be seen late.
void atomic_write(void* address, size_t size, uint64_t value, bool exchange);
void count_push();
// Gives every lane of the mask the values of all 32 lanes, once all of them have called.
const uint64_t* exchange(uint32_t mask, uint64_t value);
int thread();
int lane();

// cp.async: what is copied arrives at the start of a launch's time or at its end, when the thread
// waits for it, as the order asked for has it.
void copy_async(void* to, const void* from, int bytes);
void commit_copies();
void wait_copies(int left);

template <class V>
V shuffle(uint32_t mask, V value, int source) {
  static_assert(sizeof(V) <= 8);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  const uint64_t* all = exchange(mask, bits);
  memcpy(&value, &all[source], sizeof value);
  return value;
}

}  // namespace simt

inline void __syncthreads() { simt::block_barrier(); }
inline void __syncwarp(uint32_t mask = 0xFFFFFFFFu) { simt::exchange(mask, 0); }

template <class V>
V __shfl_xor_sync(uint32_t mask, V value, int offset) {
  return simt::shuffle(mask, value, simt::lane() ^ offset);
}

template <class V>
V __shfl_sync(uint32_t mask, V value, int source) {
  return simt::shuffle(mask, value, source % 32);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate) {
  const uint64_t* all = simt::exchange(mask, predicate != 0);
  uint32_t votes = 0;
  for (int i = 0; i < 32; ++i) votes |= static_cast<uint32_t>((mask >> i & 1) && all[i]) << i;
  return votes;
}

inline int __any_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(uint32_t mask, int predicate) {
  return __ballot_sync(mask, predicate) == mask;
}

inline uint32_t __reduce_add_sync(uint32_t mask, uint32_t value) {
  const uint64_t* all = simt::exchange(mask, value);
  uint32_t total = 0;
  for (int i = 0; i < 32; ++i) total += mask >> i & 1 ? static_cast<uint32_t>(all[i]) : 0;
  return total;
}

inline uint32_t __reduce_max_sync(uint32_t mask, uint32_t value) {
  const uint64_t* all = simt::exchange(mask, value);
  for (int i = 0; i < 32; ++i) {
    if (mask >> i & 1 && all[i] > value) value = static_cast<uint32_t>(all[i]);
  }
  return value;
}

inline uint32_t __reduce_min_sync(uint32_t mask, uint32_t value) {
  return ~__reduce_max_sync(mask, ~value);
}

inline int __ffs(int x) { return __builtin_ffs(x); }
inline void __threadfence() { simt::fence(); }

template <class V>
V atomicAdd(V* address, V value) {
  uint64_t bits = simt::atomic_read(address, sizeof(V));
  V before;
  memcpy(&before, &bits, sizeof(V));
  const V after = before + value;
  memcpy(&bits, &after, sizeof(V));
  // Adding nothing is how a kernel reads atomically.
  if (value != 0) simt::atomic_write(address, sizeof(V), bits, false);
  simt::count_push();
  return before;
}

inline void atomicExch(unsigned long long* address, unsigned long long value) {
  simt::atomic_write(address, sizeof value, value, true);
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  return bytes <= 99 * 1024 ? cudaSuccess : cudaErrorLaunchFailure;
}

template <class... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Parameters... arguments) {
  return simt::run(config->gridDim, config->blockDim, [=] { kernel(arguments...); });
}
