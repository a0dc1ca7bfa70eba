#include "memory.h"

#include <cuda_runtime.h>

#include <sys/mman.h>
#include <sys/time.h>
#include <ucontext.h>
#include <unistd.h>
#include <csetjmp>
#include <csignal>

#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

extern "C" unsigned char simt_shared_begin[], simt_shared_end[];

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

namespace {

constexpr size_t kStack = 64 * 1024;
constexpr int kWarp = 32;

enum class State { ready, at_block_barrier, at_warp_barrier, done };
enum class Order { forward, reverse, random };

struct Copy {
  void* to;
  const void* from;
  int bytes, group;
};

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t start;
  jmp_buf context;
  bool started = false;
  State state = State::ready;
  int exchanges = 0, pushes = 0;
  std::vector<Copy> copies;  // that have not arrived
  int group = 0;             // of the copies to come
};

// The lanes that wait in one warp. Two rounds of values, because a lane may enter the next round
// before another has read the last.
struct Warp {
  uint32_t arrived = 0, mask = 0;
  uint64_t values[2][kWarp];
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  int current = 0, live = 0, waiting = 0;
  const std::function<void()>* kernel = nullptr;
  jmp_buf scheduler;
  sigjmp_buf fault;
  std::string error;
  Order policy = Order::forward;
  std::mt19937 random;
  std::map<void*, std::pair<void*, size_t>> mapped;
  uint64_t pushes[3];
};

Machine& machine = *new Machine;

Fiber& current_fiber() { return machine.fibers[machine.current]; }

// Back to the scheduler until it resumes this fiber.
void yield_fiber() {
  if (_setjmp(current_fiber().context) == 0) _longjmp(machine.scheduler, 1);
}

void fail(const std::string& what) {
  if (machine.error.empty()) machine.error = what;
  siglongjmp(machine.fault, 1);
}

void run_fiber() {
  (*machine.kernel)();
  current_fiber().state = State::done;
  --machine.live;
  _longjmp(machine.scheduler, 1);
}

void release_block_barrier() {
  machine.waiting = 0;
  for (Fiber& fiber : machine.fibers) {
    if (fiber.state == State::at_block_barrier) fiber.state = State::ready;
  }
}

