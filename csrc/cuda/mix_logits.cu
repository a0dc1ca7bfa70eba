#include "cuda/launch_token.h"
#include "cuda/mix_logits.cuh"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

namespace rgtg::cuda {
namespace {

// One value per row of `logits`, dense, or none.
std::optional<Tensor> per_row(const std::optional<Tensor>& given, const Tensor& logits,
                              ScalarType type, const char* name) {
  if (!given) return std::nullopt;
  STD_TORCH_CHECK(given->dim() == 1 && given->sizes()[0] == logits.sizes()[0], name,
                  " must be [B]");
  STD_TORCH_CHECK(given->scalar_type() == type, name, " must be ",
                  type == ScalarType::Float ? "float32" : "int64", " here");
  check_same_device(logits, {&*given});
  return torch::stable::contiguous(*given);
}

template <class T>
const T* data_or_null(const std::optional<Tensor>& t) {
  return t ? data<T>(*t) : nullptr;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mix_logits(
    std::vector<Tensor> logits, const Tensor& weights, int64_t k, std::optional<Tensor> floor,
    std::optional<Tensor> temperature, std::optional<Tensor> seed, std::optional<Tensor> position) {
  const int64_t count = static_cast<int64_t>(logits.size());
  STD_TORCH_CHECK(count >= 1 && count <= kMaxMixed, "logits must be 1 to ", kMaxMixed,
                  " tensors and not ", count);
  STD_TORCH_CHECK(logits[0].dim() == 2, "logits must be [B, V]");
  const Tensor& first = logits[0];
  const int64_t rows = first.sizes()[0], vocab = first.sizes()[1];
  STD_TORCH_CHECK(k >= 1 && k <= std::min<int64_t>(vocab, kMaxCandidates), "k=", k,
                  " must be between 1 and min(V, ", kMaxCandidates, ") with V=", vocab);
  STD_TORCH_CHECK(weights.dim() == 2 && weights.sizes()[0] == rows && weights.sizes()[1] == count &&
                      weights.scalar_type() == ScalarType::Float,
                  "weights must be float32 [B, n] for n logits");
  STD_TORCH_CHECK(seed.has_value() == position.has_value() && (temperature || !seed),
                  "a draw takes temperature, seed and position");
  const DeviceGuard guard(first.get_device());
  MixArguments a = {};
  int64_t reach = 0;
  for (int64_t i = 0; i < count; ++i) {
    Tensor& x = logits[i];
    STD_TORCH_CHECK(x.dim() == 2 && x.sizes()[0] == rows, "logits must be [B, V] each");
    check_same_device(first, {&x});
    x = with_dense_last_dim(x);
    a.logits[i] = operand(x, "logits");
    a.vocab[i] = x.sizes()[1];
    a.stride[i] = x.stride(0);
    reach = std::max(reach, a.vocab[i]);
  }
  STD_TORCH_CHECK(reach <= kMaxVocab, "V=", reach, " is larger than ", kMaxVocab);
  check_same_device(first, {&weights});
  const Tensor dense_weights = torch::stable::contiguous(weights);
  floor = per_row(floor, first, ScalarType::Float, "floor");
  temperature = per_row(temperature, first, ScalarType::Float, "temperature");
  seed = per_row(seed, first, ScalarType::Long, "seed");
  position = per_row(position, first, ScalarType::Long, "position");
  const int64_t tempered = temperature ? rows : 0;
  const Tensor scores = empty_on_device_of<2>(first, {rows, k}, ScalarType::Float);
  const Tensor ids = empty_on_device_of<2>(first, {rows, k}, ScalarType::Long);
  const Tensor logprobs = empty_on_device_of<2>(first, {rows, k}, ScalarType::Float);
  const Tensor log_norm = empty_on_device_of<1>(first, {tempered}, ScalarType::Float);
  const Tensor kl = empty_on_device_of<1>(first, {tempered}, ScalarType::Float);
  if (rows == 0) return {scores, ids, logprobs, log_norm, kl};
  const auto [slices, tiles] = mix_slicing(rows, reach, processors_of(first.get_device()));
  check_grid(rows * slices, k);
  const Tensor workspace =
      empty_on_device_of<1>(first, {rows * slices * kMixWords}, ScalarType::Long);
  a.weights = data<float>(dense_weights);
  a.floor = data_or_null<float>(floor);
  a.temperature = data_or_null<float>(temperature);
  a.seed = data_or_null<int64_t>(seed);
  a.position = data_or_null<int64_t>(position);
  a.rows = rows, a.count = static_cast<int>(count), a.k = static_cast<int>(k);
  a.slices = slices, a.tiles = tiles;
  a.workspace = mutable_data<uint64_t>(workspace);
  a.token = launch_token();
  a.scores = mutable_data<float>(scores);
  a.ids = mutable_data<int64_t>(ids);
  a.logprobs = mutable_data<float>(logprobs);
  a.log_norm = mutable_data<float>(log_norm);
  a.kl = mutable_data<float>(kl);
  check(launch_mix_logits(a, current_stream(first)));
  return {scores, ids, logprobs, log_norm, kl};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rgtg_fast, CUDA, m) { m.impl("mix_logits", TORCH_BOX(&mix_logits)); }

}  // namespace rgtg::cuda
