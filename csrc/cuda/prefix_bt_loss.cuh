// prefix_bt_loss on the device: a block per pair, which first sums the weights of the pair's prefix
// lengths and then reads each reward once. Past its end an answer keeps the reward of its last
// token; that token's gradient collects all those prefix lengths and is stored once, at the end.
#pragma once

#include "cuda/element.cuh"
#include "cuda/launch.h"
#include "cuda/select.cuh"
#include "pair_terms.h"

#include <type_traits>

namespace rgtg::cuda {

// Rewards are of the type launched for; weights, margin and results of its Accumulator.
struct PairArguments {
  const void *chosen, *rejected;  // [rows, width], dense last dimension
  int64_t rows, width, chosen_stride, rejected_stride;
  const int64_t *len_chosen, *len_rejected;  // [rows]
  const void *weights, *margin;              // [width], [rows]
  double smoothing, centering;
  int64_t first;
  void *loss, *grad_chosen, *grad_rejected;  // [rows], [rows, width], [rows, width]
};

// Grid: rows. A pair without prefixes, or with lengths outside 1 .. width, reads nothing and is
// NaN: a kernel cannot raise.
template <class T>
__global__ void __launch_bounds__(kThreads) prefix_bt_loss_kernel(PairArguments a) {
  using Acc = Accumulator<T>;
  __shared__ double sums[4][kWarps];
  const int64_t pair = blockIdx.x, begin = a.first - 1;
  // length - 1 would overflow for -2^63 and pass the check below.
  const auto last = [](int64_t length) { return length > 0 ? length - 1 : -1; };
  const int64_t last_chosen = last(a.len_chosen[pair]), last_rejected = last(a.len_rejected[pair]);
  const int64_t end = (last_chosen > last_rejected ? last_chosen : last_rejected) + 1;
  Acc* grad_chosen = static_cast<Acc*>(a.grad_chosen) + pair * a.width;
  Acc* grad_rejected = static_cast<Acc*>(a.grad_rejected) + pair * a.width;
  Acc& loss = static_cast<Acc*>(a.loss)[pair];
  if (last_chosen < 0 || last_rejected < 0 || end > a.width || end <= begin) {
    for (int64_t at = threadIdx.x; at < a.width; at += kThreads) {
      grad_chosen[at] = grad_rejected[at] = kNaN<Acc>;
    }
    if (threadIdx.x == 0) loss = kNaN<Acc>;
    return;
  }
  const Acc* weights = static_cast<const Acc*>(a.weights);
  double weight_sum = 0;
  for (int64_t at = begin + threadIdx.x; at < end; at += kThreads) weight_sum += weights[at];
  weight_sum = block_reduce(weight_sum, Sum(), sums[0]);

  const PairOptions<Acc> options = {static_cast<const Acc*>(a.margin)[pair],
                                    static_cast<Acc>(a.smoothing), static_cast<Acc>(a.centering),
                                    static_cast<Acc>(1.0 / weight_sum)};
  const T* chosen = static_cast<const T*>(a.chosen) + pair * a.chosen_stride;
  const T* rejected = static_cast<const T*>(a.rejected) + pair * a.rejected_stride;
  PairSums thread;
  for (int64_t at = threadIdx.x; at < a.width; at += kThreads) {
    PairTerms<Acc> term = {};
    if (at >= begin && at < end) {
      const Acc x = widen(chosen[at < last_chosen ? at : last_chosen]);
      const Acc y = widen(rejected[at < last_rejected ? at : last_rejected]);
      term = pair_terms(x, y, weights[at] * options.scale, options);
      thread.loss += term.loss;
      if (at >= last_chosen) thread.grad_chosen += term.grad_chosen;
      if (at >= last_rejected) thread.grad_rejected += term.grad_rejected;
    }
    if (at != last_chosen) grad_chosen[at] = at < last_chosen ? term.grad_chosen : 0;
    if (at != last_rejected) grad_rejected[at] = at < last_rejected ? term.grad_rejected : 0;
  }
  const double total = block_reduce(thread.loss, Sum(), sums[1]);
  const double held_chosen = block_reduce(thread.grad_chosen, Sum(), sums[2]);
  const double held_rejected = block_reduce(thread.grad_rejected, Sum(), sums[3]);
  if (threadIdx.x != 0) return;
  loss = static_cast<Acc>(total);
  grad_chosen[last_chosen] = static_cast<Acc>(held_chosen);
  grad_rejected[last_rejected] = static_cast<Acc>(held_rejected);
}

inline cudaError_t launch_prefix_bt_loss(Element element, const PairArguments& a,
                                         cudaStream_t stream) {
  return dispatch_element(element, [&](auto type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    const dim3 grid(static_cast<unsigned>(a.rows));
    return launch(prefix_bt_loss_kernel<T>, grid, kThreads, stream, a);
  });
}

}  // namespace rgtg::cuda
