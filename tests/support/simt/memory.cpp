#include "memory.h"

#include <cuda_runtime.h>

#include <map>
#include <random>
#include <set>
#include <utility>
#include <vector>

namespace simt {

namespace {

struct Buffer {
  size_t bytes;
  // At the launch; what all blocks may see; the running block's own view when it last fenced.
  std::vector<unsigned char> start, published, clean;
  std::vector<bool> written;  // by a block that is not running any more, or has fenced
  std::vector<unsigned char> value;
};

struct Delayed {
  void* address;
  size_t size;
  uint64_t value;
  bool overtaken = false;  // by an atomic read of the same block: another may have read before it
};

std::map<unsigned char*, Buffer>& buffers = *new std::map<unsigned char*, Buffer>;
std::vector<Delayed>& delayed = *new std::vector<Delayed>;  // exchanges of the running block
std::vector<Delayed>& at_end = *new std::vector<Delayed>;   // seen by nobody in this launch
using Bytes = std::vector<std::pair<unsigned char*, unsigned char>>;
Bytes& unfenced = *new Bytes;  // nor these; those of the running block begin at own
size_t own = 0;
std::set<int>& observed = *new std::set<int>;  // threads of the running block that may not know yet
bool disagree = false;
Exchange policy = Exchange::at_once;
std::mt19937& coin = *new std::mt19937;

std::pair<unsigned char*, Buffer*> find(const void* address) {
  auto* byte = static_cast<unsigned char*>(const_cast<void*>(address));
  auto after = buffers.upper_bound(byte);
  if (after == buffers.begin()) return {nullptr, nullptr};
  --after;
  if (byte >= after->first + after->second.bytes) return {nullptr, nullptr};
  return {after->first, &after->second};
}

void publish(const Delayed& store) {
  const auto [memory, buffer] = find(store.address);
  memcpy(&buffer->published[static_cast<unsigned char*>(store.address) - memory], &store.value,
         store.size);
}

template <class Fn>
void for_each_write(Fn fn) {
  for (auto& [memory, buffer] : buffers) {
    if (memcmp(memory, buffer.clean.data(), buffer.bytes) == 0) continue;
    for (size_t i = 0; i < buffer.bytes; ++i) {
      if (memory[i] == buffer.clean[i]) continue;
      if (buffer.written[i] && buffer.value[i] != memory[i]) disagree = true;
      buffer.written[i] = true;
      buffer.value[i] = memory[i];
      fn(memory, buffer, i);
    }
  }
}

// What was written and not fenced stays unseen for the rest of the launch.
void withhold() {
  for_each_write([](unsigned char* memory, Buffer& buffer, size_t i) {
    unfenced.emplace_back(memory + i, memory[i]);
    buffer.clean[i] = memory[i];
  });
}

}  // namespace

void add_buffer(void* memory, size_t bytes) {
  if (bytes != 0) buffers[static_cast<unsigned char*>(memory)] = {bytes, {}, {}, {}, {}, {}};
}

void remove_buffer(void* memory) { buffers.erase(static_cast<unsigned char*>(memory)); }

void begin_launch() {
  disagree = false;
  at_end.clear();
  unfenced.clear();
  for (auto& [memory, buffer] : buffers) {
    buffer.start.assign(memory, memory + buffer.bytes);
    buffer.published = buffer.start;
    buffer.written.assign(buffer.bytes, false);
    buffer.value.resize(buffer.bytes);
  }
}

void begin_block(Exchange exchange, unsigned seed) {
  own = unfenced.size();
  policy = exchange;
  coin.seed(seed);
  observed.clear();
  delayed.clear();
  for (auto& [memory, buffer] : buffers) {
    buffer.clean = buffer.start;
    memcpy(memory, buffer.start.data(), buffer.bytes);
  }
}

void end_block() {
  withhold();
  at_end.insert(at_end.end(), delayed.begin(), delayed.end());
  delayed.clear();
}

void end_launch() {
  for (const Delayed& store : at_end) publish(store);
  for (auto& [memory, buffer] : buffers) memcpy(memory, buffer.published.data(), buffer.bytes);
  for (const auto& [byte, value] : unfenced) *byte = value;
}

bool blocks_disagree() { return disagree; }

void fence() {
  for_each_write([](unsigned char* memory, Buffer& buffer, size_t i) {
    buffer.published[i] = buffer.clean[i] = memory[i];
  });
  for (const Delayed& store : delayed) {
    if (!store.overtaken) publish(store);
  }
  std::erase_if(delayed, [](const Delayed& store) { return !store.overtaken; });
  if (observed.erase(thread()) == 0) return;
  for (auto& [memory, buffer] : buffers) memcpy(memory, buffer.published.data(), buffer.bytes);
  for (size_t i = own; i < unfenced.size(); ++i) *unfenced[i].first = unfenced[i].second;
  for (auto& [memory, buffer] : buffers) buffer.clean.assign(memory, memory + buffer.bytes);
}

uint64_t atomic_read(const void* address, size_t size) {
  uint64_t value = 0;
  const auto [memory, buffer] = find(address);
  if (buffer == nullptr) {
    memcpy(&value, address, size);
    return value;
  }
  const size_t at = static_cast<const unsigned char*>(address) - memory;
  if (memcmp(&buffer->published[at], &buffer->start[at], size) != 0) {
    observed.insert(thread());
  }
  memcpy(&value, &buffer->published[at], size);
  for (Delayed& store : delayed) {
    store.overtaken = true;
    if (store.address == address) value = store.value;
  }
  return value;
}

void atomic_write(void* address, size_t size, uint64_t value, bool exchange) {
  memcpy(address, &value, size);
  const auto [memory, buffer] = find(address);
  if (buffer == nullptr) return;
  memcpy(&buffer->clean[static_cast<unsigned char*>(address) - memory], &value, size);
  const bool late = policy == Exchange::at_fence || (policy == Exchange::either && coin() % 2);
  if (exchange && late) {
    delayed.push_back({address, size, value});
  } else {
    if (exchange) withhold();  // whoever sees the exchange may look at once for what went before
    publish({address, size, value});
  }
}

}  // namespace simt
