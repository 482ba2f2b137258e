// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Fibers that stand in for the threads of a CUDA block (see cuda_runtime.h beside this).
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string_view>
#include <unordered_map>
#include <vector>

#include <ucontext.h>

#include <cuda_runtime.h>

// What sanitizers are told; null in a program without them. This file itself is never built with them
// (CMake): what it does between the threads of a block is not the kernel's doing.
extern "C" {
[[gnu::weak]] void __tsan_read_range(void* at, unsigned long bytes);
[[gnu::weak]] void __tsan_write_range(void* at, unsigned long bytes);
[[gnu::weak]] void __sanitizer_start_switch_fiber(void** save, void const* bottom, std::size_t);
[[gnu::weak]] void __sanitizer_finish_switch_fiber(void* save, void const** bottom, std::size_t*);
[[gnu::weak]] void __asan_poison_memory_region(void const volatile* at, std::size_t bytes);
[[gnu::weak]] void __asan_unpoison_memory_region(void const volatile* at, std::size_t bytes);
}

namespace kvkeep::cuda {
/// What `extern __shared__` names in our kernels.
alignas(128) uint4 shared_words[227 * 1024 / 16];
}  // namespace kvkeep::cuda

namespace emulation {
namespace {

constexpr std::size_t stack_bytes = 256 * 1024, most_threads = 1024, most_shared = 227 * 1024;

enum class state : char { ready, at_barrier, in_warp, done };

struct copy_started {
  void* to;
  void const* from;
  std::size_t bytes, zeros;
};

/// A stack that is not running: where it was left, and the address sanitizer's book of it. Changes by the
/// compiler's own jumps, for the library's may refuse to leave a stack, or be watched themselves.
struct place {
  void* words[5]{};
  void const* bottom = nullptr;
  std::size_t bytes = 0;
  void* book = nullptr;
};
void leaves(place& from, place const& to) {
  if (__sanitizer_start_switch_fiber != nullptr)
    __sanitizer_start_switch_fiber(&from.book, to.bottom, to.bytes);
}
void arrives(place& at, place& from) {
  if (__sanitizer_finish_switch_fiber != nullptr)
    __sanitizer_finish_switch_fiber(at.book, &from.bottom, &from.bytes);
}
[[noreturn, gnu::noinline]] void jump(place& to) { __builtin_longjmp(to.words, 1); }
[[gnu::noinline]] void change(place& from, place& to) {
  leaves(from, to);
  if (__builtin_setjmp(from.words) == 0) jump(to);
  arrives(from, to);
}

struct fiber {
  state now = state::done;
  place at;
  std::unique_ptr<char[]> stack;
  uint3 thread{};
  unsigned long warp_calls = 0;
  sync_count syncs;
  std::vector<std::vector<copy_started>> groups;
  std::vector<copy_started> open;
  bool fenced = false;                             ///< since its last barrier
  std::vector<unsigned> const* counted = nullptr;  ///< blocks before it, not yet fenced
};

/// Where the first of some threads has come from to meet the others, who have to come from there too: what a
/// device does with those that execute another instruction, nobody promises.
struct meeting_place {
  std::string_view what;
  std::uint64_t code = 0;

