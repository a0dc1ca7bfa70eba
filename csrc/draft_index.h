// Guesses the next tokens of a text from what followed the same tokens before: in its prompt, and
// in the other texts of a run. Guesses are checked by whoever asked, so a wrong one costs time
// only.
//
// After each suffix of up to `order` tokens the tokens that followed are counted. The estimate for
// the next token interpolates the suffixes' counts, the longest last:
//   p_m(v) = (count_m(v) + p_{m-1}(v)) / (total_m + 1),   p_0 = 0.
// Sampled tokens are argmax(log p + g) with the noise g that the text itself is drawn with: a guess
// with the same noise is right more often than the likeliest token.
#pragma once

#include "gumbel.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

namespace rgtg {

class DraftIndex {
 public:
  // `order`: longest suffix counted. `capacity`: suffixes kept; where there are more, those seen
  // once are dropped, and if that does not free half, all are.
  DraftIndex(int64_t order, int64_t capacity) : order_(order), capacity_(capacity) {}

  // Tokens that follow in text `row`; its first call starts it.
  void extend(int64_t row, const std::vector<int64_t>& ids) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<int64_t>& tail = tails_[row];
    for (const int64_t id : ids) {
      for (const uint64_t key : suffixes(tail)) counts_[key].add(id);
      append(tail, id);
    }
    if (static_cast<int64_t>(counts_.size()) > capacity_) shrink();
  }

  // Text `row` has ended. What followed what in it stays known.
  void leave(int64_t row) {
    const std::lock_guard<std::mutex> lock(mutex_);
    tails_.erase(row);
  }

  // Up to `n` guesses for what follows in text `row` with the tokens `ahead` behind it, from
  // `position` of its answer on; fewer, where nothing known goes on.
  std::vector<int64_t> draft(int64_t row, int64_t n, int64_t position, int64_t seed, bool do_sample,
                             const std::vector<int64_t>& ahead) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<int64_t> guesses;
    const auto found = tails_.find(row);
    if (found == tails_.end()) return guesses;
    std::vector<int64_t> tail = found->second;
    for (const int64_t id : ahead) append(tail, id);
    while (static_cast<int64_t>(guesses.size()) < n) {
      const std::vector<std::pair<int64_t, double>> next = estimate(tail);
      if (next.empty()) break;
      guesses.push_back(
          best(next, position + static_cast<int64_t>(guesses.size()), seed, do_sample));
      append(tail, guesses.back());
    }
    return guesses;
  }

  int64_t size() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return static_cast<int64_t>(counts_.size());
  }

 private:
  struct Counts {
    int64_t total = 0;
    std::vector<std::pair<int64_t, int64_t>> of;  // token, times it followed

    void add(int64_t id) {
      ++total;
      for (auto& [token, count] : of) {
        if (token == id) {
          ++count;
          return;
        }
      }
      of.emplace_back(id, 1);
    }
  };

  void append(std::vector<int64_t>& tail, int64_t id) const {
    tail.push_back(id);
    if (static_cast<int64_t>(tail.size()) > order_) tail.erase(tail.begin());
  }

  // A hash of each suffix, the shortest first. Two that collide share their counts: a worse guess.
  static std::vector<uint64_t> suffixes(const std::vector<int64_t>& tail) {
    std::vector<uint64_t> keys;
    uint64_t key = 0x9E3779B97F4A7C15u;
    for (auto id = tail.rbegin(); id != tail.rend(); ++id) {
      key = (key ^ static_cast<uint64_t>(*id)) * 0xBF58476D1CE4E5B9u;
      key ^= key >> 29;
      keys.push_back(key);
    }
    return keys;
  }

  // Tokens that may follow, with their estimated probabilities.
  std::vector<std::pair<int64_t, double>> estimate(const std::vector<int64_t>& tail) const {
    std::vector<std::pair<int64_t, double>> next;
    for (const uint64_t key : suffixes(tail)) {
      const auto found = counts_.find(key);
      if (found == counts_.end()) break;  // no longer suffix is known either
      const double scale = 1.0 / (static_cast<double>(found->second.total) + 1.0);
      for (auto& [token, p] : next) p *= scale;
      for (const auto& [token, count] : found->second.of) {
        const double p = static_cast<double>(count) * scale;
        const auto known = std::find_if(next.begin(), next.end(),
                                        [id = token](const auto& one) { return one.first == id; });
        if (known == next.end()) {
          next.emplace_back(token, p);
        } else {
          known->second += p;
        }
      }
    }
    return next;
  }

  static int64_t best(const std::vector<std::pair<int64_t, double>>& next, int64_t position,
                      int64_t seed, bool do_sample) {
    int64_t choice = next.front().first;
    double highest = -INFINITY;
    for (const auto& [token, p] : next) {
      const double noise = do_sample ? gumbel_noise(seed, position, token) : 0.0;
      const double value = std::log(p) + noise;
      if (value > highest || (value == highest && token < choice)) {
        highest = value;
        choice = token;
      }
    }
    return choice;
  }

  void shrink() {
    std::erase_if(counts_, [](const auto& one) { return one.second.total == 1; });
    if (static_cast<int64_t>(counts_.size()) > capacity_ / 2) counts_.clear();
  }

  int64_t order_, capacity_;
  mutable std::mutex mutex_;
  std::unordered_map<uint64_t, Counts> counts_;
  std::unordered_map<int64_t, std::vector<int64_t>> tails_;  // the last `order` tokens of each text
};

}  // namespace rgtg
