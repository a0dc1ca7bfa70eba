// The k largest keys seen so far, in descending order. Insertion is O(k), but on a long row it is
// rare: of V keys in random order about k * log(V / k) enter the list.
#pragma once

#include "ordered_key.h"

namespace rgtg {

struct TopkList {
  int capacity;
  int count = 0;
  uint64_t keys[kMaxCandidates];

  explicit TopkList(int k) : capacity(k) {}

  bool full() const { return count == capacity; }
  // A logit must exceed this to enter a full list, because later ids lose ties.
  float threshold() const { return key_logit(keys[capacity - 1]); }

  void insert(uint64_t key) {
    if (full() && key <= keys[capacity - 1]) return;
    int slot = full() ? capacity - 1 : count++;
    for (; slot > 0 && keys[slot - 1] < key; --slot) keys[slot] = keys[slot - 1];
    keys[slot] = key;
  }
};

}  // namespace rgtg
