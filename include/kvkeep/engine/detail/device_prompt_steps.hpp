// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Per-index steps of a device session at the beginning of sequences and during their prompts. Threads share what is as
/// long as a cache: none of them walks over a head's slots.
#pragma once

#include <cstring>

#include "device_steps.hpp"
#include "pieces.hpp"
#include "prompt_steps.hpp"

namespace kvkeep::detail {

/// What the host knows of one sequence.
struct host_state {
  bool alive = false;
  index_t ended_layers = 0;  ///< layers whose prompt has ended
};
/// ... and of its prompt in one layer.
struct prompt_state {
  index_t tokens = 0;
  bool has_lse = true;
  bool observed = false;
  index_t frozen = 0;     ///< tokens of a prefix, which have no queries
  index_t ring_from = 0;  ///< oldest token with queries
};

/// Whether a device session scores a prompt that ends: how many tokens its slots hold, it cannot see.
template <class P>
bool scores_prompt(P const& prompt, index_t tokens) {
  auto const traits = prompt.budget.traits();
  if (keeps_all(prompt.score) || traits.couples_layers) return !keeps_all(prompt.score);
  return !keeps_prompt(prompt, tokens) && (traits.after_scores() || !decides_late(prompt.when));
}
/// Whether a device session scores a prompt that ends, and has not the queries for it.
template <class P>
bool lacks_queries(P const& prompt, cache_shape const& cache, prompt_state const& p) {
  return scores_prompt(prompt, p.tokens) &&
         lacks_queries(prompt, cache, p.tokens - p.ring_from, p.tokens - p.frozen);
}

/// A sequence's counters in one layer; index: 0. Plans of before are stale. Where tokens have come otherwise than by
/// the prompt, that is a fault, and nothing else changes.
template <class Space>
struct set_counters {
  layer_state<Space> l;
  index_t* faults;
  std::uint32_t* generation;
  index_t id;
  index_t before;  ///< tokens of the prompt so far; -1: whatever there is
  index_t tokens;
  index_t ring_from;  ///< oldest position in the query ring; -1: as it was
  KVKEEP_HD void operator()(index_t) const noexcept {
    ++generation[id];
    if (before >= 0 && l.appended[id] != before) {
      faults[id] |= static_cast<index_t>(device_fault::bad_order);
      return;
    }
    l.seen[id] = l.appended[id] = l.attended[id] = tokens;
    if (ring_from >= 0) l.ring_from[id] = ring_from;
  }
};

/// A sequence's session-wide words; index: 0.
struct set_sequence {
  index_t* frozen;
  index_t* faults;
  std::uint32_t* generation;
  index_t id;
  index_t tokens;
  KVKEEP_HD void operator()(index_t) const noexcept {
    frozen[id] = tokens;
    faults[id] = 0;
    ++generation[id];
  }
};

/// The same of a copy; index: 0.
struct fork_sequence {
  index_t* frozen;
  index_t* faults;
  std::uint32_t* generation;
  index_t from, to;
  index_t tokens;
  KVKEEP_HD void operator()(index_t) const noexcept {
    frozen[to] = frozen[from] > tokens ? frozen[from] : tokens;
    faults[to] = faults[from];
    ++generation[to];
  }
};

/// The arrays of a layer with numbers of every sequence.
template <class Space>
struct sequence_arrays {
  static constexpr int most = 16;
  struct array {
    std::uint32_t* data;  ///< of sequence 0: any numbers of 4 bytes
    offset_t n;           ///< numbers of a sequence
  };
  array arrays[most] = {};
  index_t n_arrays = 0;  ///< of the layer: not more than there is room for, see whole()
  offset_t total = 0;    ///< numbers of a sequence

