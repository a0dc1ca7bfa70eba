// Which instruction set the kernels use: the best the machine has, unless one is asked for.
#pragma once

#include <string>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define RGTG_X86 1
#else
#define RGTG_X86 0
#endif

namespace rgtg {

enum class SimdLevel { base, avx2, avx512 };

SimdLevel simd_level();
std::string simd_level_name();
// The levels this machine can run, slowest first.
std::vector<std::string> simd_levels();
// Throws std::invalid_argument for a name that is not among simd_levels().
void set_simd_level(const std::string& name);

}  // namespace rgtg

// Calls the kernel of the level in use, for example RGTG_DISPATCH_SIMD(dot, a, b, n).
#if RGTG_X86
#define RGTG_DISPATCH_SIMD(kernel, ...)                                                    \
  (::rgtg::simd_level() == ::rgtg::SimdLevel::avx512 ? ::rgtg::avx512::kernel(__VA_ARGS__) \
   : ::rgtg::simd_level() == ::rgtg::SimdLevel::avx2 ? ::rgtg::avx2::kernel(__VA_ARGS__)   \
                                                     : ::rgtg::base::kernel(__VA_ARGS__))
#else
#define RGTG_DISPATCH_SIMD(kernel, ...) ::rgtg::base::kernel(__VA_ARGS__)
#endif
