#include "log_sum.h"
#include "topk_list.h"

#define RGTG_KERNELS "cpu/topk_logprobs_simd.h"
#include "cpu/simd.h"
#include "cpu/tensors.h"

#include <torch/csrc/stable/library.h>

#include <numeric>
#include <tuple>
#include <vector>

namespace rgtg {
namespace {

constexpr int64_t kMinSlice = 8192;  // logits per slice; merging shorter ones costs more
constexpr int64_t kGrain = 16384;    // logits per thread; fewer do not pay for waking it

struct Slice {
  TopkList best;
  LogSum<double> sum;
};

// Slices per row such that rows * slices divides evenly among the threads.
int64_t slices_per_row(int64_t rows, int64_t vocab) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t even = rows >= 8 * threads ? 1 : threads / std::gcd(rows, threads);
  return std::max<int64_t>(1, std::min(even, vocab / kMinSlice));
}

template <class T>
void write_row(const T* row, const Slice* slices, int64_t count, int k, float* logprobs,
               int64_t* ids) {
  TopkList best(k);
  LogSum<double> sum;
  for (int64_t s = 0; s < count; ++s) {
    for (int i = 0; i < slices[s].best.count; ++i) best.insert(slices[s].best.keys[i]);
    sum.merge(slices[s].sum);
  }
  for (int i = 0; i < k; ++i) {
    ids[i] = key_id(best.keys[i]);
    logprobs[i] = static_cast<float>(sum.logprob(widen(row[ids[i]])));
  }
}

template <class T>
void topk_rows(const T* logits, int64_t rows, int64_t vocab, int64_t row_stride, int k,
               float* logprobs, int64_t* ids) {
  const int64_t count = slices_per_row(rows, vocab);
  const int64_t length = (vocab + count - 1) / count;
  std::vector<Slice> slices(rows * count, Slice{TopkList(k), {}});
  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t start = task % count * length;
      const T* x = logits + task / count * row_stride + start;
      Slice& slice = slices[task];
      slice.sum =
          RGTG_DISPATCH_SIMD(topk_slice, x, std::min(length, vocab - start), start, slice.best);
    }
  };
  torch::stable::parallel_for(0, rows * count, std::max<int64_t>(1, kGrain / length), work);
  for (int64_t row = 0; row < rows; ++row) {
    write_row(logits + row * row_stride, &slices[row * count], count, k, logprobs + row * k,
              ids + row * k);
  }
}

std::tuple<Tensor, Tensor> topk_logprobs(const Tensor& logits, int64_t k) {
  STD_TORCH_CHECK(logits.dim() == 2, "logits must be [B, V]");
  const int64_t rows = logits.sizes()[0], vocab = logits.sizes()[1];
  STD_TORCH_CHECK(k >= 1 && k <= std::min<int64_t>(vocab, kMaxCandidates), "k=", k,
                  " must be between 1 and min(V, ", kMaxCandidates, ") with V=", vocab);
  Tensor logprobs = empty_cpu<2>({rows, k}, ScalarType::Float);
  Tensor ids = empty_cpu<2>({rows, k}, ScalarType::Long);
  if (rows == 0) return {logprobs, ids};
  const Tensor dense = with_dense_last_dim(logits);
  dispatch_float(logits.scalar_type(), "logits", [&](auto type) {
    topk_rows(static_cast<decltype(type)>(dense.const_data_ptr()), rows, vocab, dense.stride(0),
              static_cast<int>(k), static_cast<float*>(logprobs.mutable_data_ptr()),
              static_cast<int64_t*>(ids.mutable_data_ptr()));
  });
  return {logprobs, ids};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rgtg_fast, m) {
  m.def("topk_logprobs(Tensor logits, int k) -> (Tensor logprobs, Tensor ids)");
}

STABLE_TORCH_LIBRARY_IMPL(rgtg_fast, CPU, m) { m.impl("topk_logprobs", TORCH_BOX(&topk_logprobs)); }

}  // namespace rgtg
