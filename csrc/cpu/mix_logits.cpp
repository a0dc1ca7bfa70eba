#include "cpu/mix_logits.h"

#define RGTG_KERNELS "cpu/mix_logits_simd.h"
#include "cpu/simd.h"
#include "cpu/tensors.h"

#include <torch/csrc/stable/library.h>

#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

namespace rgtg {
namespace {

constexpr int64_t kMinSlice = 8192;  // tokens per slice; merging shorter ones costs more
constexpr int64_t kGrain = 8192;     // tokens per thread; fewer do not pay for waking it

// One value per row, or none.
template <class T>
const T* per_row(const std::optional<Tensor>& given, int64_t rows, ScalarType type,
                 const char* name, std::optional<Dense<T>>& held) {
  if (!given) return nullptr;
  STD_TORCH_CHECK(given->dim() == 1 && given->sizes()[0] == rows, name, " must be [B]");
  STD_TORCH_CHECK(given->scalar_type() == type, name, " must be ",
                  type == ScalarType::Float ? "float32" : "int64", " here");
  return held.emplace(*given).data;
}

struct MixResults {
  float *scores, *logprobs, *log_norm, *kl;
  int64_t* ids;
};

// Log-sum-exp of a tensor's row; -inf where all of it is.
double log_total(const LogSum<double>& sum) { return sum.reference + std::log(sum.total); }

void write_row(const Mixture& mixture, const MixedSlice* slices, int64_t count, int k, int64_t row,
               const MixResults& out) {
  MixedSlice whole{TopkList(k), {}, {}};
  for (int64_t s = 0; s < count; ++s) {
    for (int i = 0; i < slices[s].best.count; ++i) whole.best.insert(slices[s].best.keys[i]);
    for (int i = 0; i < mixture.count; ++i) whole.sums[i].merge(slices[s].sums[i]);
    whole.tempered.merge(slices[s].tempered);
  }
  bool undefined = false;
  double shift = 0;
  for (int i = 0; i < mixture.count; ++i) {
    const MixedRow& x = mixture.rows[i];
    if (!x.used()) continue;
    undefined |= whole.sums[i].total != whole.sums[i].total;
    shift += x.weight * log_total(whole.sums[i]);
  }
  for (int slot = 0; slot < k; ++slot) {
    const int64_t id = key_id(whole.best.keys[slot]);
    const double own = mixture.rows[0].at(id);
    float mixed = static_cast<float>(own) < mixture.floor ? -kInf<float> : 0.0f;
    double score = 0;
    for (int i = 0; i < mixture.count; ++i) {
      const MixedRow& x = mixture.rows[i];
      const double z = id < x.vocab ? x.at(id) : -kInf<double>;
      const float wide = static_cast<float>(z);
      if ((i == 0 || x.used()) && wide == -kInf<float>) mixed = -kInf<float>;
      if (!x.used()) continue;
      if (mixed != -kInf<float>) mixed += x.weight * wide;
      score += x.weight * whole.sums[i].logprob(z);
    }
    const bool missing = mixed == -kInf<float>;
    score = undefined ? kNaN<double> : missing ? -kInf<double> : score;
    out.ids[row * k + slot] = id;
    out.scores[row * k + slot] = static_cast<float>(score);
    out.logprobs[row * k + slot] = static_cast<float>(whole.sums[0].logprob(own));
  }
  if (mixture.temperature == 0.0f) return;
  const TemperedSum& t = whole.tempered;
  const double norm = t.reference + std::log(t.total);
  const double kl = t.gap / t.total - norm + log_total(whole.sums[0]);
  const bool hopeless = t.total == 0;
  out.log_norm[row] = static_cast<float>(undefined  ? kNaN<double>
                                         : hopeless ? -kInf<double>
                                                    : norm - shift / mixture.temperature);
  out.kl[row] = static_cast<float>(undefined || hopeless ? kNaN<double> : kl);
}

// Slices per row such that rows * slices divides evenly among the threads.
int64_t slices_per_row(int64_t rows, int64_t vocab) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t even = rows >= 8 * threads ? 1 : threads / std::gcd(rows, threads);
  return std::max<int64_t>(1, std::min(even, vocab / kMinSlice));
}

// `mixture_of(row)` gives the row's tensors; the largest of them has `reach` columns.
template <class MixtureOf>
void mix_rows(const MixtureOf& mixture_of, int64_t rows, int64_t reach, int k,
              const MixResults& out) {
  const int64_t count = slices_per_row(rows, reach);
  const int64_t length = (reach + count - 1) / count;
  std::vector<MixedSlice> slices(rows * count, MixedSlice{TopkList(k), {}, {}});
  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t start = task % count * length;
      RGTG_DISPATCH_SIMD(mix_slice, mixture_of(task / count), start,
                         std::min(reach, start + length), slices[task]);
    }
  };
  torch::stable::parallel_for(0, rows * count, std::max<int64_t>(1, kGrain / length), work);
  for (int64_t row = 0; row < rows; ++row) {
    write_row(mixture_of(row), &slices[row * count], count, k, row, out);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mix_logits(
    std::vector<Tensor> logits, const Tensor& weights, int64_t k, std::optional<Tensor> floor,
    std::optional<Tensor> temperature, std::optional<Tensor> seed, std::optional<Tensor> position) {
  const int64_t count = static_cast<int64_t>(logits.size());
  STD_TORCH_CHECK(count >= 1 && count <= kMaxMixed, "logits must be 1 to ", kMaxMixed,
                  " tensors and not ", count);
  STD_TORCH_CHECK(logits[0].dim() == 2, "logits must be [B, V]");
  const int64_t rows = logits[0].sizes()[0], vocab = logits[0].sizes()[1];
  int64_t reach = 0;
  for (Tensor& x : logits) {
    STD_TORCH_CHECK(x.dim() == 2 && x.sizes()[0] == rows, "logits must be [B, V] each");
    dispatch_float(x.scalar_type(), "logits", [](auto) {});
    reach = std::max(reach, x.sizes()[1]);
    x = with_dense_last_dim(x);
  }
  STD_TORCH_CHECK(k >= 1 && k <= std::min<int64_t>(vocab, kMaxCandidates), "k=", k,
                  " must be between 1 and min(V, ", kMaxCandidates, ") with V=", vocab);
  STD_TORCH_CHECK(weights.dim() == 2 && weights.sizes()[0] == rows && weights.sizes()[1] == count &&
                      weights.scalar_type() == ScalarType::Float,
                  "weights must be float32 [B, n] for n logits");
  STD_TORCH_CHECK(seed.has_value() == position.has_value() && (temperature || !seed),
                  "a draw takes temperature, seed and position");
  const Dense<float> w(weights);
  std::optional<Dense<float>> held_floor, held_temperature;
  std::optional<Dense<int64_t>> held_seed, held_position;
  const float* floors = per_row(floor, rows, ScalarType::Float, "floor", held_floor);
  const float* temperatures =
      per_row(temperature, rows, ScalarType::Float, "temperature", held_temperature);
  const int64_t* seeds = per_row(seed, rows, ScalarType::Long, "seed", held_seed);
  const int64_t* positions = per_row(position, rows, ScalarType::Long, "position", held_position);
  const int64_t tempered = temperatures ? rows : 0;
  const Tensor scores = empty_cpu<2>({rows, k}, ScalarType::Float);
  const Tensor ids = empty_cpu<2>({rows, k}, ScalarType::Long);
  const Tensor logprobs = empty_cpu<2>({rows, k}, ScalarType::Float);
  const Tensor log_norm = empty_cpu<1>({tempered}, ScalarType::Float);
  const Tensor kl = empty_cpu<1>({tempered}, ScalarType::Float);
  const auto floats = [](const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); };
  const MixResults out = {floats(scores), floats(logprobs), floats(log_norm), floats(kl),
                          static_cast<int64_t*>(ids.mutable_data_ptr())};
  const auto mixture_of = [&](int64_t row) {
    Mixture mixture = {};
    mixture.count = static_cast<int>(count);
    for (int64_t i = 0; i < count; ++i) {
      const Tensor& x = logits[i];
      const auto* data = static_cast<const char*>(x.const_data_ptr());
      mixture.rows[i] = {data + row * x.stride(0) * x.element_size(), x.scalar_type(), x.sizes()[1],
                         w.data[row * count + i]};
    }
    mixture.floor = floors ? floors[row] : -kInf<float>;
    mixture.temperature = temperatures ? temperatures[row] : 0.0f;
    mixture.noise = seeds != nullptr;
    if (seeds) mixture.seed = seeds[row], mixture.position = positions[row];
    return mixture;
  };
  if (rows > 0) mix_rows(mixture_of, rows, reach, static_cast<int>(k), out);
  return {scores, ids, logprobs, log_norm, kl};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rgtg_fast, m) {
  m.def(
      "mix_logits(Tensor[] logits, Tensor weights, int k, Tensor? floor=None, Tensor? "
      "temperature=None, Tensor? seed=None, Tensor? position=None) -> (Tensor scores, Tensor ids, "
      "Tensor logprobs, Tensor log_norm, Tensor kl)");
}

STABLE_TORCH_LIBRARY_IMPL(rgtg_fast, CPU, m) { m.impl("mix_logits", TORCH_BOX(&mix_logits)); }

}  // namespace rgtg
