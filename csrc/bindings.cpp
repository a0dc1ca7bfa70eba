// The Python face: op schemas, what was built, and hooks for tests. The only file that knows
// pybind11.
#include "cpu/dispatch.h"
#include "gumbel.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <torch/csrc/stable/library.h>

#include <array>
#include <string>

STABLE_TORCH_LIBRARY(rgtg_fast, m) {
  m.def("topk_logprobs(Tensor logits, int k) -> (Tensor logprobs, Tensor ids)");
  m.def("reward_head(Tensor hidden, Tensor weight, Tensor? bias=None) -> Tensor");
  m.def("vocab_reward(Tensor hidden, Tensor weight, Tensor ids) -> Tensor");
  m.def(
      "ratio_sample(Tensor logprobs, Tensor rewards, Tensor ids, Tensor beta, Tensor temperature, "
      "Tensor seed, Tensor position, bool do_sample) -> (Tensor slot, Tensor logq)");
  m.def(
      "ratio_keep(Tensor logprobs, Tensor ids, Tensor beta, Tensor temperature, Tensor seed, "
      "Tensor position, bool do_sample, float low, float high) -> Tensor");
  m.def(
      "ratio_step(Tensor logprobs, Tensor hidden, Tensor weight, Tensor ids, Tensor beta, "
      "Tensor temperature, Tensor seed, Tensor position, bool do_sample, Tensor? bias=None) -> "
      "(Tensor slot, Tensor rewards, Tensor logq)");
  m.def(
      "prefix_bt_loss(Tensor r_chosen, Tensor r_rejected, Tensor len_chosen, Tensor len_rejected, "
      "Tensor weights, Tensor margin, float label_smoothing, float centering, int first) -> "
      "(Tensor loss, Tensor grad_chosen, Tensor grad_rejected)");
  m.def(
      "candidate_attention(Tensor q, Tensor k_prefix, Tensor v_prefix, Tensor k_self, "
      "Tensor v_self, Tensor start, Tensor length, float scale, int? window=None, "
      "float? softcap=None) -> Tensor");
}

namespace {

#define RGTG_STRING_(x) #x
#define RGTG_STRING(x) RGTG_STRING_(x)

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = "g++ " __VERSION__;
  info["torch"] = RGTG_STRING(RGTG_BUILD_TORCH);
#ifdef RGTG_CUDA_ARCHS
  info["cuda_archs"] = RGTG_STRING(RGTG_CUDA_ARCHS);
  info["nvcc"] = RGTG_STRING(RGTG_NVCC);
#else
  info["cuda_archs"] = pybind11::none();
  info["nvcc"] = pybind11::none();
#endif
  return info;
}

std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  const rgtg::Philox4x32 out =
      rgtg::philox4x32_10({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
  return {out.word[0], out.word[1], out.word[2], out.word[3]};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of rgtg_fast; importing it registers torch.ops.rgtg_fast.*";
  m.def("build_info", &build_info, "Compilers, torch and CUDA architectures of this build.");
  m.def("philox4x32_10", &philox, "counter (4 words), key (2 words) -> 4 words");
  m.def("gumbel_from_word", &rgtg::gumbel_from_word, "32 random bits -> Gumbel noise");
  m.def("simd_level", &rgtg::simd_level_name, "Instruction set in use.");
  m.def("simd_levels", &rgtg::simd_levels, "Instruction sets this machine can run.");
  m.def("set_simd_level", &rgtg::set_simd_level, "Use a lower instruction set, for tests.");
}
