// Stands in for csrc/cuda/mma.h, of the same functions.
#pragma once

#include "widen.h"

#include <cuda_runtime.h>

#include <type_traits>

namespace rgtg::cuda {

inline unsigned char* shared_memory() {
  alignas(16) __shared__ unsigned char memory[99 * 1024];
  return memory;
}

inline void copy_async(void* shared, const void* global, int bytes) {
  simt::copy_async(shared, global, bytes);
}
inline void commit_copies() { simt::commit_copies(); }
template <int kLeft>
void wait_copies() {
  simt::wait_copies(kLeft);
}

// What every lane of the warp passes, by pointer: a lane must not go on, and its stack be used
// again, before the others have read.
template <class V>
class Shared {
 public:
  explicit Shared(const V& mine) {
    const uint64_t* all = simt::exchange(~0u, reinterpret_cast<uint64_t>(&mine));
    for (int i = 0; i < 32; ++i) lanes_[i] = reinterpret_cast<const V*>(all[i]);
  }
  ~Shared() { simt::exchange(~0u, 0); }
  const V& operator[](int lane) const { return *lanes_[lane]; }

 private:
  const V* lanes_[32];
};

inline uint32_t two(uint16_t first, uint16_t second) {
  return static_cast<uint32_t>(second) << 16 | first;
}

inline void load_matrices(uint32_t (&r)[4], const void* shared_row) {
  const Shared<const void*> rows(shared_row);
  const int row = simt::lane() / 4, column = simt::lane() % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    const auto* elements = static_cast<const uint16_t*>(rows[8 * i + row]);
    r[i] = two(elements[column], elements[column + 1]);
  }
}

inline void load_transposed(uint32_t (&r)[4], const void* shared_row) {
  const Shared<const void*> rows(shared_row);
  const int column = simt::lane() / 4, row = simt::lane() % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    r[i] = two(static_cast<const uint16_t*>(rows[8 * i + row])[column],
               static_cast<const uint16_t*>(rows[8 * i + row + 1])[column]);
  }
}

template <class T>
double element_of_pair(uint32_t pair, int which) {
  return widen(T{static_cast<uint16_t>(which ? pair >> 16 : pair)});
}

template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  const Operands mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const Shared<Operands> all(mine);
  for (int i = 0; i < 4; ++i) {
    const int high = i / 2, row = simt::lane() / 4, column = simt::lane() % 4 * 2 + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const uint32_t left = all[row * 4 + k % 8 / 2].a[high + k / 8 * 2];
      const uint32_t right = all[column * 4 + k % 8 / 2].b[k / 8];
      sum += element_of_pair<T>(left, k % 2) * element_of_pair<T>(right, k % 2);
    }
    c[i] = static_cast<float>(sum);
  }
}

inline uint16_t rounded(float x, bf16) {
  const uint32_t bits = float_bits(x);
  if (x != x) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline uint16_t rounded(float x, fp16) {
  const _Float16 half = static_cast<_Float16>(x);
  uint16_t bits;
  memcpy(&bits, &half, sizeof bits);
  return bits;
}

template <class T>
uint32_t pack(float first, float second) {
  return two(rounded(first, T()), rounded(second, T()));
}

inline float exp2_near(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
}

inline float divide_near(float x, float y) { return x / y; }

inline int anew(int x) { return x; }

inline void let_next_grid_start() {}
inline void wait_for_previous_grid() {}

}  // namespace rgtg::cuda