void resume(int thread) {
  machine.current = thread;
  const unsigned x = thread % blockDim.x, rest = thread / blockDim.x;
  threadIdx = dim3(x, rest % blockDim.y, rest / blockDim.y);
  Fiber& fiber = machine.fibers[thread];
  if (_setjmp(machine.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.context, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Other garbage for every block, copied from one random page because it is done for every block.
void fill_shared_memory() {
  constexpr size_t kPage = 4096;
  static const std::vector<unsigned char>& garbage = *[] {
    auto* bytes = new std::vector<unsigned char>(2 * kPage);
    for (unsigned char& byte : *bytes) byte = static_cast<unsigned char>(machine.random());
    return bytes;
  }();
  const unsigned char* from = garbage.data() + machine.random() % kPage;
  for (unsigned char* to = simt_shared_begin; to < simt_shared_end; to += kPage) {
    memcpy(to, from, std::min<size_t>(kPage, simt_shared_end - to));
  }
}

void prepare_block(int threads) {
  machine.warps.assign((threads + kWarp - 1) / kWarp, Warp{});
  machine.live = threads;
  machine.waiting = 0;
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = machine.fibers[t];
    fiber.started = false;
    fiber.state = State::ready;
    fiber.exchanges = fiber.pushes = 0;
    fiber.copies.clear();
    fiber.group = 0;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStack;
    makecontext(&fiber.start, run_fiber, 0);
  }
  fill_shared_memory();
}

// Every lane of a warp that is ready, once.
bool run_lanes(int warp, int threads) {
  std::array<int, kWarp> lanes;
  std::iota(lanes.begin(), lanes.end(), 0);
  if (machine.policy == Order::reverse) std::reverse(lanes.begin(), lanes.end());
  if (machine.policy == Order::random) std::shuffle(lanes.begin(), lanes.end(), machine.random);
  bool progress = false;
  for (const int lane : lanes) {
    const int thread = warp * kWarp + lane;
    if (thread >= threads || machine.fibers[thread].state != State::ready) continue;
    resume(thread);
    progress = true;
  }
  return progress;
}

// A warp goes on until the block's barrier stops it (in random order: or chance does), so that
// warps are as far apart as they can be.
bool run_warp(int warp, int threads) {
  bool progress = false;
  while (run_lanes(warp, threads)) {
    progress = true;
    if (machine.policy == Order::random && machine.random() % 2) break;
  }
  return progress;
}

void run_block(int threads) {
  prepare_block(threads);
  std::vector<int> warps(machine.warps.size());
  std::iota(warps.begin(), warps.end(), 0);
  if (machine.policy == Order::reverse) std::reverse(warps.begin(), warps.end());
  while (machine.live > 0) {
    if (machine.policy == Order::random) {
      std::shuffle(warps.begin(), warps.end(), machine.random);
    }
    bool progress = false;
    for (const int warp : warps) progress |= run_warp(warp, threads);
    if (progress) continue;
    if (machine.waiting == 0 || machine.waiting != machine.live) {
      fail("deadlock: some threads wait where the others never come");
    }
    release_block_barrier();
  }
}

void on_signal(int signal) {
  fail(signal == SIGVTALRM ? "a kernel does not end" : "a kernel reached outside its buffers");
}

// While one lives, the signals that a broken kernel causes end the launch. A launch has kSeconds of
// processor time.
class SignalGuard {
 public:
  SignalGuard() {
    struct sigaction action = {};
    action.sa_handler = on_signal;
    for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &action, &before_[i]);
    set_timer(kSeconds);
  }
  ~SignalGuard() {
    set_timer(0);
    for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &before_[i], nullptr);
  }

 private:
  static constexpr int kSignals[3] = {SIGSEGV, SIGBUS, SIGVTALRM}, kSeconds = 4;
  struct sigaction before_[3];

  static void set_timer(int seconds) {
    const itimerval timer = {{0, 0}, {seconds, 0}};
    setitimer(ITIMER_VIRTUAL, &timer, nullptr);
  }
};

}  // namespace

int thread() { return machine.current; }
int lane() { return machine.current % kWarp; }

void count_push() { ++current_fiber().pushes; }

void block_barrier() {
  current_fiber().state = State::at_block_barrier;
  ++machine.waiting;
  yield_fiber();
}

namespace {

void arrive(const Copy& copy) {
  memcpy(copy.to, copy.from, copy.bytes);
  memset(static_cast<char*>(copy.to) + copy.bytes, 0, 16 - copy.bytes);
}

}  // namespace

void copy_async(void* to, const void* from, int bytes) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) {
    fail("a copy of 16 bytes that are not aligned");
  }
  const Copy copy = {to, from, bytes, current_fiber().group};
  const bool at_once =
      machine.policy == Order::reverse || (machine.policy == Order::random && machine.random() % 2);
  if (at_once) return arrive(copy);
  current_fiber().copies.push_back(copy);
}

void commit_copies() { ++current_fiber().group; }

void wait_copies(int left) {
  Fiber& fiber = current_fiber();
  std::vector<Copy> later;
  for (const Copy& copy : fiber.copies) {
    if (copy.group < fiber.group - left) {
      arrive(copy);
    } else {
      later.push_back(copy);
    }
  }
  fiber.copies.swap(later);
}

