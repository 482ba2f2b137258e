// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Fibers on which the threads of a CUDA block run, one at a time (see cuda_runtime.h beside this).
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
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
}

/// A stack, and where it was left. A thread keeps it from its first line to its last.
struct fiber {
  place at;
  std::unique_ptr<char[]> stack = std::make_unique_for_overwrite<char[]>(stack_bytes);
};

struct thread {
  state now = state::done;
  fiber* on = nullptr;  ///< null before its first line and after its last
  uint3 index{};
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
  char const* what = "";
  std::uint64_t code = 0;

  void come(bool first, char const* to) {
    std::uint64_t const here = place_in_code != nullptr ? place_in_code() : 0;
    if (first) *this = {to, here};
    if (what != to && std::strcmp(what, to) != 0) fail("threads meet in different operations");
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
  std::vector<thread> threads{most_threads};
  std::vector<warp_box> warps{most_threads / warp_size};
  std::vector<std::unique_ptr<fiber>> fibers;
  std::vector<fiber*> idle;        ///< those of no thread, left where they begin the next
  place outside, *from = nullptr;  ///< of the kernel; who has changed last
  std::function<void()> const* body = nullptr;
  thread* running = nullptr;
  unsigned n = 0, waiting = 0, brought = 0, result = 0, finished = 0;
  /// Rounds over the threads, from anywhere, either way round: how many of this one had their turn.
  unsigned first = 0, turns = 0;
  bool backwards = false, moved = false;
  meeting_place barrier;
  std::unordered_map<void const*, std::vector<unsigned>>
      tickets;                 ///< blocks that have counted themselves
  std::vector<unsigned> seen;  ///< blocks whose writes the running one may read
  std::minstd_rand order{1};
};
machine the_machine;
machine& m() { return the_machine; }

void begin_round(machine& k) {
  k.turns = 0;
  k.moved = false;
  k.first = static_cast<unsigned>(k.order()) % k.n;
  k.backwards = k.order() % 2 == 0;
}

/// Whose turn it is. @return null when all are done
thread* next_ready() {
  machine& k = m();
  while (k.finished < k.n) {
    if (k.turns == k.n) {
      if (!k.moved) fail("threads wait for others that never come (divergent barrier?)");
      begin_round(k);
    }
    unsigned const turn = k.turns++, i = k.first + (k.backwards ? k.n - turn : turn);
    thread& t = k.threads[i < k.n ? i : i - k.n];
    if (t.now != state::ready) continue;
    k.moved = true;
    return &t;
  }
  return nullptr;
}

/// From now on `t` is the one that runs, on whatever stack.
void stands(thread& t, fiber& on) {
  t.on = &on;
  m().running = &t;
  threadIdx = t.index;
  standing.thread = static_cast<unsigned>(&t - m().threads.data());
  standing.syncs = t.syncs;
  standing.stack = on.stack.get();
  standing.stack_bytes = stack_bytes;
  standing.running = true;
}

void change_to(place& here, place& to) {
  m().from = &here;
  change(here, to);
  arrives(here, *m().from);
}

/// First function on a fiber's stack: one thread after another. Never returns.
void enter() {
  machine& k = m();
  fiber& here = *k.running->on;
  arrives(here.at, *k.from);
  for (;;) {
    (*k.body)();
    thread& t = *k.running;
    if (standing.overlapped && !t.syncs.previous) fail("ends without waiting for those in front");
    if (!t.open.empty() || !t.groups.empty())
      fail("asynchronous copies are left when the thread ends");
    t.now = state::done;
    t.on = nullptr;
    ++k.finished;
    thread* const next = next_ready();
    // Who has not begun does so here: threads that never wait need one stack.
    if (next != nullptr && next->on == nullptr) {
      stands(*next, here);
      continue;
    }
    k.idle.push_back(&here);
    if (next != nullptr) stands(*next, *next->on);
    change_to(here.at, next != nullptr ? next->on->at : k.outside);
  }
}

[[gnu::noinline]] void begin(place& here, fiber& f) {
  f.at.bottom = f.stack.get();
  f.at.bytes = stack_bytes;
  ucontext_t to;
  getcontext(&to);
  to.uc_stack.ss_sp = f.stack.get();
  to.uc_stack.ss_size = stack_bytes;
  to.uc_link = nullptr;
  makecontext(&to, enter, 0);
  m().from = &here;
  leaves(here, f.at);
  if (__builtin_setjmp(here.words) == 0) setcontext(&to);
  arrives(here, *m().from);
}

/// Lets a thread run; comes back when it is the turn of who stands here.
void let_run(thread& t, place& here) {
  machine& k = m();
  if (t.on != nullptr) {
    stands(t, *t.on);
    change_to(here, t.on->at);
  } else if (!k.idle.empty()) {
    fiber& f = *k.idle.back();
    k.idle.pop_back();
    stands(t, f);
    change_to(here, f.at);
  } else {
    fiber& f = *k.fibers.emplace_back(std::make_unique<fiber>());
    stands(t, f);
    begin(here, f);
  }
}

/// The running thread waits while others run.
void wait_for_others() { let_run(*next_ready(), m().running->on->at); }

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
  for (unsigned i = 0; i < k.n; ++i) {
    thread& t = k.threads[i];
    t.now = state::ready;
    t.warp_calls = 0;
    t.fenced = false;
    t.counted = nullptr;
    t.syncs = {};
  }
  begin_round(k);
  let_run(*next_ready(), k.outside);
  standing.running = false;
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
  standing.body = &body;
  standing.overlapped = how.overlapped;
  ++standing.launch;
  k.tickets.clear();
  unsigned const per_row = blockDim.x, per_plane = per_row * blockDim.y;
  for (unsigned i = 0; i < k.n; ++i)
    k.threads[i].index = {i % per_row, i / per_row % blockDim.y, i / per_plane};
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
    wait_for_others();
  } else {
    k.result = k.brought;
    k.waiting = k.brought = 0;
    for (unsigned i = 0; i < k.n; ++i)
      if (k.threads[i].now == state::at_barrier) k.threads[i].now = state::ready;
    standing.syncs = k.running->syncs;
  }
  return static_cast<int>(k.result);
}

