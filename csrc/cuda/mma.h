// What the kernels use of PTX: copies to shared memory that do not wait, products of small matrices
// on tensor cores, and launches that overlap. tests/support/simt/cuda/mma.h stands in for this file
// where a host compiler builds the kernels.
#pragma once

#include "widen.h"

#include <cuda_runtime.h>

#include <type_traits>

namespace rgtg::cuda {

// A block's dynamic shared memory.
__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Starts to copy `bytes` (0 or 16) to 16 bytes of shared memory and zeroes the rest. Both addresses
// are aligned; with 0 bytes nothing is read.
__device__ inline void copy_async(void* shared, const void* global, int bytes) {
  asm volatile(
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)),
      "l"(global), "r"(bytes)
      : "memory");
}

// Ends a group of copies.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until all of the thread's groups but the last kLeft have arrived. Other threads see them
// after a barrier.
template <int kLeft>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kLeft) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane l points to row l % 8 of matrix l / 8. r[i] holds,
// of matrix i, the elements 2 * (lane % 4) and the next of row lane / 4.
__device__ inline void load_matrices(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

// The same of the transposed matrices.
__device__ inline void load_transposed(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

// c [16, 8] += a [16, 16] * b [16, 8]. With g = lane / 4 and t = 2 * (lane % 4), a lane holds
// c: (g, t), (g, t + 1), (g + 8, t), (g + 8, t + 1); pairs of a: (g, t), (g + 8, t), (g, t + 8),
// (g + 8, t + 8), the second of a pair one column on; pairs of b: (t, g), (t + 8, g), one row on.
template <class T>
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  if constexpr (std::is_same_v<T, bf16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Two floats rounded to T, the first in the low half.
template <class T>
__device__ inline uint32_t pack(float first, float second) {
  uint32_t both;
  if constexpr (std::is_same_v<T, bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(both) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(both) : "f"(second), "f"(first));
  }
  return both;
}

// 2^x to two ulps; subnormal results become zero.
__device__ inline float exp2_near(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// x / y to two ulps, for y below 2^126.
__device__ inline float divide_near(float x, float y) { return __fdividef(x, y); }

// x, unknown to the compiler: what is computed from it is computed anew, and not kept in registers.
__device__ inline int anew(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Lets the next launch of the stream begin, if it was launched to overlap.
__device__ inline void let_next_grid_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n");
#endif
}

// Waits for the end of the previous launch of the stream, whose writes are visible then. Every
// thread of a launch that overlaps must call it, or later launches could overtake the previous one.
__device__ inline void wait_for_previous_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

}  // namespace rgtg::cuda
