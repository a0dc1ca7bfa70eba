// The checked arguments of a draw, for ratio_sample and ratio_step.
#pragma once

#include "cuda/ratio_row.cuh"
#include "cuda/tensors.h"

namespace rgtg::cuda {

// Holds the tensors that `arguments` points to.
struct RatioInputs {
  Tensor logprobs, rewards, ids, beta, temperature, seed, position, slot, logq;
  RatioArguments arguments;

  // logprobs, rewards, ids [B, k], the others [B].
  RatioInputs(const Tensor& logprobs, const Tensor& rewards, const Tensor& ids, const Tensor& beta,
              const Tensor& temperature, const Tensor& seed, const Tensor& position, bool do_sample)
      : logprobs(checked(logprobs, logprobs, 2, ScalarType::Float, "logprobs")),
        rewards(checked(rewards, logprobs, 2, ScalarType::Float, "rewards")),
        ids(checked(ids, logprobs, 2, ScalarType::Long, "ids")),
        beta(checked(beta, logprobs, 1, ScalarType::Float, "beta")),
        temperature(checked(temperature, logprobs, 1, ScalarType::Float, "temperature")),
        seed(checked(seed, logprobs, 1, ScalarType::Long, "seed")),
        position(checked(position, logprobs, 1, ScalarType::Long, "position")),
        slot(empty_on_device_of<1>(logprobs, {logprobs.sizes()[0]}, ScalarType::Long)),
        logq(empty_on_device_of<2>(logprobs, {logprobs.sizes()[0], logprobs.sizes()[1]},
                                   ScalarType::Float)) {
    const int64_t rows = logprobs.sizes()[0], k = logprobs.sizes()[1];
    check_grid(rows, k);
    arguments = {data<float>(this->logprobs),
                 data<float>(this->rewards),
                 data<int64_t>(this->ids),
                 data<float>(this->beta),
                 data<float>(this->temperature),
                 data<int64_t>(this->seed),
                 data<int64_t>(this->position),
                 rows,
                 k,
                 do_sample,
                 mutable_data<int64_t>(slot),
                 mutable_data<float>(logq)};
  }

 private:
  // [B] or [B, k] like `model`, dense.
  static Tensor checked(const Tensor& t, const Tensor& model, int dims, ScalarType type,
                        const char* name) {
    bool matches = t.dim() == dims && model.dim() == 2;
    for (int d = 0; matches && d < dims; ++d) matches = t.sizes()[d] == model.sizes()[d];
    STD_TORCH_CHECK(matches, name, " must be ", dims == 2 ? "[B, k]" : "[B]", " like logprobs");
    STD_TORCH_CHECK(t.scalar_type() == type, name, " must be ",
                    type == ScalarType::Float ? "float32" : "int64", " here");
    check_same_device(model, {&t});
    return torch::stable::contiguous(t);
  }
};

}  // namespace rgtg::cuda