  void come(bool first, std::string_view to) {
    std::uint64_t const here = place_in_code != nullptr ? place_in_code() : 0;
    if (first) *this = {to, here};
    if (what != to) fail("threads meet in different operations");
    if (code != here) fail("threads meet from several places of the code");
  }
};

/// Values of a warp's last two exchanges: a lane may be one ahead of the others.
struct warp_box {
  std::uint64_t value[2][warp_size]{};
  unsigned arrived[2]{};
  meeting_place place[2];
};

struct machine {
  calls counted;
  std::vector<fiber> fibers{most_threads};
  std::vector<warp_box> warps{most_threads / warp_size};
  place scheduler;
  std::function<void()> const* body = nullptr;
  fiber* running = nullptr;
  unsigned n = 0, waiting = 0, brought = 0, result = 0, finished = 0;
  meeting_place barrier;
  std::unordered_map<void const*, std::vector<unsigned>>
      tickets;                 ///< blocks that have counted themselves
  std::vector<unsigned> seen;  ///< blocks whose writes the running one may read
  std::minstd_rand order{1};
};
machine& m() {
  static machine instance;
  return instance;
}

void leave() { change(m().running->at, m().scheduler); }

/// First function on a fiber's stack: one thread of one block after another. Never returns.
void enter() {
  arrives(m().running->at, m().scheduler);
  for (;;) {
    (*m().body)();
    fiber& f = *m().running;
    if (standing.overlapped && !f.syncs.previous) fail("ends without waiting for those in front");
    if (!f.open.empty() || !f.groups.empty())
      fail("asynchronous copies are left when the thread ends");
    f.now = state::done;
    ++m().finished;
    leave();
  }
}

[[gnu::noinline]] void start(fiber& f) {
  f.at.bottom = f.stack.get();
  f.at.bytes = stack_bytes;
  ucontext_t to;
  getcontext(&to);
  to.uc_stack.ss_sp = f.stack.get();
  to.uc_stack.ss_size = stack_bytes;
  to.uc_link = nullptr;
  makecontext(&to, enter, 0);
  leaves(m().scheduler, f.at);
  if (__builtin_setjmp(m().scheduler.words) == 0) setcontext(&to);
  arrives(m().scheduler, f.at);
}

/// Lets a fiber run until it waits.
void resume(fiber& f) {
  machine& k = m();
  k.running = &f;
  threadIdx = f.thread;
  standing.thread = static_cast<unsigned>(&f - k.fibers.data());
  standing.syncs = f.syncs;
  bool const started = f.stack != nullptr;
  if (!started) f.stack = std::make_unique_for_overwrite<char[]>(stack_bytes);
  standing.stack = f.stack.get();
  standing.stack_bytes = stack_bytes;
  standing.running = true;
  if (started)
    change(k.scheduler, f.at);
  else
    start(f);
  standing.running = false;
}

/// `shared`: bytes that the launch has asked for. What lies behind them must stay as it is.
void run_block(std::size_t shared) {
  machine& k = m();
  ++standing.block;
  auto* const memory = reinterpret_cast<unsigned char*>(kvkeep::cuda::shared_words);
  if (__asan_unpoison_memory_region != nullptr) __asan_unpoison_memory_region(memory, most_shared);
  std::memset(memory, 0xff, shared);
  std::size_t const behind = std::min(most_shared - shared, std::size_t{256});
  std::memset(memory + shared, 0xa5, behind);
  if (__asan_poison_memory_region != nullptr)
    __asan_poison_memory_region(memory + shared, most_shared - shared);
  for (auto& w : k.warps) w.arrived[0] = w.arrived[1] = 0;
  k.seen.clear();
  k.waiting = k.brought = k.finished = 0;
  unsigned const per_row = blockDim.x, per_plane = per_row * blockDim.y;
  for (unsigned i = 0; i < k.n; ++i) {
    fiber& f = k.fibers[i];
    f.now = state::ready;
    f.warp_calls = 0;
    f.fenced = false;
    f.counted = nullptr;
    f.syncs = {};
    f.thread = {i % per_row, i / per_row % blockDim.y, i / per_plane};
  }
  while (k.finished < k.n) {
    bool moved = false;
    unsigned const first = static_cast<unsigned>(k.order()) % k.n;
    bool const backwards = k.order() % 2 == 0;
    for (unsigned j = 0; j < k.n; ++j) {
      unsigned const i = (first + (backwards ? k.n - j : j)) % k.n;
      fiber& f = k.fibers[i];
      if (f.now != state::ready) continue;
      moved = true;
      resume(f);
    }
    if (!moved) fail("threads wait for others that never come (divergent barrier?)");
  }
  if (__asan_unpoison_memory_region != nullptr) __asan_unpoison_memory_region(memory, most_shared);
  for (std::size_t i = 0; i < behind; ++i)
    if (memory[shared + i] != 0xa5) fail("writes behind the shared memory of its launch");
}

}  // namespace

[[noreturn]] void fail(char const* what) {
  std::fprintf(stderr, "emulated kernel: %s (block %u,%u,%u thread %u,%u,%u)\n%s\n", what,
               blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z,
               standing.kernel);
  std::abort();
}

calls& count() noexcept { return m().counted; }

void run_grid(started const& how, std::function<void()> const& body) {
  machine& k = m();
  k.n = how.block.x * how.block.y * how.block.z;
  k.body = &body;
  blockDim = how.block;
  gridDim = how.grid;
  standing.kernel = how.kernel;
  standing.overlapped = how.overlapped;
  ++standing.launch;
  k.tickets.clear();
  dim3 const grid = how.grid;
  // No order of blocks is promised: from anywhere, either way round.
  std::uint64_t const blocks = std::uint64_t{grid.x} * grid.y * grid.z, first = k.order() % blocks;
  bool const backwards = k.order() % 2 == 0;
  for (std::uint64_t i = 0; i < blocks; ++i) {
    std::uint64_t const b = (first + (backwards ? blocks - i : i)) % blocks;
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / grid.x / grid.y)};
    run_block(how.shared_bytes);
  }
}