void fence() {
  machine& k = m();
  thread& t = *k.running;
  t.fenced = true;
  if (t.counted != nullptr) k.seen.insert(k.seen.end(), t.counted->begin(), t.counted->end());
  t.counted = nullptr;
}
void count_block(void const* ticket) {
  machine& k = m();
  thread& t = *k.running;
  if (!t.fenced) fail("counts its block before a fence");
  auto& blocks = k.tickets[ticket];
  blocks.push_back(standing.block);
  t.counted = &blocks;
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
    wait_for_others();
    return w.value[turn];
  }
  w.arrived[turn] = 0;
  for (unsigned l = 0; l < warp_size; ++l)
    if (k.threads[first + l].now == state::in_warp) k.threads[first + l].now = state::ready;
  return w.value[turn];
}
void warp_barrier(unsigned mask) {
  thread& t = *m().running;
  ++t.syncs.warp;
  warp_exchange(0, mask, "__syncwarp");
  standing.syncs = t.syncs;
}

void let_next_start() {
  thread& t = *m().running;
  t.syncs.entered = true;
  standing.syncs = t.syncs;
}
void wait_for_previous() {
  thread& t = *m().running;
  t.syncs.previous = true;
  standing.syncs = t.syncs;
}

void watch_read(void const* at, std::size_t bytes) {
  if (__tsan_read_range != nullptr) __tsan_read_range(const_cast<void*>(at), bytes);
}
void watch_write(void* at, std::size_t bytes) {
  if (__tsan_write_range != nullptr) __tsan_write_range(at, bytes);
}
void start_copy(void* to, void const* from, std::size_t bytes, std::size_t zeros) {
  auto const aligned = [&](void const* p) {
    return reinterpret_cast<std::uintptr_t>(p) % (bytes + zeros) == 0;
  };
  if (!aligned(to) || !aligned(from)) fail("an asynchronous copy of bytes that are not aligned");
  // From here until it has been waited for, the copy may write at any time.
  watch_write(to, bytes + zeros);
  std::memset(to, 0xff, bytes + zeros);
  m().running->open.push_back({to, from, bytes, zeros});
}
void end_copy_group() {
  thread& t = *m().running;
  t.groups.push_back(std::move(t.open));
  t.open.clear();
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