const uint64_t* exchange(uint32_t mask, uint64_t value) {
  const int me = lane();
  Warp& warp = machine.warps[machine.current / kWarp];
  uint64_t* values = warp.values[current_fiber().exchanges++ % 2];
  if (!(mask >> me & 1)) fail("a lane calls a warp primitive whose mask leaves it out");
  if (warp.arrived != 0 && warp.mask != mask) fail("lanes of one warp call with different masks");
  warp.mask = mask;
  warp.arrived |= 1u << me;
  values[me] = value;
  current_fiber().state = State::at_warp_barrier;
  if (warp.arrived == mask) {
    warp.arrived = 0;
    const int first = machine.current - me;
    int rounds = 0;
    for (int i = 0; i < kWarp; ++i) {
      if (!(mask >> i & 1)) continue;
      Fiber& fiber = machine.fibers[first + i];
      fiber.state = State::ready;
      machine.pushes[0] += fiber.pushes;
      rounds = std::max(rounds, std::exchange(fiber.pushes, 0));
    }
    machine.pushes[1] += rounds;
    machine.pushes[2] += rounds != 0;
  }
  yield_fiber();
  return values;
}

cudaError_t run(dim3 grid, dim3 block, const std::function<void()>& kernel) {
  const int threads = static_cast<int>(block.x * block.y * block.z);
  while (static_cast<int>(machine.fibers.size()) < threads) machine.fibers.emplace_back();
  machine.kernel = &kernel;
  machine.error.clear();
  blockDim = block;
  gridDim = grid;
  std::fill(std::begin(machine.pushes), std::end(machine.pushes), 0);
  std::vector<unsigned> blocks(static_cast<size_t>(grid.x) * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), 0);
  if (machine.policy == Order::reverse) std::reverse(blocks.begin(), blocks.end());
  if (machine.policy == Order::random) std::shuffle(blocks.begin(), blocks.end(), machine.random);
  const Exchange exchange = machine.policy == Order::forward   ? Exchange::at_once
                            : machine.policy == Order::reverse ? Exchange::at_fence
                                                               : Exchange::either;
  const SignalGuard guard;
  if (sigsetjmp(machine.fault, 1) == 0) {
    begin_launch();
    for (const unsigned block : blocks) {
      blockIdx = dim3(block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y);
      begin_block(exchange, machine.random());
      run_block(threads);
      end_block();
    }
    end_launch();
    if (blocks_disagree()) fail("two blocks write different values to one place");
  }
  return machine.error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace simt

#pragma GCC visibility push(default)
extern "C" {

// Order 0 forward, 1 reverse, otherwise random with that seed.
void simt_set_order(unsigned order) {
  using simt::Order;
  simt::machine.policy = order == 0 ? Order::forward : order == 1 ? Order::reverse : Order::random;
  simt::machine.random.seed(order);
}

// Atomic additions of the last launch: how many, how many by the busiest lane of each warp between
// two warp primitives, and how often a warp had any.
void simt_pushes(uint64_t* counts) {
  std::copy(std::begin(simt::machine.pushes), std::end(simt::machine.pushes), counts);
}

const char* simt_error() { return simt::machine.error.c_str(); }

// Memory between pages nobody may touch, filled with 0xFF, which is NaN in every float type. It
// ends at such a page or, with an offset that is not negative, begins that far from an aligned
// address.
void* simt_allocate(size_t bytes, int offset, bool written) {
  const size_t page = sysconf(_SC_PAGESIZE), body = (bytes + 3 * page - 1) / page * page;
  char* base = static_cast<char*>(
      mmap(nullptr, body + 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  memset(base, 0xFF, body + page);
  mprotect(base, page, PROT_NONE);
  mprotect(base + page + body, page, PROT_NONE);
  char* memory = offset < 0 ? base + page + body - bytes : base + 2 * page + offset;
  simt::machine.mapped[memory] = {base, body + 2 * page};
  if (written) simt::add_buffer(memory, bytes);
  return memory;
}

void simt_free(void* memory) {
  const auto found = simt::machine.mapped.find(memory);
  simt::remove_buffer(memory);
  munmap(found->second.first, found->second.second);
  simt::machine.mapped.erase(found);
}
}
