// As ops.cpp, of the op that takes longest to compile.
#include "cuda/candidate_attention.cuh"

using namespace rgtg::cuda;

#pragma GCC visibility push(default)
extern "C" {

int simt_attention_splits(int64_t programs, int64_t prefix, int64_t processors) {
  return attention_splits(programs, prefix, processors);
}
// Positions of a tile, tiles in the ring, and bytes of shared memory, in bf16 of width 128.
void simt_attention_tile(bool few, int* keys, int* stages, int* bytes) {
  using Few = AttentionTile<rgtg::bf16, 128, 4>;
  using Many = AttentionTile<rgtg::bf16, 128, 1>;
  *keys = few ? Few::kKeys : Many::kKeys;
  *stages = few ? Few::kStages : Many::kStages;
  *bytes = few ? Few::kBytes : Many::kBytes;
}

int simt_candidate_attention(int element, const AttentionArguments* a) {
  return launch_candidate_attention(static_cast<Element>(element), *a, true, nullptr);
}
}
