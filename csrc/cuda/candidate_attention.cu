#include "cuda/candidate_attention.cuh"
#include "cuda/tensors.h"

#include <torch/csrc/stable/library.h>

#include <optional>

namespace rgtg::cuda {
namespace {

bool rows_aligned(const Tensor& t) {
  const int64_t per = 16 / (t.scalar_type() == ScalarType::Float ? 4 : 2);
  bool aligned =
      t.sizes()[3] % per == 0 && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int i = 0; i < 3; ++i) aligned = aligned && t.stride(i) % per == 0;
  return aligned;
}

int device_attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

void check_shapes(const Tensor& q, const Tensor& k_prefix, const Tensor& v_prefix,
                  const Tensor& k_self, const Tensor& v_self, bool has_rows) {
  STD_TORCH_CHECK(q.dim() == 4 && k_prefix.dim() == 4 && k_self.dim() == 4,
                  "q and k_self must be [B, k, heads, D], k_prefix [B, Hkv, T, D]");
  const int64_t batch = q.sizes()[0], k = q.sizes()[1], width = q.sizes()[3];
  const int64_t heads = k_prefix.sizes()[1];
  const auto has_shape = [](const Tensor& t, const std::array<int64_t, 4>& wanted) {
    return t.dim() == 4 && std::equal(wanted.begin(), wanted.end(), t.sizes().begin());
  };
  const std::array<int64_t, 4> past{has_rows ? k_prefix.sizes()[0] : batch, heads,
                                    k_prefix.sizes()[2], width};
  const std::array<int64_t, 4> own{batch, k, heads, width};
  STD_TORCH_CHECK(heads > 0 && q.sizes()[2] % heads == 0, "q has ", q.sizes()[2],
                  " heads and k_prefix ", heads, "; pass a multiple");
  STD_TORCH_CHECK(width >= 1 && width <= 256, "heads of ", width, "; pass 1 to 256");
  STD_TORCH_CHECK(has_shape(k_prefix, past) && has_shape(v_prefix, past),
                  "k_prefix and v_prefix must be [B, Hkv, T, D], with rows [N, Hkv, T, D]");
  STD_TORCH_CHECK(has_shape(k_self, own) && has_shape(v_self, own),
                  "k_self and v_self must be [B, k, Hkv, D] with q's B, k and D");
  check_same_device(q, {&k_prefix, &v_prefix, &k_self, &v_self});
  const Element element = element_of(q, "q");
  STD_TORCH_CHECK(element != Element::fp64, "q must be float32, bfloat16 or float16");
  for (const Tensor* t : {&k_prefix, &v_prefix, &k_self, &v_self}) {
    STD_TORCH_CHECK(t->scalar_type() == q.scalar_type(), "keys and values must have q's dtype");
  }
}

// Contiguous: the kernel reads `bounds[row]`.
Tensor checked_bounds(const Tensor& t, const Tensor& q) {
  STD_TORCH_CHECK(
      t.dim() == 1 && t.sizes()[0] == q.sizes()[0] && t.scalar_type() == ScalarType::Long,
      "start, length and rows must be int64 [B]");
  check_same_device(q, {&t});
  return torch::stable::contiguous(t);
}

Tensor candidate_attention(const Tensor& given_q, const Tensor& given_k, const Tensor& given_v,
                           const Tensor& given_own_k, const Tensor& given_own_v,
                           const Tensor& given_start, const Tensor& given_length, double scale,
                           std::optional<int64_t> window, std::optional<double> softcap,
                           std::optional<Tensor> given_rows) {
  check_shapes(given_q, given_k, given_v, given_own_k, given_own_v, given_rows.has_value());
  STD_TORCH_CHECK(!window || *window >= 1, "window must be at least 1");
  STD_TORCH_CHECK(!softcap || *softcap > 0.0, "softcap must be positive");
  const int device = given_q.get_device();
  const DeviceGuard guard(device);
  const Tensor q = with_dense_last_dim(given_q), k_prefix = with_dense_last_dim(given_k);
  const Tensor v_prefix = with_dense_last_dim(given_v);
  const Tensor k_self = with_dense_last_dim(given_own_k), v_self = with_dense_last_dim(given_own_v);
  const int64_t batch = q.sizes()[0], k = q.sizes()[1], query_heads = q.sizes()[2];
  const int64_t width = q.sizes()[3], heads = k_prefix.sizes()[1], prefix = k_prefix.sizes()[2];
  const Tensor out = empty_on_device_of<4>(q, {batch, k, query_heads, width}, q.scalar_type());
  if (out.numel() == 0) return out;
  const Tensor start = checked_bounds(given_start, q), length = checked_bounds(given_length, q);
  std::optional<Tensor> rows;
  if (given_rows) rows = checked_bounds(*given_rows, q);
  const int64_t queries = k * (query_heads / heads), tiles = query_tiles(queries);
  STD_TORCH_CHECK(batch * heads <= std::numeric_limits<int32_t>::max() && tiles <= 65535 &&
                      queries <= kMergeQueries * 65535,
                  "too many rows or candidates: ", batch, ", ", k);
  const int splits = attention_splits(batch * heads * tiles, prefix,
                                      device_attribute(cudaDevAttrMultiProcessorCount, device));
  const int64_t states = splits > 1 ? batch * heads * queries * splits : 0;
  const int64_t columns = padded_width(width);
  const Tensor work = empty_on_device_of<1>(q, {states * (columns + 2)}, ScalarType::Float);
  float* partials = states ? mutable_data<float>(work) : nullptr;
  bool aligned = true;
  for (const Tensor* t : {&q, &k_prefix, &v_prefix, &k_self, &v_self}) {
    aligned = aligned && rows_aligned(*t);
  }
  AttentionArguments a = {};
  a.q = q.const_data_ptr();
  a.k_prefix = k_prefix.const_data_ptr(), a.v_prefix = v_prefix.const_data_ptr();
  a.k_self = k_self.const_data_ptr(), a.v_self = v_self.const_data_ptr();
  a.start = data<int64_t>(start), a.length = data<int64_t>(length);
  a.rows = rows ? data<int64_t>(*rows) : nullptr;
  a.q_row = q.stride(0), a.q_slot = q.stride(1), a.q_head = q.stride(2);
  a.k_row = k_prefix.stride(0), a.k_head = k_prefix.stride(1), a.k_step = k_prefix.stride(2);
  a.v_row = v_prefix.stride(0), a.v_head = v_prefix.stride(1), a.v_step = v_prefix.stride(2);
  a.own_k_row = k_self.stride(0), a.own_k_slot = k_self.stride(1);
  a.own_v_row = v_self.stride(0), a.own_v_slot = v_self.stride(1);
  a.own_k_head = k_self.stride(2), a.own_v_head = v_self.stride(2);
  a.batch = static_cast<int>(batch), a.k = static_cast<int>(k), a.heads = static_cast<int>(heads);
  a.group = static_cast<int>(query_heads / heads), a.width = static_cast<int>(width);
  a.stores = k_prefix.sizes()[0], a.prefix = prefix, a.window = window.value_or(0);
  a.splits = splits;
  a.scale = static_cast<float>(scale), a.softcap = static_cast<float>(softcap.value_or(0.0));
  a.aligned = aligned;
  a.partials = partials, a.peaks = partials + states * columns, a.sums = a.peaks + states;
  a.out = out.mutable_data_ptr();
  const bool overlap = device_attribute(cudaDevAttrComputeCapabilityMajor, device) >= 9;
  check(launch_candidate_attention(element_of(q, "q"), a, overlap, current_stream(q)));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rgtg_fast, CUDA, m) {
  m.impl("candidate_attention", TORCH_BOX(&candidate_attention));
}

}  // namespace rgtg::cuda
