// mix_logits on the device, in one launch and one read of each tensor.
//
// A block reads one slice of one row, a tile of each tensor at a time: neighbouring threads take
// neighbouring tokens, since the tensors of a mixture differ in type and alignment. What exceeds a
// threshold that k tokens reach is queued. The block of a row that finishes last selects among what
// its slices left, as in topk_logprobs.
#pragma once

#include "cuda/dot.cuh"
#include "cuda/topk_logprobs.cuh"
#include "gumbel.h"
#include "tempered_sum.h"

namespace rgtg::cuda {

constexpr int kMaxMixed = 4;   // tensors of a mixture
constexpr int kMixBlocks = 2;  // per multiprocessor, as registers allow
constexpr float kLowest = std::numeric_limits<float>::lowest();  // above -inf alone
constexpr int kMixItems = 4;                                     // of a thread in a tile
constexpr int kMixTile = kMixItems * kThreads;
// Keys that may be queued before a tile that is queued whole.
constexpr int kMixKept = kQueue - kMixTile;

static_assert(kMostCandidates <= kMixKept);

// What a slice leaves beside its keys and the sum of the first tensor. Of an even number of words,
// or a workspace that ends with its last byte would not be aligned to 16.
struct alignas(16) MixSummary {
  LogSum<double> others[kMaxMixed - 1];
  TemperedSum tempered;
};

constexpr int64_t kMixWords = kWorkspaceWords + sizeof(MixSummary) / 8;  // per slice

struct MixArguments {
  Operand logits[kMaxMixed];  // [rows, vocab[i]], dense rows
  int64_t vocab[kMaxMixed], stride[kMaxMixed];
  const float* weights;              // [rows, count]
  const float *floor, *temperature;  // [rows] or null
  const int64_t *seed, *position;    // [rows] or null
  int64_t rows;
  int count, k;
  int slices, tiles;     // a row is cut into `slices` blocks of `tiles` tiles
  uint64_t* workspace;   // [rows, slices, kMixWords], aligned to 16 bytes
  uint64_t token;        // nonzero and different for every launch
  float* scores;         // [rows, k]
  int64_t* ids;          // [rows, k]
  float* logprobs;       // [rows, k]
  float *log_norm, *kl;  // [rows] with a temperature
};

// One row of a mixture.
template <int N>
struct MixRow {
  Operand logits[N];
  int64_t first[N], vocab[N];  // first element and columns of the row
  float weight[N], limit[N];   // logits below the limit are impossible
  float temperature;
  bool tempered, noisy;
  int64_t seed, position;

  __device__ MixRow(const MixArguments& a, int64_t row) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      logits[i] = a.logits[i];
      first[i] = row * a.stride[i];
      vocab[i] = a.vocab[i];
      weight[i] = a.weights[row * N + i];
      limit[i] = i == 0 || weight[i] != 0.0f ? kLowest : -kInf<float>;
    }
    if (a.floor != nullptr && a.floor[row] > kLowest) limit[0] = a.floor[row];
    tempered = a.temperature != nullptr;
    noisy = a.seed != nullptr;
    temperature = tempered ? a.temperature[row] : 1.0f;
    seed = noisy ? a.seed[row] : 0;
    position = noisy ? a.position[row] : 0;
  }

  __device__ bool used(int i) const { return weight[i] != 0.0f; }

  __device__ double at(int i, int64_t id) const {
    return id < vocab[i] ? logits[i].at(first[i] + id) : -kInf<double>;
  }

  // Adds tensor i to a mixture. What is -inf stays so: -inf plus inf would be NaN.
  __device__ float mix_in(int i, float mixed, float logit) const {
    if (mixed == -kInf<float> || logit < limit[i]) return -kInf<float>;
    return used(i) ? add_rn(mixed, mul_rn(weight[i], logit)) : mixed;
  }

  // What orders the tokens.
  __device__ float value(float mixed, int64_t id) const {
    if (!noisy || mixed == -kInf<float>) return mixed;
    return add_rn(div_rn(mixed, temperature), gumbel_noise(seed, position, id));
  }
};

