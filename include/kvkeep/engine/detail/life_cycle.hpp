// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Begin, fork and end of sequences, and what can be read of them.
#pragma once

#include <algorithm>
#include <cstring>

#include "../session.hpp"
#include "pieces.hpp"
#include "prompt_steps.hpp"

namespace kvkeep {

template <backend Ctx, class P, class D>
status session<Ctx, P, D>::begin(index_t& id, sequence_options const& o) noexcept {
  index_t at = o.id;
  if (at < 0)
    for (at = 0; at < limits_.max_sequences && shared_.alive[at] != 0; ++at) {
    }
  if (at >= limits_.max_sequences)
    return o.id < 0 ? status::capacity_exceeded : status::bad_sequence;
  if (shared_.alive[at] != 0) return status::bad_sequence;
  if (o.frozen < 0) return status::bad_argument;
  if (o.frozen > 0 && (limits_.max_prompt > 0 || !prompt_.score.traits().prefix_safe ||
                       !decode_.score.traits().prefix_safe))
    return status::unsupported;
  for (auto const& l : layers_)
    if (o.frozen > l.kv.shape.max_slots) return status::capacity_exceeded;
  workspace w = scratch();
  shared_.frozen[at] = o.frozen;
  for (auto& l : layers_) {
    index_t const heads = shape_.cache.n_kv_heads;
    // All of it, so that nothing of whoever used the id before is left, or saved.
    detail::each_piece(l, at, [](auto* piece, std::size_t n) { std::memset(piece, 0, n); });
    std::fill_n(l.victim.at(at), heads, -1);
    // The shared prefix is in the cache already: slots and positions 0 .. frozen - 1.
    KVKEEP_TRY(each(heads, detail::extend_head<space>{l.slots, at, 0, o.frozen, 0}, w));
    KVKEEP_TRY(fix_decode_budget(l, at, 0, w));
    l.seen[at] = l.ring_from[at] = l.appended[at] = l.attended[at] = o.frozen;
    l.has_lse[at] = 1;
    l.prompt_done[at] = 0;
    KVKEEP_TRY(each(heads, detail::open_tables<space>{plan_, l.number, at, detail::settled}, w));
  }
  shared_.confirmed[at] = o.frozen;
  shared_.alive[at] = 1;
  next_generation(at);
  id = at;
  return status::ok;
}

template <backend Ctx, class P, class D>
status session<Ctx, P, D>::end(index_t id) noexcept {
  if (!alive(id)) return status::bad_sequence;
  shared_.alive[id] = 0;
  next_generation(id);
  if (shared_.prompt_owner == id) shared_.prompt_owner = -1;
  if (shared_.staging_id == id) shared_.staging_id = -1;
  return status::ok;
}

template <backend Ctx, class P, class D>
auto session<Ctx, P, D>::lengths(index_t layer) const noexcept
    -> tensor_ref<index_t const, 2, space> {
  index_t const m = managed(layer);
  if (m < 0) return {};
  return layers_[static_cast<std::size_t>(m)].slots.lengths;
}

template <backend Ctx, class P, class D>
auto session<Ctx, P, D>::positions(index_t layer) const noexcept
    -> tensor_ref<index_t const, 3, space> {
  index_t const m = managed(layer);
  if (m < 0) return {};
  return layers_[static_cast<std::size_t>(m)].slots.positions;
}

template <backend Ctx, class P, class D>
auto session<Ctx, P, D>::free_slots(index_t layer) const noexcept
    -> tensor_ref<index_t const, 2, space> {
  index_t const m = managed(layer);
  if (m < 0) return {};
  return layers_[static_cast<std::size_t>(m)].victim;
}

template <backend Ctx, class P, class D>
counters session<Ctx, P, D>::count() const noexcept {
  counters c;
  for (auto const& l : layers_) {
    c.tokens += l.count.tokens;
    c.evicted += l.count.evicted;
    c.cuts += l.count.cuts;
    c.victims += l.count.victims;
    c.moved_bytes += l.count.moved_bytes;
    c.freed_bytes += l.count.freed_bytes;
    c.scratch_peak = std::max(c.scratch_peak, l.count.scratch_peak);
  }
  c.state_bytes = state_bytes_;
  c.scratch_bytes = scratch_bytes_;
  return c;
}

template <backend Ctx, class P, class D>
status session<Ctx, P, D>::fork(index_t from, index_t& id, sequence_options const& o) noexcept {
  if (!alive(from)) return status::bad_sequence;
  if (o.frozen < 0) return status::bad_argument;
  for (auto const& l : layers_)
    if (!detail::holds_prefix(l, from, o.frozen)) return status::bad_argument;
  for (auto const& l : layers_)
    if (l.appended[from] != l.attended[from] && limits_.decode != decode_offer::nothing)
      return status::bad_order;
  // What it waits for in buffers that others use in turn is not copied.
  for (auto const& l : layers_)
    if (limits_.max_prompt > 0 && detail::in_prompt(l, from)) return status::bad_order;
  if (shared_.prompt_owner == from) return status::bad_order;
  index_t to = -1;
  KVKEEP_TRY(begin(to, {o.id, 0}));
  for (auto const& l : layers_) {
    detail::each_array(l, [&](auto* array, offset_t n) {
      std::memcpy(array + to * n, array + from * n, sizeof *array * static_cast<std::size_t>(n));
    });
    detail::each_flag(l, [&](std::uint8_t* flag) { flag[to] = flag[from]; });
    for (index_t h = 0; h < shape_.cache.n_kv_heads; ++h)
      plan_.held(l.number, to, h) = plan_.held(l.number, from, h);
  }
  shared_.frozen[to] = std::max(o.frozen, shared_.frozen[from]);
  workspace w = scratch();
  for (auto const& l : layers_)
    KVKEEP_TRY(each(shape_.cache.n_kv_heads,
                    detail::raised_budget<space>(decode_, l, to, shared_.frozen), w));
  shared_.confirmed[to] = shared_.confirmed[from];
  id = to;
  return status::ok;
}

}  // namespace kvkeep

#include "prompt_evidence.hpp"
