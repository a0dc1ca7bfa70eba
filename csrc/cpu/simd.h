// One kernel source, compiled once per instruction set into the same binary.
//
// A kernel file defines RGTG_KERNELS as the header with its kernels and includes this one. The
// header is then read once per namespace (base, avx2, avx512) under the matching target options, on
// top of vectors of the same names. dispatch.h says which namespace to call.
#include "dispatch.h"
#include "narrow.h"
#include "widen.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if RGTG_X86
#include <immintrin.h>
#endif

#define RGTG_INLINE inline __attribute__((always_inline))

namespace rgtg::base {
#include "cpu/simd_base.h"
#include RGTG_KERNELS
}  // namespace rgtg::base

#if RGTG_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace rgtg::avx2 {
#include "cpu/simd_avx2.h"
#include RGTG_KERNELS
}  // namespace rgtg::avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace rgtg::avx512 {
#include "cpu/simd_avx512.h"
#include RGTG_KERNELS
}  // namespace rgtg::avx512
#pragma GCC pop_options
#endif