// Reads a tile of a tensor from token `id` on, adds it to its log-sum-exp and returns it in fp32.
template <class T>
__device__ void take_tile(const T* row, int64_t vocab, int64_t id, LogSum<double>& sum,
                          float (&tile)[kMixItems]) {
  using Acc = Accumulator<T>;
  Acc x[kMixItems];
  Acc largest = static_cast<Acc>(sum.reference);
#pragma unroll
  for (int j = 0; j < kMixItems; ++j) {
    const int64_t at = id + j * kThreads;
    x[j] = at < vocab ? widen(row[at]) : -kInf<Acc>;
  }
#pragma unroll
  for (int j = 0; j < kMixItems; ++j) {
    largest = Larger()(x[j], largest);  // the latter where the former is NaN
    tile[j] = static_cast<float>(x[j]);
  }
  // -inf minus -inf would be NaN.
  const Acc reference = largest == -kInf<Acc> ? Acc(0) : largest;
  Acc part = 0;
#pragma unroll
  for (int j = 0; j < kMixItems; ++j) part += exp_near(x[j] - reference);
  sum.total = sum.total * exp_near(static_cast<Acc>(sum.reference) - reference) + part;
  sum.reference = largest;
}

template <int N>
__device__ void take_tile(const MixRow<N>& row, int i, int64_t id, LogSum<double>& sum,
                          float (&tile)[kMixItems]) {
  const auto take = [&](const auto* data) {
    take_tile(data + row.first[i], row.vocab[i], id, sum, tile);
  };
  const void* data = row.logits[i].data;
  switch (row.logits[i].element) {
    case Element::fp64:
      return take(static_cast<const double*>(data));
    case Element::fp32:
      return take(static_cast<const float*>(data));
    case Element::bf16:
      return take(static_cast<const bf16*>(data));
    default:
      return take(static_cast<const fp16*>(data));
  }
}

// One thread's part of what a slice leaves.
template <int N>
struct MixSums {
  LogSum<double> sums[N];
  TemperedSum tempered;

  __device__ void add_tempered(const MixRow<N>& row, const float (&mixed)[kMixItems],
                               const float (&first)[kMixItems]) {
    float t[kMixItems], largest = tempered.reference;
#pragma unroll
    for (int j = 0; j < kMixItems; ++j) {
      t[j] = div_rn(mixed[j], row.temperature);
      largest = Larger()(t[j], largest);
    }
    if (largest > tempered.reference) tempered.rebase(largest);
#pragma unroll
    for (int j = 0; j < kMixItems; ++j) {
      if (t[j] == -kInf<float>) continue;
      const float share = exp_near(t[j] - largest);
      tempered.total += share;
      tempered.gap += share * (t[j] - first[j]);
    }
  }
};

