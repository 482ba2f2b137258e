// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CPU: the best slots of each head, the best whole blocks, the victim.
#pragma once

#include "../../op/select_k.hpp"
#include "guard.hpp"
#include "kernels/select.hpp"

namespace kvkeep::cpu {
inline namespace KVKEEP_CPU_ISA {

/// Scratch of one worker for selection among `n` slots.
struct select_scratch {
  worker_scratch<index_t> list;    ///< [n]
  worker_scratch<std::byte> work;  ///< of find_top

  static select_scratch take(workspace& ws, int workers, index_t n) {
    select_scratch s;
    s.list = take_each<index_t>(ws, workers, size_of(n));
    s.work = take_each<std::byte>(ws, workers, select_scratch_bytes(n));
    return s;
  }
};

/// Appends slots [first, last), up to `limit` entries.
/// @return the new count, which may be above `limit`
inline index_t list_slots(index_t first, index_t last, index_t count, index_t limit,
                          index_t* out) noexcept {
  for (index_t j = first; j < last; ++j, ++count)
    if (count < limit) out[count] = j;
  return count;
}

/// Writes the count of one head's plan; false if the plan has no room for it.
inline bool finish_plan(keep_plan<host_space> const& plan, index_t b, index_t h,
                        index_t count) noexcept {
  bool const fits = count <= plan.slots.extent[2];
  plan.count(b, h) = fits ? count : 0;
  return fits;
}

/// Selection of one entry and KV head. @return false if the plan is too small
inline bool select_head(op::select_k<host_space> const& o, select_scratch const& scratch, index_t b,
                        index_t h, int worker) noexcept {
  index_t const id = o.batch.id_of(b), n = o.slots.lengths(id, h), k = o.k(id, h);
  index_t const* const positions = o.slots.positions.at(id, h, 0);
  index_t* const out = o.out.slots.at(b, h, 0);
  index_t const limit = o.out.slots.extent[2];
  if (k >= n) return finish_plan(o.out, b, h, list_slots(0, n, 0, limit, out));
  open_range const open = find_open(o.guard, id, positions, n, scratch.list(worker));
  candidates const c{o.scores.at(b, h, 0), positions, nullptr, n, open.from, open.to};
  keep_test const test = find_top(c, k, scratch.work(worker), true);
  return finish_plan(o.out, b, h, list_kept(test, limit, out));
}

/// Keep plans. `bad_argument` if a plan has fewer places than slots are kept. Cost as the op says.
KVKEEP_CPU_OP status enqueue(context& c, op::select_k<host_space> const& o,
                             workspace& ws) noexcept {
  if (!slots_contiguous(o.scores) || !slots_contiguous(o.slots.positions) ||
      !slots_contiguous(o.out.slots))
    return status::bad_argument;
  workspace::frame const frame(ws);
  index_t const heads = o.slots.lengths.extent[1];
  auto const scratch =
      select_scratch::take(ws, c.workers(o.batch.n * heads), o.slots.positions.extent[2]);
  if (!placed(ws)) return not_placed(ws);
  std::atomic<bool> fits{true};
  for_heads(c, o.batch.n, heads, [&](index_t b, index_t h, int worker) {
    if (!select_head(o, scratch, b, h, worker)) fits.store(false, std::memory_order_relaxed);
  });
  return fits.load() ? status::ok : status::bad_argument;
}

/// Score of one block: sum in slot order, or the largest score that is a number.
inline float block_score(float const* scores, index_t n, reduction how) noexcept {
  float sum = 0, best = -std::numeric_limits<float>::infinity();
  for (index_t j = 0; j < n; ++j) {
    sum += scores[j];
    if (order_key(scores[j]) > order_key(best)) best = scores[j];
  }
  return how == reduction::max ? best : sum;
}

/// Scores and first positions of whole blocks.
struct block_scratch {
  worker_scratch<float> scores;
  worker_scratch<index_t> first;
  worker_scratch<std::uint8_t> allowed;
  worker_scratch<std::uint8_t> keep;
};

inline bool select_blocks_head(op::select_blocks<host_space> const& o,
                               select_scratch const& scratch, block_scratch const& blocks,
                               index_t b, index_t h, int worker) noexcept {
  index_t const id = o.batch.id_of(b), n = o.slots.lengths(id, h), n_blocks = n / o.block;
  index_t const* const positions = o.slots.positions.at(id, h, 0);
  open_range const open = find_open(o.guard, id, positions, n, scratch.list(worker));
  float* const scores = blocks.scores(worker);
  index_t* const first = blocks.first(worker);
  std::uint8_t* const allowed = blocks.allowed(worker);
  std::uint8_t* const keep = blocks.keep(worker);
  for (index_t i = 0; i < n_blocks; ++i) {
    index_t const at = i * o.block;
    scores[i] = block_score(o.scores.at(b, h, at), o.block, o.how);
    first[i] = positions[at];
    allowed[i] = count_open(open, positions + at, o.block) == o.block;
  }
  candidates const c{scores, first, allowed, n_blocks};
  index_t const n_kept = std::max<index_t>(o.k(id, h), 0) / o.block;
  mark_kept(find_top(c, n_kept, scratch.work(worker), true), keep);
  index_t* const out = o.out.slots.at(b, h, 0);
  index_t const limit = o.out.slots.extent[2];
  index_t count = 0;
  for (index_t i = 0; i < n_blocks; ++i)
    if (keep[i] != 0) count = list_slots(i * o.block, (i + 1) * o.block, count, limit, out);
  count = list_slots(n_blocks * o.block, n, count, limit, out);
  return finish_plan(o.out, b, h, count);
}

/// Plans of whole blocks and the open tail. Cost: 8 bytes per slot.
KVKEEP_CPU_OP status enqueue(context& c, op::select_blocks<host_space> const& o,
                             workspace& ws) noexcept {
  if (!slots_contiguous(o.scores) || !slots_contiguous(o.slots.positions) ||
      !slots_contiguous(o.out.slots) || o.block < 1 || o.how == reduction::mean)
    return status::bad_argument;
  workspace::frame const frame(ws);
  index_t const heads = o.slots.lengths.extent[1], slots = o.slots.positions.extent[2];
  int const workers = c.workers(o.batch.n * heads);
  auto const scratch = select_scratch::take(ws, workers, slots);
  block_scratch blocks;
  blocks.scores = take_each<float>(ws, workers, size_of(slots / o.block + 1));
  blocks.first = take_each<index_t>(ws, workers, size_of(slots / o.block + 1));
  blocks.allowed = take_each<std::uint8_t>(ws, workers, size_of(slots / o.block + 1));
  blocks.keep = take_each<std::uint8_t>(ws, workers, size_of(slots / o.block + 1));
  if (!placed(ws)) return not_placed(ws);
  std::atomic<bool> fits{true};
  for_heads(c, o.batch.n, heads, [&](index_t b, index_t h, int worker) {
    if (!select_blocks_head(o, scratch, blocks, b, h, worker))
      fits.store(false, std::memory_order_relaxed);
  });
  return fits.load() ? status::ok : status::bad_argument;
}

/// Victims. Cost: 16 bytes read per slot, half of them from the first-level cache.
KVKEEP_CPU_OP status enqueue(context& c, op::evict_one<host_space> const& o,
                             workspace& ws) noexcept {
  if (!slots_contiguous(o.scores) || !slots_contiguous(o.slots.positions))
    return status::bad_argument;
  workspace::frame const frame(ws);
  index_t const heads = o.slots.lengths.extent[1], slots = o.slots.positions.extent[2];
  int const workers = c.workers(o.batch.n * heads);
  auto const list = take_each<index_t>(ws, workers, size_of(slots));
  if (!placed(ws)) return not_placed(ws);
  for_heads(c, o.batch.n, heads, [&](index_t b, index_t h, int worker) {
    index_t const id = o.batch.id_of(b), n = o.slots.lengths(id, h);
    index_t const* const positions = o.slots.positions.at(id, h, 0);
    if (h + 1 < heads) prefetch_slots(o.slots.positions.at(id, h + 1, 0), n);
    open_range const open = find_open(o.guard, id, positions, n, list(worker));
    o.victim(id, h) =
        evict_index({o.scores.at(b, h, 0), positions, nullptr, n, open.from, open.to});
  });
  return status::ok;
}

}  // namespace KVKEEP_CPU_ISA
}  // namespace kvkeep::cpu
