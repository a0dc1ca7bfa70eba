// The launches of csrc/cuda/*.cuh for Python: each op takes its arguments struct, field by field.
#include "cuda/mix_logits.cuh"
#include "cuda/prefix_bt_loss.cuh"
#include "cuda/ratio_sample.cuh"
#include "cuda/ratio_step.cuh"
#include "cuda/topk_logprobs.cuh"
#include "cuda/vocab_reward.cuh"

using namespace rgtg::cuda;

#pragma GCC visibility push(default)
extern "C" {

int64_t simt_topk_slicing(int element, int64_t rows, int64_t vocab, int processors, int* stripes) {
  const Slicing cut = topk_slicing(static_cast<Element>(element), rows, vocab, processors);
  *stripes = cut.stripes;
  return cut.slices;
}
uint32_t simt_ordered(float x) { return rgtg::ordered(x); }
bool simt_exceeds(float x, uint32_t code) { return !(x <= bound_of(code)); }
int64_t simt_topk_workspace_words() { return kWorkspaceWords; }

int simt_topk_logprobs(int element, const TopkArguments* a) {
  return launch_topk_logprobs(static_cast<Element>(element), *a, nullptr);
}
int64_t simt_mix_slicing(int64_t rows, int64_t reach, int processors, int* tiles) {
  const Slicing cut = mix_slicing(rows, reach, processors);
  *tiles = cut.stripes;
  return cut.slices;
}
int64_t simt_mix_workspace_words() { return kMixWords; }
int simt_mix_logits(const MixArguments* a) { return launch_mix_logits(*a, nullptr); }
int simt_reward_head(const HeadArguments* a) { return launch_reward_head(*a, nullptr); }
int simt_vocab_reward(const VocabArguments* a) { return launch_vocab_reward(*a, nullptr); }
int simt_ratio_sample(const RatioArguments* a) { return launch_ratio_sample(*a, nullptr); }
int simt_ratio_step(const HeadArguments* head, const RatioArguments* ratio) {
  return launch_ratio_step(*head, *ratio, nullptr);
}
int simt_prefix_bt_loss(int element, const PairArguments* a) {
  return launch_prefix_bt_loss(static_cast<Element>(element), *a, nullptr);
}
}