// Leaves in the queue at most kSliceKeys keys, all of the slice's k largest among them; sets
// `count` to their number.
template <int N>
__device__ MixSums<N> mix_slice(const MixRow<N>& row, int64_t start, int tiles, int k, Queue& queue,
                                Rounds& rounds, int& count) {
  MixSums<N> sums;
  uint32_t floor = 0;  // candidates exceed it
  if (threadIdx.x == 0) queue.count = 0;
  for (int t = 0; t < tiles; ++t) {
    const int64_t id = start + static_cast<int64_t>(t) * kMixTile + threadIdx.x;
    float mixed[kMixItems] = {}, first[kMixItems], tile[kMixItems];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      take_tile(row, i, id, sums.sums[i], tile);
#pragma unroll
      for (int j = 0; j < kMixItems; ++j) {
        if (i == 0) first[j] = tile[j];
        mixed[j] = row.mix_in(i, mixed[j], tile[j]);
      }
    }
    if (row.tempered) sums.add_tempered(row, mixed, first);
    uint32_t largest = 0;
#pragma unroll
    for (int j = 0; j < kMixItems; ++j) {
      mixed[j] = row.value(mixed[j], id + j * kThreads);
      largest = Larger()(ordered(mixed[j]), largest);
    }
    if (t == 0) {  // of equal tokens in the first tile any may have the smaller id
      floor = cut(1, [&](int) { return largest; }, k, most_of(k), rounds).value - 1;
    }
#pragma unroll
    for (int j = 0; j < kMixItems; ++j) {
      const int64_t at = id + j * kThreads;
      if (ordered(mixed[j]) <= floor || at >= row.vocab[0]) continue;
      queue.push(pack_key(mixed[j], static_cast<uint32_t>(at)));
    }
    count = queue.settle();
    if (t == 0) floor += 1;
    if (count > kMixKept) shrink(queue, k, rounds, count, floor);
  }
  if (count > kSliceKeys) shrink(queue, k, rounds, count, floor);
  return sums;
}

template <int N>
struct MixShared {
  TopkShared<double> topk;
  // Of the threads of a block, then of the slices of a row.
  double reference[2][N + 1][kWarps], total[2][N + 1][kWarps], gap[2][kWarps];
};

// The sum over a block's threads of their parts; `turn` counts the calls.
template <int N>
__device__ void reduce(LogSum<double>& part, int i, int turn, MixShared<N>& shared) {
  const double largest = block_reduce(part.reference, Larger(), shared.reference[turn][i]);
  part.rebase(largest);
  part.total = block_reduce(part.total, Sum(), shared.total[turn][i]);
}

template <int N>
__device__ void reduce(TemperedSum& part, int turn, MixShared<N>& shared) {
  const double largest =
      block_reduce(static_cast<double>(part.reference), Larger(), shared.reference[turn][N]);
  part.rebase(static_cast<float>(largest));
  part.total = block_reduce(part.total, Sum(), shared.total[turn][N]);
  part.gap = block_reduce(part.gap, Sum(), shared.gap[turn]);
}

template <int N>
__device__ void write_token(const MixArguments& a, const MixRow<N>& row, const MixSums<N>& sums,
                            int64_t slot, int64_t id) {
  float mixed = 0;
  double score = 0;
  bool undefined = false;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const double logit = row.at(i, id), logprob = sums.sums[i].logprob(logit);
    mixed = row.mix_in(i, mixed, static_cast<float>(logit));
    if (i == 0) a.logprobs[slot] = static_cast<float>(logprob);
    if (!row.used(i)) continue;
    score += row.weight[i] * logprob;
    undefined |= sums.sums[i].total != sums.sums[i].total;
  }
  if (mixed == -kInf<float>) score = -kInf<double>;
  a.ids[slot] = id;
  a.scores[slot] = undefined ? kNaN<float> : static_cast<float>(score);
}

template <int N>
__device__ void write_policy(const MixArguments& a, const MixRow<N>& row, const MixSums<N>& sums,
                             int64_t at) {
  const TemperedSum& t = sums.tempered;
  const double norm = t.reference + log(t.total);
  double shift = 0, undefined = 0;  // the latter is 0 or NaN
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (!row.used(i)) continue;
    shift += row.weight[i] * (sums.sums[i].reference + log(sums.sums[i].total));
    undefined += sums.sums[i].total - sums.sums[i].total;
  }
  const double own = sums.sums[0].reference + log(sums.sums[0].total);
  const double log_norm = t.total == 0 ? -kInf<double> : norm - shift / row.temperature;
  const double kl = t.total == 0 ? kNaN<double> : t.gap / t.total - norm + own;
  a.log_norm[at] = static_cast<float>(log_norm + undefined);
  a.kl[at] = static_cast<float>(kl + undefined);
}

