// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Per-index steps of a device session that stores, loads and checks whole sequences.
#pragma once

#include "budget_rule.hpp"
#include "device_draft_steps.hpp"
#include "device_prompt_steps.hpp"
#include "pieces.hpp"

namespace kvkeep::detail {

/// Writes the header of a saved sequence; index: 0.
struct write_header {
  saved_header h;
  index_t const* frozen;  ///< [id]
  index_t const* faults;  ///< [id]
  index_t id;
  std::byte* to;
  KVKEEP_HD void operator()(index_t) const noexcept {
    saved_header mine = h;
    mine.frozen = frozen[id];
    mine.faults = faults[id];
    std::memcpy(to, &mine, sizeof mine);
  }
};

/// Reads it: what does not fit is a fault, and nothing is loaded. Index: 0.
struct read_header {
  saved_header own;
  std::byte const* from;
  index_t* frozen;            ///< [id]
  index_t* faults;            ///< [id]
  std::uint32_t* generation;  ///< [id]
  index_t id;
  index_t* refused;  ///< [1] 0: it fits
  KVKEEP_HD void operator()(index_t) const noexcept {
    saved_header h;
    std::memcpy(&h, from, sizeof h);
    *refused = h.fits(own) ? 0 : 1;
    ++generation[id];
    if (*refused != 0) {
      faults[id] |= static_cast<index_t>(device_fault::bad_save);
      return;
    }
    frozen[id] = h.frozen;
    faults[id] = h.faults;
  }
};

/// Numbers of one sequence in a layer go out; index: number, beyond `first`.
template <class Space>
struct save_numbers {
  sequence_arrays<Space> all;
  index_t id;
  std::byte* to;  ///< of number 0
  offset_t first = 0;
  KVKEEP_HD void operator()(index_t i) const noexcept {
    std::memcpy(to + (first + i) * 4, all.at(id, first + i), 4);
  }
};

/// ... and come back, unless they are refused.
template <class Space>
struct load_numbers {
  sequence_arrays<Space> all;
  index_t id;
  std::byte const* from;  ///< of number 0
  index_t const* refused;
  offset_t first = 0;
  KVKEEP_HD void operator()(index_t i) const noexcept {
    if (*refused == 0) std::memcpy(all.at(id, first + i), from + (first + i) * 4, 4);
  }
};

/// What must hold of the heads of a sequence whose prompt has ended in a layer, and that has no fault by then: slots
/// and positions, tokens that a guard protects, the budget.
/// Index: head * items() + item: a slot, or beyond those a protected token.
template <class Space>
struct find_corrupt {
  layer_state<Space> l;
  budget_rule rule;
  index_t const* frozen;   ///< [id]
  index_t const* decided;  ///< [id] tokens after which nothing waits to leave
  index_t const* faults;   ///< [id]
  index_t id;
  index_t sinks, recent;  ///< protected in either role
  std::uint8_t* found;    ///< [head, item]
  KVKEEP_HD index_t items() const noexcept { return 2 * l.kv.shape.max_slots; }
  KVKEEP_HD void operator()(index_t i) const noexcept {
    index_t const h = i / items(), item = i % items(), slots = l.kv.shape.max_slots;
    index_t const n = l.slots.lengths(id, h), hole = l.victim(id, h);
    bool const sound = n >= 0 && n <= slots && hole < n && hole >= -1;
    bool good = sound;
    if (sound && item == 0)
      good = !rule.exceeded(l, id, h, n - (hole >= 0 ? 1 : 0), frozen[id], decided[id]);
    if (good && item < slots)
      good = item >= n || item == hole || good_slot(h, item, n, hole);
    else if (good)
      good = is_kept(h, item - slots, n, hole);
    found[i] = good || stops(faults[id]) != 0 ? 0 : 1;
  }

 private:
  /// A position that the sequence has seen, and no later slot has.
  KVKEEP_HD bool good_slot(index_t h, index_t s, index_t n, index_t hole) const noexcept {
    index_t const p = l.slots.positions(id, h, s);
    return p >= 0 && p < l.appended[id] && slot_with(h, p, s + 1, n, hole) == n;
  }
  /// The q-th protected token has a slot.
  KVKEEP_HD bool is_kept(index_t h, index_t q, index_t n, index_t hole) const noexcept {
    index_t const tokens = l.appended[id], pending = tokens - l.seen[id];
    index_t const early = smaller(tokens, larger(frozen[id], sinks));
    index_t const late = smaller(tokens, larger(recent, pending));
    if (q >= early + late) return true;
    index_t const p = q < early ? q : tokens - 1 - (q - early);
    return slot_with(h, p, 0, n, hole) < n;
  }
  /// The first slot from `s` on with this position, or n.
  KVKEEP_HD index_t slot_with(index_t h, index_t position, index_t s, index_t n,
                              index_t hole) const noexcept {
    while (s < n && (s == hole || l.slots.positions(id, h, s) != position)) ++s;
    return s;
  }
};

/// Whether a slot of a frozen prefix holds another token than its own, or none. Index: head * n + slot.
template <class Space>
struct find_unfrozen {
  layer_state<Space> l;
  index_t id;
  index_t n;            ///< tokens of the prefix, at most max_slots
  std::uint8_t* found;  ///< [head, slot]
  KVKEEP_HD void operator()(index_t i) const noexcept {
    found[i] = holds_own(l, id, i / n, i % n) ? 0 : 1;
  }
};

/// Whether something was found in a head; index: head.
struct join_found {
  std::uint8_t const* found;  ///< [head, item]
  index_t items;
  index_t* of_head;  ///< [head]
  KVKEEP_HD void operator()(index_t h) const noexcept {
    index_t any = 0;
    for (index_t i = 0; i < items; ++i) any |= found[h * items + i];
    of_head[h] = any;
  }
};

/// ... is the sequence's fault; index: 0.
struct blame_sequence {
  index_t const* of_head;
  index_t heads;
  index_t* faults;  ///< [id]
  index_t id;
  device_fault fault;
  KVKEEP_HD void operator()(index_t) const noexcept {
    index_t any = 0;
    for (index_t h = 0; h < heads; ++h) any |= of_head[h];
    if (any != 0) faults[id] |= static_cast<index_t>(fault);
  }
};

}  // namespace kvkeep::detail
