// One slice of one row in one read: its k best keys and its part of the log-sum-exp. Included once
// per instruction set by simd.h.
#include "cpu/vocab_simd.h"

template <class T>
LogSum<double> topk_slice(const T* x, int64_t n, int64_t first_id, TopkList& best) {
  SliceSum slice;
  float padded[kBlock];
  for (int64_t start = 0; start < n; start += kBlock) {
    const int length = static_cast<int>(std::min<int64_t>(kBlock, n - start));
    BlockStats stats;
    if (length == kBlock) {
      stats = block_stats(x + start, kBlock, slice.base());
    } else {
      const int whole = whole_vectors(length);
      for (int i = 0; i < whole; ++i) padded[i] = i < length ? widen(x[start + i]) : -kInfinity;
      stats = block_stats(padded, whole, slice.base());
    }
    const bool undefined = slice.add(stats, x + start, length);
    if (!best.full() || undefined) {
      insert_all(x + start, length, first_id + start, best);
    } else if (stats.max > best.threshold()) {
      if (length == kBlock) {
        insert_greater(x + start, kBlock, first_id + start, best);
      } else {
        insert_all(x + start, length, first_id + start, best);
      }
    }
  }
  return slice.sum;
}

// fp64 rows are ordered by their fp32 rounding.
inline LogSum<double> topk_slice(const double* x, int64_t n, int64_t first_id, TopkList& best) {
  for (int64_t i = 0; i < n; ++i) {
    best.insert(pack_key(static_cast<float>(x[i]), static_cast<uint32_t>(first_id + i)));
  }
  return sum_slice(x, n);
}
