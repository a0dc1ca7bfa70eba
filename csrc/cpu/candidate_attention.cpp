#include "cpu/candidate_attention.h"

#include <type_traits>

#define RGTG_KERNELS "cpu/candidate_attention_simd.h"
#include "cpu/simd.h"
#include "cpu/tensors.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <optional>
#include <vector>

namespace rgtg {
namespace {

constexpr int64_t kChunk = 256;    // positions; merging shorter chunks costs more than it gains
constexpr int64_t kGrain = 65536;  // multiply-adds per thread; fewer do not pay for waking it

struct Inputs {
  Tensor q, k_prefix, v_prefix, k_self, v_self;
};

struct LiveRange {
  int64_t begin, count, chunk, chunks;
};

struct Task {
  int64_t row, store, head, chunk, state;  // state: index of the pair's first AttentionState
};

// Chunks depend on the row's own live range alone, so that neither the number of threads nor the
// other rows change a result.
LiveRange live_range(int64_t start, int64_t length, int64_t prefix, std::optional<int64_t> window) {
  const int64_t end = std::clamp<int64_t>(length, 0, prefix);
  int64_t begin = std::max<int64_t>(start, 0);
  // length - window would overflow for a very negative length.
  if (window && end > 0) begin = std::max(begin, length - *window + 1);
  begin = std::min(begin, end);  // a start beyond the end would make an address out of bounds
  const int64_t count = end - begin;
  const int64_t even = (count + kMaxChunks - 1) / kMaxChunks;
  const int64_t chunk = std::max(kChunk, (even + kKeyTile - 1) / kKeyTile * kKeyTile);
  return {begin, count, chunk, std::max<int64_t>(1, (count + chunk - 1) / chunk)};
}

std::vector<LiveRange> live_ranges(const Tensor& start, const Tensor& length, int64_t prefix,
                                   std::optional<int64_t> window) {
  const auto* first = static_cast<const int64_t*>(start.const_data_ptr());
  const auto* last = static_cast<const int64_t*>(length.const_data_ptr());
  std::vector<LiveRange> ranges;
  for (int64_t row = 0; row < start.sizes()[0]; ++row) {
    const int64_t end = last[row * length.stride(0)];
    ranges.push_back(live_range(first[row * start.stride(0)], end, prefix, window));
  }
  return ranges;
}

// The prefix that each query row reads: `rows`, or its own where they are not given.
std::vector<int64_t> stores_of(const std::optional<Tensor>& rows, int64_t batch, int64_t stores) {
  std::vector<int64_t> found(batch);
  const auto* given = rows ? static_cast<const int64_t*>(rows->const_data_ptr()) : nullptr;
  for (int64_t row = 0; row < batch; ++row) {
    found[row] = given ? given[row * rows->stride(0)] : row;
    STD_TORCH_CHECK(found[row] >= 0 && found[row] < stores, "rows[", row, "] is ", found[row],
                    "; pass 0 .. ", stores - 1);
  }
  return found;
}

template <class T>
AttentionHead<T> head_of(const Inputs& x, const Tensor& out, const Task& task, int64_t begin,
                         const AttentionShape& shape) {
  const auto at = [](const Tensor& t, int64_t row, int head_dim, int64_t first_head) {
    return static_cast<const T*>(t.const_data_ptr()) + row * t.stride(0) +
           first_head * t.stride(head_dim);
  };
  const int64_t row = task.row, head = task.head;
  AttentionHead<T> h;
  h.query = at(x.q, row, 2, head * shape.group);
  h.key = at(x.k_prefix, task.store, 1, head) + begin * x.k_prefix.stride(2);
  h.value = at(x.v_prefix, task.store, 1, head) + begin * x.v_prefix.stride(2);
  h.own_key = at(x.k_self, row, 2, head);
  h.own_value = at(x.v_self, row, 2, head);
  h.query_slot = x.q.stride(1), h.query_head = x.q.stride(2);
  h.key_step = x.k_prefix.stride(2), h.value_step = x.v_prefix.stride(2);
  h.own_key_slot = x.k_self.stride(1), h.own_value_slot = x.v_self.stride(1);
  h.out = static_cast<T*>(out.mutable_data_ptr()) + row * out.stride(0) +
          head * shape.group * out.stride(2);
  h.out_slot = out.stride(1);
  return h;
}

template <class T>
Upcoming<T> keys_of(const Inputs& x, const Task& task, const LiveRange& range) {
  const int64_t first = task.chunk * range.chunk;
  const T* keys = static_cast<const T*>(x.k_prefix.const_data_ptr()) +
                  task.store * x.k_prefix.stride(0) + task.head * x.k_prefix.stride(1) +
                  (range.begin + first) * x.k_prefix.stride(2);
  return {keys, std::min(range.chunk, range.count - first)};
}

// A thread's memory, kept from call to call: block 0 for its own work, block 1 (the calling
// thread's) for the states that all threads of the call share.
float* scratch_memory(int which, int64_t floats) {
  struct alignas(64) Line {
    float x[16];
  };
  thread_local std::vector<Line> memory[2];
  const size_t lines = (floats + 15) / 16;
  if (memory[which].size() < lines) memory[which].resize(lines);
  return memory[which].data()->x;
}

template <class T>
void run(const Inputs& x, const Tensor& out, const std::vector<LiveRange>& ranges,
         const std::vector<int64_t>& stores, const AttentionShape& shape) {
  const int64_t heads = x.k_prefix.sizes()[1];
  std::vector<Task> tasks;
  int64_t states = 0, keys = 0;
  for (int64_t row = 0; row < static_cast<int64_t>(ranges.size()); ++row) {
    const int64_t chunks = ranges[row].chunks;
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t c = 0; c < chunks; ++c) tasks.push_back({row, stores[row], head, c, states});
      if (chunks > 1) states += chunks;
      keys += ranges[row].count;
    }
  }
  const int64_t count = static_cast<int64_t>(tasks.size());
  const int64_t state_floats = padded(AttentionState::floats(shape));
  float* shared = states ? scratch_memory(1, states * state_floats) : nullptr;
  const auto finished = std::make_unique<std::atomic<int64_t>[]>(ranges.size() * heads);
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    float* memory = scratch_memory(0, AttentionScratch::floats(shape));
    const AttentionScratch scratch(memory, shape);
    int64_t packed = -1, i = next.fetch_add(1, std::memory_order_relaxed);
    for (int64_t after; i < count; i = after) {
      const Task& task = tasks[i];
      const LiveRange& range = ranges[task.row];
      const int64_t pair = task.row * heads + task.head;
      const auto head = head_of<T>(x, out, task, range.begin, shape);
      after = next.fetch_add(1, std::memory_order_relaxed);
      Upcoming<T> upcoming{nullptr, 0};
      if (after < count) upcoming = keys_of<T>(x, tasks[after], ranges[tasks[after].row]);
      if (pair != packed) RGTG_DISPATCH_SIMD(pack_queries, shape, head, scratch.queries);
      packed = pair;
      float* first = range.chunks > 1 ? shared + task.state * state_floats : scratch.state;
      const AttentionState state(first + task.chunk * state_floats, shape);
      const int64_t begin = task.chunk * range.chunk;
      const int64_t length = std::min(range.chunk, range.count - begin);
      RGTG_DISPATCH_SIMD(attend, shape, head, begin, length, upcoming, scratch, state);
      // The thread that finishes the last chunk of a (row, head) pair merges all of them, in their
      // order: the result must not depend on which thread ended when.
      if (finished[pair].fetch_add(1, std::memory_order_acq_rel) + 1 < range.chunks) continue;
      RGTG_DISPATCH_SIMD(finish, shape, head, first, state_floats, range.chunks, scratch);
    }
  };
  const int64_t multiply_adds = 2 * keys * shape.width * (shape.queries + 2);
  const int64_t useful = std::min<int64_t>(count, 1 + multiply_adds / kGrain);
  const int64_t threads = std::min<int64_t>(useful, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, work);
}