int block_barrier(bool value, bool anywhere) {
  machine& k = m();
  if (!anywhere) k.barrier.come(k.waiting == 0, "a barrier");
  ++k.running->syncs.block;
  k.running->fenced = false;
  k.brought += value ? 1 : 0;
  if (++k.waiting < k.n) {
    k.running->now = state::at_barrier;
    leave();
  } else {
    k.result = k.brought;
    k.waiting = k.brought = 0;
    for (unsigned i = 0; i < k.n; ++i)
      if (k.fibers[i].now == state::at_barrier) k.fibers[i].now = state::ready;
    standing.syncs = k.running->syncs;
  }
  return static_cast<int>(k.result);
}

void fence() {
  machine& k = m();
  fiber& f = *k.running;
  f.fenced = true;
  if (f.counted != nullptr) k.seen.insert(k.seen.end(), f.counted->begin(), f.counted->end());
  f.counted = nullptr;
}
void count_block(void const* ticket) {
  machine& k = m();
  fiber& f = *k.running;
  if (!f.fenced) fail("counts its block before a fence");
  auto& blocks = k.tickets[ticket];
  blocks.push_back(standing.block);
  f.counted = &blocks;
}
bool has_seen(unsigned block) {
  auto const& seen = m().seen;
  return std::find(seen.begin(), seen.end(), block) != seen.end();
}

std::uint64_t const* warp_exchange(std::uint64_t value, unsigned mask, char const* what) {
  machine& k = m();
  if (mask != all_lanes) fail(what);
  unsigned const t = linear_thread(), first = t / warp_size * warp_size;
  if (first + warp_size > k.n) fail("a warp operation in a block that ends inside a warp");
  warp_box& w = k.warps[t / warp_size];
  unsigned long const turn = k.running->warp_calls++ % 2;
  w.place[turn].come(w.arrived[turn] == 0, what);
  w.value[turn][t % warp_size] = value;
  w.arrived[turn] |= 1u << (t % warp_size);
  if (w.arrived[turn] != all_lanes) {
    k.running->now = state::in_warp;
    leave();
    return w.value[turn];
  }
  w.arrived[turn] = 0;
  for (unsigned l = 0; l < warp_size; ++l)
    if (k.fibers[first + l].now == state::in_warp) k.fibers[first + l].now = state::ready;
  return w.value[turn];
}
void warp_barrier(unsigned mask) {
  fiber& f = *m().running;
  ++f.syncs.warp;
  warp_exchange(0, mask, "__syncwarp");
  standing.syncs = f.syncs;
}

void let_next_start() {
  fiber& f = *m().running;
  f.syncs.entered = true;
  standing.syncs = f.syncs;
}
void wait_for_previous() {
  fiber& f = *m().running;
  f.syncs.previous = true;
  standing.syncs = f.syncs;
}

void watch_read(void const* at, std::size_t bytes) {
  if (__tsan_read_range != nullptr) __tsan_read_range(const_cast<void*>(at), bytes);
}
void watch_write(void* at, std::size_t bytes) {
  if (__tsan_write_range != nullptr) __tsan_write_range(at, bytes);
}
void start_copy(void* to, void const* from, std::size_t bytes, std::size_t zeros) {
  auto const aligned = [](void const* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; };
  if (!aligned(to) || !aligned(from)) fail("an asynchronous copy of 16 bytes that are not aligned");
  // From here until it has been waited for, the copy may write at any time.
  watch_write(to, bytes + zeros);
  std::memset(to, 0xff, bytes + zeros);
  m().running->open.push_back({to, from, bytes, zeros});
}
void end_copy_group() {
  fiber& f = *m().running;
  f.groups.push_back(std::move(f.open));
  f.open.clear();
}
void wait_copy_groups(int pending) {
  auto& groups = m().running->groups;
  while (groups.size() > static_cast<std::size_t>(pending)) {
    for (copy_started const& c : groups.front()) {
      watch_read(c.from, c.bytes);
      watch_write(c.to, c.bytes + c.zeros);
      if (c.bytes > 0) std::memcpy(c.to, c.from, c.bytes);
      std::memset(static_cast<char*>(c.to) + c.bytes, 0, c.zeros);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace emulation
