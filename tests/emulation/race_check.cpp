// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Finds races and uninitialised shared memory in emulated kernels: what compute-sanitizer's racecheck and
/// initcheck do on a device. Kernels are compiled with the compiler's thread instrumentation, which calls
/// a function here at every access, and linked to this file instead of the sanitizer's own runtime: that
/// one knows locks and threads, but not that a block's threads meet at barriers, which is all the order
/// there is. Two accesses of a byte, one of them a write, are in order if
///   - they are of different launches, or of one thread;
///   - they are of one block, with a barrier between them;
///   - they are of blocks that count themselves at a ticket, with fences, before and after it;
///   - they are of one warp, with a __syncwarp between them.
/// An exchange (shuffle, ballot, product) orders nothing: it promises nothing of memory.
///
/// And it tells where in the code threads meet, for they have to meet in one place, as synccheck says; and when a
/// kernel touches the host's stack, which no device can.
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <unordered_map>

#include <pthread.h>

#include <cuda_runtime.h>

#include "instrumented.hpp"

extern "C" char const __executable_start;  // the linker's
namespace kvkeep::cuda {
extern uint4 shared_words[227 * 1024 / 16];
}

namespace {

using emulation::standing;

/// Who has accessed a byte, and when. Small, for there are three to every byte that kernels touch.
struct record {
  unsigned launch = 0, block = 0, warp_syncs = 0;
  unsigned block_syncs : 21 = 0, thread : 10 = 0, atomic : 1 = 0;

  static record now(bool atomic) {
    record r;
    r.launch = standing.launch;
    r.block = standing.block;
    r.warp_syncs = standing.syncs.warp;
    r.block_syncs = standing.syncs.block & 0x1fffffu;
    r.thread = standing.thread & 0x3ffu;
    r.atomic = atomic ? 1 : 0;
    return r;
  }
  bool same_thread(record const& b) const { return block == b.block && thread == b.thread; }
  /// Whether this comes before `b`, which is the present.
  bool before(record const& b) const {
    if (launch != b.launch || same_thread(b)) return true;
    if (block != b.block) return emulation::has_seen(block);
    return block_syncs != b.block_syncs ||
           (thread / emulation::warp_size == b.thread / emulation::warp_size &&
            warp_syncs != b.warp_syncs);
  }
};

/// A byte: its last write, and two threads that have read it since, for one of them may be the next writer.
struct cell {
  record write, read[2];
};
constexpr std::uintptr_t page_bytes = 4096;
using page = std::array<cell, page_bytes>;

cell& cell_of(std::uintptr_t at) {
  static std::unordered_map<std::uintptr_t, std::unique_ptr<page>> pages;
  static std::uintptr_t last = 0;
  static page* last_page = nullptr;
  if (at / page_bytes != last || last_page == nullptr) {
    auto& p = pages[at / page_bytes];
    if (!p) p = std::make_unique<page>();
    last = at / page_bytes;
    last_page = p.get();
  }
  return (*last_page)[at % page_bytes];
}

std::uintptr_t shared_offset(std::uintptr_t at) {
  return at - reinterpret_cast<std::uintptr_t>(kvkeep::cuda::shared_words);
}

/// Whether an address is on the stack of the thread that asks first: the host's.
bool on_host_stack(std::uintptr_t at) {
  static std::uintptr_t const end = [] {
    pthread_attr_t a;
    void* p = nullptr;
    std::size_t bytes = 0;
    if (pthread_getattr_np(pthread_self(), &a) != 0) return std::uintptr_t{0};
    pthread_attr_getstack(&a, &p, &bytes);
    pthread_attr_destroy(&a);
    return reinterpret_cast<std::uintptr_t>(p) + bytes;
  }();
  constexpr std::uintptr_t most = 8 << 20;
  return end - at - 1 < most;
}

/// One access of a byte by the running thread.
struct watcher {
  std::uintptr_t at;
  record now;
  void const* code;
  bool shared = shared_offset(at) < sizeof kvkeep::cuda::shared_words;
  cell& c = cell_of(at);

  void read() const {
    if (shared && c.write.block != now.block)
      report("read of what the block has not written", nullptr);
    if (!ordered(c.write)) report("write, then read", &c.write);
    // One whom all have met since need not be remembered.
    c.read[c.read[0].before(now) ? 0 : 1] = now;
  }
  void write() const {
    if (!ordered(c.write) && (c.write.atomic == 0 || now.atomic == 0))
      report("write, then write", &c.write);
    for (record const& r : c.read)
      if (!ordered(r)) report("read, then write", &r);
    c.write = now;
  }

 private:
  /// Each block has shared memory of its own.
  bool ordered(record const& earlier) const {
    return earlier.before(now) || (shared && earlier.block != now.block);
  }
  [[noreturn]] void report(char const* what, record const* earlier) const {
    std::fprintf(stderr, "%s of %s memory, address %#zx, code +%#zx", what,
                 shared ? "shared" : "device", shared ? shared_offset(at) : at,
                 static_cast<std::size_t>(static_cast<char const*>(code) - &__executable_start));
    if (earlier != nullptr)
      std::fprintf(stderr, ", first by thread %u of %s block", earlier->thread,
                   earlier->block == now.block ? "the same" : "another");
    std::fputs("\n", stderr);
    emulation::fail(earlier != nullptr ? "a race" : "uninitialised shared memory");
  }
};

}  // namespace

void emulation::access(void const* p, std::size_t bytes, access_kind what, void const* code) {
  auto const at = reinterpret_cast<std::uintptr_t>(p);
  auto const stack = reinterpret_cast<std::uintptr_t>(standing.stack);
  if (!standing.running || at - stack < standing.stack_bytes) return;
  if (on_host_stack(at) &&
      at - reinterpret_cast<std::uintptr_t>(standing.body) >= sizeof *standing.body)
    emulation::fail("touches the host's stack");
  if (standing.overlapped && standing.syncs.entered && !standing.syncs.previous)
    emulation::fail("touches memory before the kernels in front have ended");
  record const now = record::now(what == access_kind::atomic);
  for (std::size_t i = 0; i < bytes; ++i) {
    watcher const w{at + i, now, code};
    if (what == access_kind::read)
      w.read();
    else
      w.write();
  }
}

/// From the return addresses of the calls that the thread is in. The code has to keep frame pointers, and must
/// not be repeated on several paths (-O1 without jump threading).
std::uint64_t emulation::place_in_code() {
  auto const* frame = static_cast<std::uintptr_t const*>(__builtin_frame_address(0));
  auto const* const stack = static_cast<char const*>(standing.stack);
  auto const* const end = reinterpret_cast<std::uintptr_t const*>(stack + standing.stack_bytes);
  std::uint64_t place = 14695981039346656037ull;
  while (frame >= static_cast<void const*>(stack) && frame + 1 < end) {
    place = (place ^ frame[1]) * 1099511628211ull;
    auto const* const caller = reinterpret_cast<std::uintptr_t const*>(frame[0]);
    if (caller <= frame) break;
    frame = caller;
  }
  return place;
}
