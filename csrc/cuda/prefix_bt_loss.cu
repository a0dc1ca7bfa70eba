#include "cuda/prefix_bt_loss.cuh"
#include "cuda/tensors.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace rgtg::cuda {
namespace {

Tensor checked(const Tensor& t, int64_t size, ScalarType type, const char* name) {
  STD_TORCH_CHECK(t.dim() == 1 && t.sizes()[0] == size && t.scalar_type() == type, name,
                  " must have ", size, " elements of the type that the loss is computed in");
  return torch::stable::contiguous(t);
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
  check_same_device(r_chosen, {&r_rejected, &len_chosen, &len_rejected, &weights, &margin});
  check_grid(rows, 1);
  const Element element = element_of(r_chosen, "r_chosen");
  const ScalarType type = element == Element::fp64 ? ScalarType::Double : ScalarType::Float;
  const DeviceGuard guard(r_chosen.get_device());
  const Tensor lengths[] = {checked(len_chosen, rows, ScalarType::Long, "len_chosen"),
                            checked(len_rejected, rows, ScalarType::Long, "len_rejected")};
  const Tensor dense_weights = checked(weights, width, type, "weights");
  const Tensor margins = checked(margin, rows, type, "margin");
  const Tensor loss = empty_on_device_of<1>(r_chosen, {rows}, type);
  const Tensor grad_chosen = empty_on_device_of<2>(r_chosen, {rows, width}, type);
  const Tensor grad_rejected = empty_on_device_of<2>(r_chosen, {rows, width}, type);
  if (rows == 0) return {loss, grad_chosen, grad_rejected};
  const Tensor chosen = with_dense_last_dim(r_chosen), rejected = with_dense_last_dim(r_rejected);
  const PairArguments arguments = {chosen.const_data_ptr(),
                                   rejected.const_data_ptr(),
                                   rows,
                                   width,
                                   chosen.stride(0),
                                   rejected.stride(0),
                                   data<int64_t>(lengths[0]),
                                   data<int64_t>(lengths[1]),
                                   dense_weights.const_data_ptr(),
                                   margins.const_data_ptr(),
                                   label_smoothing,
                                   centering,
                                   first,
                                   loss.mutable_data_ptr(),
                                   grad_chosen.mutable_data_ptr(),
                                   grad_rejected.mutable_data_ptr()};
  check(launch_prefix_bt_loss(element, arguments, current_stream(r_chosen)));
  return {loss, grad_chosen, grad_rejected};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rgtg_fast, CUDA, m) {
  m.impl("prefix_bt_loss", TORCH_BOX(&prefix_bt_loss));
}

}  // namespace rgtg::cuda