  explicit sequence_arrays(layer_state<Space> const& l) noexcept {
    each_array(l, [&](auto* data, offset_t n) {
      if (n_arrays < most) arrays[n_arrays] = {reinterpret_cast<std::uint32_t*>(data), n};
      ++n_arrays;
      total += n;
    });
  }
  bool whole() const noexcept { return n_arrays <= most; }
  /// Address of number `i` of sequence `id`.
  KVKEEP_HD std::uint32_t* at(index_t id, offset_t i) const noexcept {
    for (array const& a : arrays) {
      if (i < a.n) return a.data + (id * a.n + i);
      i -= a.n;
    }
    return nullptr;
  }
};

/// Clears all numbers of one sequence in a layer; index: number, beyond `first`.
template <class Space>
struct clear_sequence {
  sequence_arrays<Space> all;
  index_t id;
  offset_t first = 0;
  KVKEEP_HD void operator()(index_t i) const noexcept { std::memset(all.at(id, first + i), 0, 4); }
};

/// Copies them from one sequence to another; index: number, beyond `first`.
template <class Space>
struct copy_sequence {
  sequence_arrays<Space> all;
  index_t from, to;
  offset_t first = 0;
  KVKEEP_HD void operator()(index_t i) const noexcept {
    std::memcpy(all.at(to, first + i), all.at(from, first + i), 4);
  }
};

/// No head has a free slot or an unattended token, or anything to report; index: KV head.
template <class Space>
struct open_head {
  layer_state<Space> l;
  open_tables<Space> tables;
  KVKEEP_HD void operator()(index_t h) const noexcept {
    l.victim(tables.id, h) = -1;
    l.fresh(0, tables.id, h) = -1;
    tables(h);
  }
};

/// A copy's tables are those of the original; index: KV head.
template <class Space>
struct fork_tables {
  plan_memory<Space> p;
  index_t layer;
  index_t from, to;
  KVKEEP_HD void operator()(index_t h) const noexcept {
    p.held(layer, to, h) = p.held(layer, from, h);
    p.n_gone(layer, to, h) = 0;
    p.n_kept(layer, to, h) = p.n_kept(layer, from, h) == prompt_open ? prompt_open : settled;
  }
};

/// Says whether a layer's prompt is open; index: KV head.
template <class Space>
struct mark_prompt {
  tensor_ref<index_t, 3, Space> n_kept;  ///< of plan_memory
  index_t layer;
  index_t id;
  index_t state;
  KVKEEP_HD void operator()(index_t h) const noexcept { n_kept(layer, id, h) = state; }
};

/// Before a prompt is cut in place; index: KV head.
template <class Space>
struct note_prompt {
  note_held<Space> note;
  index_t id;
  KVKEEP_HD void operator()(index_t h) const noexcept { note(id, h); }
};

/// Gives `n` new tokens of a prompt the slots from `position` on, which is as many as there are, or does nothing where
/// other tokens have come. Index: head * each_head() + token.
template <class Space>
struct extend_prompt {
  slot_state<Space> s;
  index_t id;        ///< state row
  index_t position;  ///< of the first new token
  index_t n;
  index_t own_rows;                   ///< scorer rows to clear
  index_t const* appended = nullptr;  ///< the sequence's tokens, or null: as many as `position`
  /// Without tokens the length is set all the same.
  KVKEEP_HD index_t each_head() const noexcept { return n > 0 ? n : 1; }
  KVKEEP_HD void operator()(index_t i) const noexcept {
    if (appended != nullptr && *appended != position) return;
    index_t const h = i / each_head(), slot = position + i % each_head();
    if (slot == position) s.lengths(id, h) = position + n;
    if (n == 0) return;
    s.positions(id, h, slot) = slot;
    for (index_t r = 0; r < own_rows; ++r) s.rows(id, h, r, slot) = 0;
  }
};

/// Room of one plane for the first `n` slots of a head, and the validity of all their pages.
template <class Space>
KVKEEP_HD index_t fault_of_slots(plane_ref<Space> const& p, index_t row, index_t h,
                                 index_t n) noexcept {
  index_t fault = n > 0 ? fault_of(p, row, h, n - 1) : 0;
  if (p.layout.kind != layout_kind::paged || fault != 0) return fault;
  // No early exit, so that entries are read side by side.
  for (index_t slot = 0; slot < n; slot += p.layout.paged.block_size)
    fault |= fault_of(p, row, h, slot);
  return fault;
}

/// What stands against moving what a plan keeps of a head into a cache. Index: KV head.
template <class Space>
struct find_misfits {
  kv_ref<Space> to;
  batch_ref<Space> batch;  ///< one entry
  keep_plan<Space> plan;
  index_t* found;  ///< [kv_head]
  KVKEEP_HD void operator()(index_t h) const noexcept {
    index_t const n = plan.count(0, h), row = batch.row_of(0);
    found[h] = n > to.shape.max_slots
                   ? static_cast<index_t>(device_fault::no_slot)
                   : fault_of_slots(to.k, row, h, n) | fault_of_slots(to.v, row, h, n);
  }
};

/// Takes everything out of the plan of a sequence where one head has such a fault, which then is the sequence's. Index:
/// KV head.
template <class Space>
struct refuse_plan {
  batch_ref<Space> batch;
  keep_plan<Space> plan;
  index_t const* found;  ///< [kv_head] of find_misfits
  index_t* faults;       ///< [id]
  KVKEEP_HD void operator()(index_t h) const noexcept {
    index_t fault = 0;
    for (index_t k = 0; k < plan.count.extent[1]; ++k) fault |= found[k];
    if (h == 0) faults[batch.id_of(0)] |= fault;
    if (fault != 0) plan.count(0, h) = 0;
  }
};

}  // namespace kvkeep::detail