// Grid: rows * slices blocks.
template <int N>
__global__ void __launch_bounds__(kThreads, kMixBlocks) mix_kernel(MixArguments a) {
  __shared__ MixShared<N> shared;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t at = blockIdx.x / a.slices;
  const int index = static_cast<int>(blockIdx.x % a.slices);
  const MixRow<N> row(a, at);
  Queue& queue = shared.topk.queue;
  Rounds rounds(shared.topk.rounds);

  int count;
  const int64_t start = static_cast<int64_t>(index) * a.tiles * kMixTile;
  MixSums<N> sums = mix_slice(row, start, a.tiles, a.k, queue, rounds, count);
#pragma unroll
  for (int i = 0; i < N; ++i) reduce(sums.sums[i], i, 0, shared);
  if (row.tempered) reduce(sums.tempered, 0, shared);

  if (a.slices > 1) {
    const int64_t blocks = a.rows * a.slices;
    const Workspace slices = Workspace(a.workspace, blocks).of(at * a.slices);
    auto* summaries =
        reinterpret_cast<MixSummary*>(a.workspace + blocks * kWorkspaceWords) + at * a.slices;
    const uint64_t key = thread < count ? queue.key[thread] : kNoKey;
    if (thread < count) slices.keys[key_place(a.slices, index, thread)] = key;
    uint32_t least, largest;  // synchronises between the keys and the token
    rounds.range(1, [&](int) { return static_cast<uint32_t>(key >> 32); }, least, largest);
    if (thread == 0) {
      slices.summary[index] = {sums.sums[0], count, largest};
#pragma unroll
      for (int i = 1; i < N; ++i) summaries[index].others[i - 1] = sums.sums[i];
      summaries[index].tempered = sums.tempered;
    }
    if (!finishes_group(slices.done, a.slices, index, a.token, shared.topk.last)) return;
    sums = {};
    if (thread < a.slices) {
#pragma unroll
      for (int i = 1; i < N; ++i) sums.sums[i] = summaries[thread].others[i - 1];
      sums.tempered = summaries[thread].tempered;
    }
    sums.sums[0] = merge_slices(slices, a.slices, a.k, shared.topk, rounds, count);
#pragma unroll
    for (int i = 1; i < N; ++i) reduce(sums.sums[i], i, 1, shared);
    if (row.tempered) reduce(sums.tempered, 1, shared);
    if (thread < a.slices) slices.done[thread] = 0;
  }

  uint32_t unused = 0;
  if (count > most_of(a.k)) shrink(queue, a.k, rounds, count, unused);
  rank_queue(queue, count, a.k, [&](int rank, uint64_t key) {
    write_token(a, row, sums, at * a.k + rank, key_id(key));
  });
  if (row.tempered && thread == 0) write_policy(a, row, sums, at);
}

// How a row of `reach` columns is cut: `slices` blocks of `stripes` tiles.
inline Slicing mix_slicing(int64_t rows, int64_t reach, int processors) {
  const int64_t all = (reach + kMixTile - 1) / kMixTile;
  const int64_t wanted = std::max<int64_t>(2, kMixBlocks * processors / rows);
  const int64_t slices = std::min({wanted, all, int64_t{kMaxSlices}});
  const int64_t tiles = (all + slices - 1) / slices;
  return {static_cast<int>((all + tiles - 1) / tiles), static_cast<int>(tiles)};
}

inline cudaError_t launch_mix_logits(const MixArguments& a, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(a.rows * a.slices));
  switch (a.count) {
    case 1:
      return launch(mix_kernel<1>, grid, kThreads, stream, a);
    case 2:
      return launch(mix_kernel<2>, grid, kThreads, stream, a);
    case 3:
      return launch(mix_kernel<3>, grid, kThreads, stream, a);
    default:
      return launch(mix_kernel<4>, grid, kThreads, stream, a);
  }
}

}  // namespace rgtg::cuda