Tensor candidate_attention(const Tensor& q, const Tensor& k_prefix, const Tensor& v_prefix,
                           const Tensor& k_self, const Tensor& v_self, const Tensor& start,
                           const Tensor& length, double scale, std::optional<int64_t> window,
                           std::optional<double> softcap, std::optional<Tensor> rows) {
  STD_TORCH_CHECK(q.dim() == 4 && k_prefix.dim() == 4 && k_self.dim() == 4,
                  "q and k_self must be [B, k, heads, D], k_prefix [B, Hkv, T, D]");
  const int64_t batch = q.sizes()[0], k = q.sizes()[1], query_heads = q.sizes()[2];
  const int64_t width = q.sizes()[3], heads = k_prefix.sizes()[1], prefix = k_prefix.sizes()[2];
  const int64_t stores = rows ? k_prefix.sizes()[0] : batch;
  const auto has_shape = [](const Tensor& t, const std::array<int64_t, 4>& wanted) {
    return t.dim() == 4 && std::equal(wanted.begin(), wanted.end(), t.sizes().begin());
  };
  const std::array<int64_t, 4> past{stores, heads, prefix, width}, own{batch, k, heads, width};
  STD_TORCH_CHECK(heads > 0 && query_heads % heads == 0, "q has ", query_heads,
                  " heads and k_prefix ", heads, "; pass a multiple");
  STD_TORCH_CHECK(
      has_shape(k_prefix, past) && has_shape(v_prefix, past),
      "k_prefix and v_prefix must be [B, Hkv, T, D] with q's B and D, with rows [N, Hkv, T, D]");
  STD_TORCH_CHECK(has_shape(k_self, own) && has_shape(v_self, own),
                  "k_self and v_self must be [B, k, Hkv, D] with q's B, k and D");
  STD_TORCH_CHECK(!window || *window >= 1, "window must be at least 1");
  STD_TORCH_CHECK(!softcap || *softcap > 0.0, "softcap must be positive");
  Tensor out = empty_cpu<4>({batch, k, query_heads, width}, q.scalar_type());
  if (batch * k * query_heads * width == 0) return out;
  for (const Tensor* t : {&start, &length, rows ? &*rows : &length}) {
    STD_TORCH_CHECK(t->dim() == 1 && t->sizes()[0] == batch && t->scalar_type() == ScalarType::Long,
                    "start, length and rows must be int64 [B]");
  }
  for (const Tensor* t : {&k_prefix, &v_prefix, &k_self, &v_self}) {
    STD_TORCH_CHECK(t->scalar_type() == q.scalar_type(), "keys and values must have q's dtype");
  }
  const Inputs inputs{with_dense_last_dim(q), with_dense_last_dim(k_prefix),
                      with_dense_last_dim(v_prefix), with_dense_last_dim(k_self),
                      with_dense_last_dim(v_self)};
  const int64_t group = query_heads / heads;
  const AttentionShape shape{k * group, group, width, static_cast<float>(scale),
                             static_cast<float>(softcap.value_or(0.0))};
  const auto ranges = live_ranges(start, length, prefix, window);
  const auto read = stores_of(rows, batch, stores);
  dispatch_float(q.scalar_type(), "q", [&](auto type) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
    if constexpr (std::is_same_v<T, double>) {
      STD_TORCH_CHECK(false, "q must be float32, bfloat16 or float16");
    } else {
      run<T>(inputs, out, ranges, read, shape);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rgtg_fast, m) {
  m.def(
      "candidate_attention(Tensor q, Tensor k_prefix, Tensor v_prefix, Tensor k_self, "
      "Tensor v_self, Tensor start, Tensor length, float scale, int? window=None, "
      "float? softcap=None, Tensor? rows=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(rgtg_fast, CPU, m) {
  m.impl("candidate_attention", TORCH_BOX(&candidate_attention));
}

}  // namespace rgtg
