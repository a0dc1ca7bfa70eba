#include "pair_terms.h"

#define RGTG_KERNELS "cpu/prefix_bt_loss_simd.h"
#include "cpu/simd.h"
#include "cpu/tensors.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <type_traits>
#include <vector>

namespace rgtg {
namespace {

constexpr int64_t kGrain = 4096;  // prefixes per thread; fewer do not pay for waking it

template <class Acc>
struct Batch {
  int64_t width, first;
  const int64_t *len_chosen, *len_rejected;  // [N]
  const Acc *weights, *margin;               // [L], [N]
  std::vector<double> weight_below;          // [L + 1], sums of the weights before a position
  Acc smoothing, centering;
  Acc *loss, *grad_chosen, *grad_rejected;  // [N], [N, L], [N, L]
};

template <class Acc, class T>
void pair_loss(const Batch<Acc>& b, int64_t n, const T* chosen, const T* rejected) {
  const int64_t own[] = {b.len_chosen[n], b.len_rejected[n]};
  const auto [shorter, longer] = std::minmax(own[0], own[1]);
  Acc *grad_chosen = b.grad_chosen + n * b.width, *grad_rejected = b.grad_rejected + n * b.width;
  const bool undefined = shorter < 1 || longer > b.width || longer < b.first;
  std::fill_n(grad_chosen, b.width, undefined ? kNaN<Acc> : Acc(0));
  std::fill_n(grad_rejected, b.width, undefined ? kNaN<Acc> : Acc(0));
  b.loss[n] = kNaN<Acc>;
  if (undefined) return;
  const int64_t begin = b.first - 1, both = std::max(begin, shorter);
  const Acc scale = static_cast<Acc>(1.0 / (b.weight_below[longer] - b.weight_below[begin]));
  const PairOptions<Acc> options = {b.margin[n], b.smoothing, b.centering, scale};
  double loss = 0;
  if (begin < both) {
    loss += RGTG_DISPATCH_SIMD(pair_segment, chosen + begin, rejected + begin, b.weights + begin,
                               both - begin, options, grad_chosen + begin, grad_rejected + begin)
                .loss;
  }
  if (both < longer) {
    const bool holds_chosen = own[0] < own[1];
    const int64_t last = shorter - 1;
    const PairSums rest = RGTG_DISPATCH_SIMD(
        pair_segment, chosen + (holds_chosen ? last : both),
        rejected + (holds_chosen ? both : last), b.weights + both, longer - both, options,
        holds_chosen ? nullptr : grad_chosen + both, holds_chosen ? grad_rejected + both : nullptr);
    loss += rest.loss;
    Acc& held = (holds_chosen ? grad_chosen : grad_rejected)[last];
    held = static_cast<Acc>(held + (holds_chosen ? rest.grad_chosen : rest.grad_rejected));
  }
  b.loss[n] = static_cast<Acc>(loss);
}

template <class Acc>
const Acc* values(const Tensor& t) {
  return static_cast<const Acc*>(t.const_data_ptr());
}

void check_vector(const Tensor& t, int64_t size, ScalarType type, const char* name) {
  STD_TORCH_CHECK(t.dim() == 1 && t.sizes()[0] == size && t.scalar_type() == type, name,
                  " must have ", size, " elements of the type that the loss is computed in");
}

std::tuple<Tensor, Tensor, Tensor> prefix_bt_loss(const Tensor& r_chosen, const Tensor& r_rejected,
                                                  const Tensor& len_chosen,
                                                  const Tensor& len_rejected, const Tensor& weights,
                                                  const Tensor& margin, double label_smoothing,
                                                  double centering, int64_t first) {
  STD_TORCH_CHECK(r_chosen.dim() == 2 && r_rejected.dim() == 2, "rewards must be [N, L]");
  const int64_t rows = r_chosen.sizes()[0], width = r_chosen.sizes()[1];
  STD_TORCH_CHECK(r_rejected.sizes()[0] == rows && r_rejected.sizes()[1] == width &&
                      r_rejected.scalar_type() == r_chosen.scalar_type(),
                  "r_rejected must be like r_chosen");
  STD_TORCH_CHECK(first >= 1, "first must be at least 1");
  const bool wide = r_chosen.scalar_type() == ScalarType::Double;
  const ScalarType type = wide ? ScalarType::Double : ScalarType::Float;
  check_vector(len_chosen, rows, ScalarType::Long, "len_chosen");
  check_vector(len_rejected, rows, ScalarType::Long, "len_rejected");
  check_vector(weights, width, type, "weights");
  check_vector(margin, rows, type, "margin");
  Tensor loss = empty_cpu<1>({rows}, type);
  Tensor grad_chosen = empty_cpu<2>({rows, width}, type);
  Tensor grad_rejected = empty_cpu<2>({rows, width}, type);
  const Tensor chosen = with_dense_last_dim(r_chosen), rejected = with_dense_last_dim(r_rejected);
  const Tensor lengths[] = {torch::stable::contiguous(len_chosen),
                            torch::stable::contiguous(len_rejected)};
  const Tensor dense_weights = torch::stable::contiguous(weights);
  const Tensor margins = torch::stable::contiguous(margin);
  dispatch_float(r_chosen.scalar_type(), "r_chosen", [&](auto typed) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
    using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;
    Batch<Acc> batch = {width,
                        first,
                        values<int64_t>(lengths[0]),
                        values<int64_t>(lengths[1]),
                        values<Acc>(dense_weights),
                        values<Acc>(margins),
                        std::vector<double>(width + 1),
                        static_cast<Acc>(label_smoothing),
                        static_cast<Acc>(centering),
                        static_cast<Acc*>(loss.mutable_data_ptr()),
                        static_cast<Acc*>(grad_chosen.mutable_data_ptr()),
                        static_cast<Acc*>(grad_rejected.mutable_data_ptr())};
    for (int64_t i = 0; i < width; ++i) {
      batch.weight_below[i + 1] = batch.weight_below[i] + batch.weights[i];
    }
    const T *c = values<T>(chosen), *r = values<T>(rejected);
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width));
    torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        pair_loss(batch, n, c + n * chosen.stride(0), r + n * rejected.stride(0));
      }
    });
  });
  return {loss, grad_chosen, grad_rejected};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rgtg_fast, m) {
  m.def(
      "prefix_bt_loss(Tensor r_chosen, Tensor r_rejected, Tensor len_chosen, Tensor len_rejected, "
      "Tensor weights, Tensor margin, float label_smoothing, float centering, int first) -> "
      "(Tensor loss, Tensor grad_chosen, Tensor grad_rejected)");
}

STABLE_TORCH_LIBRARY_IMPL(rgtg_fast, CPU, m) {
  m.impl("prefix_bt_loss", TORCH_BOX(&prefix_bt_loss));
}

}  // namespace rgtg
