// vocab_reward on the device: k rows gathered from a [V, H] head, each dotted with the row's hidden
// state. One block cannot draw the full bandwidth, so a row's candidates are spread over blocks;
// two share a multiprocessor, so that one loads while the other sums.
#pragma once

#include "cuda/dot.cuh"
#include "cuda/launch.h"

namespace rgtg::cuda {

struct VocabArguments {
  Operand weight;  // [vocab, width], dense rows
  int64_t vocab, width, weight_stride;
  Operand hidden;  // [rows, width], dense rows
  int64_t hidden_stride;
  const int64_t* ids;  // [rows, k]
  int64_t rows, k;
  float* rewards;  // [rows, k]
};

constexpr int kVocabCandidates = 8;
constexpr int kVocabThreads = kVocabCandidates * kWarpsPerDot * 32;

// Grid: rows, groups of kVocabCandidates. The reward of an id outside the vocabulary is NaN: a
// kernel cannot raise.
template <class T>
__global__ void __launch_bounds__(kVocabThreads, 2) vocab_reward_kernel(VocabArguments a) {
  const int64_t row = blockIdx.x;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kVocabCandidates;
  const int64_t last = first + kVocabCandidates < a.k ? first + kVocabCandidates : a.k;
  const T* weight = static_cast<const T*>(a.weight.data);
  candidate_dots<kVocabCandidates, 4, T>(
      first, last, a.width, a.hidden, row * a.hidden_stride,
      [&](int64_t candidate) {
        const int64_t id = a.ids[row * a.k + candidate];
        return id < 0 || id >= a.vocab ? nullptr : weight + id * a.weight_stride;
      },
      [&](int64_t candidate, double dot) {
        a.rewards[row * a.k + candidate] = static_cast<float>(dot);
      });
}

inline cudaError_t launch_vocab_reward(const VocabArguments& a, cudaStream_t stream) {
  return dispatch_element(a.weight.element, [&](auto type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    const dim3 grid(static_cast<unsigned>(a.rows),
                    static_cast<unsigned>((a.k + kVocabCandidates - 1) / kVocabCandidates));
    return launch(vocab_reward_kernel<T>, grid, kVocabThreads, stream, a);
  });
}

}  // namespace rgtg::cuda
