#include "cpu/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace rgtg {
namespace {

const char* const kNames[] = {"base", "avx2", "avx512"};

SimdLevel best_level() {
#if RGTG_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512) return SimdLevel::avx512;
  if (avx2) return SimdLevel::avx2;
#endif
  return SimdLevel::base;
}

std::atomic<SimdLevel> current{best_level()};

}  // namespace

SimdLevel simd_level() { return current.load(std::memory_order_relaxed); }

std::string simd_level_name() { return kNames[static_cast<int>(simd_level())]; }

std::vector<std::string> simd_levels() {
  return {kNames, kNames + static_cast<int>(best_level()) + 1};
}

void set_simd_level(const std::string& name) {
  std::string known;
  for (int level = 0; level <= static_cast<int>(best_level()); ++level) {
    if (name == kNames[level]) {
      current.store(static_cast<SimdLevel>(level), std::memory_order_relaxed);
      return;
    }
    known += known.empty() ? kNames[level] : std::string(", ") + kNames[level];
  }
  throw std::invalid_argument("SIMD level '" + name + "' is not available here; pass one of " +
                              known);
}

}  // namespace rgtg
