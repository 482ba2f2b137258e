// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Grids of kernel launches. Plain host code: it knows sizes, not CUDA.
#pragma once

#include "../../core/types.hpp"

namespace kvkeep::cuda {

/// The least of some numbers.
template <class... T>
constexpr int min_of(int first, T... rest) noexcept {
  ((first = rest < first ? rest : first), ...);
  return first;
}

/// Blocks of a launch, `threads` each. x may be large, y holds up to 65535.
struct grid {
  offset_t x = 0;
  offset_t y = 1;
  int threads = 0;

  constexpr bool fits() const noexcept {
    return x >= 0 && x <= 2147483647 && y >= 0 && y <= 65535 && threads > 0 && threads <= 1024 &&
           threads % 32 == 0;
  }
};

KVKEEP_HD constexpr offset_t ceil_div(offset_t a, offset_t b) noexcept { return (a + b - 1) / b; }

/// One block per (entry, KV head), in x: `blockIdx.x = entry * n_heads + kv_head`; y: parts of a head.
constexpr grid head_grid(index_t n_entries, index_t n_heads, offset_t parts, int threads) noexcept {
  return {static_cast<offset_t>(n_entries) * n_heads, parts, threads};
}

/// Blocks of each of `heads` heads that take its `parts` in turns: as many as keep the device busy, however long a head
/// may be. Where some thousand slots are in use of 128k, a block for each part would be a hundred empty ones for one at
/// work.
constexpr offset_t parts_in_turn(offset_t heads, offset_t parts, int n_sm) noexcept {
  constexpr offset_t blocks_per_sm = 16;
  offset_t const enough = ceil_div(blocks_per_sm * n_sm, heads < 1 ? 1 : heads);
  return parts < enough ? parts : enough;
}

/// One thread per element.
constexpr grid flat_grid(offset_t n, int threads) noexcept {
  return {ceil_div(n, threads), 1, threads};
}

/// Threads of a block that works through `n` slots: a power of two of warps, about eight slots each.
constexpr int threads_for(offset_t n) noexcept {
  int threads = 64;
  while (threads < 1024 && static_cast<offset_t>(threads) * 8 < n) threads *= 2;
  return threads;
}

/// Threads that the blocks of a multiprocessor have together before one of them takes more than it must: as
/// many as there are registers for, 64 each.
inline constexpr int shared_threads = 1024;

/// Threads of each of `blocks` blocks that take one head: as `threads_for`, and up to one for two slots where the
/// multiprocessors have room for `together` at once. What a block does for a head is steps that wait for memory and
/// for each other, so threads that would else be idle shorten each. No result depends on it.
constexpr int head_threads(offset_t n, offset_t blocks, int n_sm,
                           int together = shared_threads) noexcept {
  int threads = threads_for(n);
  offset_t const per_sm = blocks > n_sm ? ceil_div(blocks, n_sm) : 1;
  while (threads < 1024 && threads * offset_t{2} < n && threads * 2 * per_sm <= together)
    threads *= 2;
  return threads;
}

}  // namespace kvkeep::cuda
