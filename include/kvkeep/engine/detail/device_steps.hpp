// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Per-index steps of a device session: what a session's host code does between ops, on the backend.
#pragma once

#include <type_traits>

#include "../steps.hpp"
#include "tables.hpp"

namespace kvkeep {

/// What can go wrong where the host does not look.
enum class device_fault : index_t {
  /// A head had no room for a token, or as many unconfirmed ones as limits::max_draft.
  no_slot = 1,
  /// A block table entry is out of range.
  bad_table = 2,
  /// A token was appended, confirmed or decided on too early: before the one before it was attended to. Or, where the
  /// engine commits or whole blocks leave, before its prompt had ended or a report had told of the tables. Or more
  /// tokens were confirmed than there were, a sequence was twice in a batch, or a prompt was shown or ended after a
  /// token.
  bad_order = 4,
  /// A plan was committed to a sequence that has changed since: nothing moved, and it goes on.
  stale_plan = 8,
  /// The engine's slot for a token is not the one that comes next.
  wrong_slot = 16,
  /// What was to be loaded is no sequence of such a session: nothing was.
  bad_save = 32,
  /// `verify` has found slots, positions, protected tokens or a budget that cannot be.
  corrupt = 64,
  /// A copy was to freeze more than the first slots of every head hold: their first tokens, in order.
  bad_prefix = 128
};

namespace detail {

/// numbers[i] = 0.
template <class T>
struct count_none {
  T* numbers;
  KVKEEP_HD void operator()(index_t i) const noexcept { numbers[i] = 0; }
};

/// numbers[i] = i.
struct count_up {
  index_t* numbers;
  KVKEEP_HD void operator()(index_t i) const noexcept { numbers[i] = i; }
};

/// Room of one plane for slots of a head, and the validity of the page that `slot` lies in.
template <class Space>
KVKEEP_HD index_t fault_of(plane_ref<Space> const& p, index_t row, index_t h,
                           index_t slot) noexcept {
  any_layout const& l = p.layout;
  if constexpr (std::is_same_v<Space, host_space>)  // a layout behind host functions
    if (l.kind == layout_kind::custom)
      return slot < l.custom.capacity(row, h) ? 0 : static_cast<index_t>(device_fault::no_slot);
  if (l.kind == layout_kind::strided)
    return slot < l.strided.capacity(row, h) ? 0 : static_cast<index_t>(device_fault::no_slot);
  if (l.kind == layout_kind::ragged)
    return slot < l.ragged.capacity(row, h) ? 0 : static_cast<index_t>(device_fault::no_slot);
  if (slot >= l.paged.capacity(row, h)) return static_cast<index_t>(device_fault::no_slot);
  index_t const page = l.paged.entry(row, h, slot / l.paged.block_size);
  return page >= 0 && page < l.paged.n_blocks ? 0 : static_cast<index_t>(device_fault::bad_table);
}

/// Where a head's next token goes: its free slot, else the tail.
template <class Space>
KVKEEP_HD index_t next_slot(layer_state<Space> const& l, index_t id, index_t h) noexcept {
  index_t const free = l.victim(id, h);
  return free >= 0 ? free : l.slots.lengths(id, h);
}

/// Of a sequence's faults those that end its decoding.
KVKEEP_HD inline index_t stops(index_t faults) noexcept {
  return faults & ~static_cast<index_t>(device_fault::stale_plan);
}

/// Whether a head's prompt has not ended, or its table waits for a report.
/// @param n_kept  of plan_memory, or null: nobody keeps it
template <class Space>
KVKEEP_HD index_t table_fault(tensor_ref<index_t, 3, Space> const& n_kept, index_t layer,
                              index_t id, index_t h) noexcept {
  bool const open = n_kept.data != nullptr && n_kept(layer, id, h) != settled;
  return open ? static_cast<index_t>(device_fault::bad_order) : 0;
}

/// What stands against giving a head a slot for its next token.
/// @param drafts  most unconfirmed tokens, 0: attention confirms them
template <class Space>
KVKEEP_HD index_t fault_of_next(layer_state<Space> const& l, index_t id, index_t row, index_t h,
                                index_t drafts) noexcept {
  index_t const slot = next_slot(l, id, h);
  bool const open = drafts > 0 ? l.attended[id] != l.appended[id] : l.fresh(0, id, h) >= 0;
  bool const full = drafts > 0 && l.appended[id] - l.seen[id] >= drafts;
  if (open) return static_cast<index_t>(device_fault::bad_order);
  if (full || slot >= l.kv.shape.max_slots) return static_cast<index_t>(device_fault::no_slot);
  return fault_of(l.kv.k, row, h, slot) | fault_of(l.kv.v, row, h, slot);
}

/// Gives a head its slot for the next token, which has this position.
template <class Space>
KVKEEP_HD index_t take_slot(layer_state<Space> const& l, row_plan const& rows, index_t id,
                            index_t h, index_t position) noexcept {
  index_t const slot = next_slot(l, id, h), pending = position - l.seen[id];
  if (l.victim(id, h) < 0) l.slots.lengths(id, h) = slot + 1;
  l.victim(id, h) = -1;
  l.slots.positions(id, h, slot) = position;
  l.fresh(pending, id, h) = slot;
  for (index_t r = 0; r < rows.weights_at; ++r) l.slots.rows(id, h, r, slot) = 0;
  hide_from_drafts(l, rows, id, h, slot, position, pending);
  return slot;
}

/// What stands against giving an entry's sequence two tokens: an entry before it has the same one.
template <class Space>
KVKEEP_HD index_t fault_of_entry(batch_ref<Space> const& b, index_t entry) noexcept {
  bool again = false;
  for (index_t e = 0; e < entry; ++e) again = again || b.id_of(e) == b.id_of(entry);
  return again ? static_cast<index_t>(device_fault::bad_order) : 0;
}

/// What stands against giving a head a slot for its next token: the sequence's fault, or one of its own.
/// Index: entry * n_kv_heads + head.
template <class Space>
struct find_faults {
  layer_state<Space> l;
  batch_ref<Space> batch;
  tensor_ref<index_t, 3, Space> n_kept;  ///< of table_fault
  index_t const* faults;                 ///< [id]
  index_t* found;                        ///< [entry, kv_head]
  index_t drafts;                        ///< of fault_of_next
  index_t* position;                     ///< [entry] of the next token, where there are drafts
  KVKEEP_HD void operator()(index_t i) const noexcept {
    index_t const heads = l.kv.shape.n_kv_heads, entry = i / heads, h = i % heads;
    index_t const id = batch.id_of(entry);
    if (drafts > 0 && h == 0) position[entry] = l.appended[id];
    found[i] = stops(faults[id]) | table_fault(n_kept, l.number, id, h) |
               fault_of_next(l, id, batch.row_of(entry), h, drafts);
    if (h == 0) found[i] |= fault_of_entry(batch, entry);
  }
};

/// Gives every head of an entry a slot for its next token, or none where one of them has a fault, which then is the
/// sequence's. Index: entry * n_kv_heads + head.
template <class Space>
struct take_slots {
  layer_state<Space> l;
  row_plan rows;
  batch_ref<Space> batch;
  index_t const* found;       ///< [entry, kv_head] of find_faults
  index_t* faults;            ///< [id]
  std::uint32_t* generation;  ///< [id]
  index_t* out;               ///< [entry, kv_head]
  index_t const* position;    ///< [entry] of find_faults, or null: there are no drafts
  KVKEEP_HD void operator()(index_t i) const noexcept {
    index_t const heads = l.kv.shape.n_kv_heads, entry = i / heads, h = i % heads;
    index_t const id = batch.id_of(entry);
    index_t fault = 0;
    for (index_t k = 0; k < heads; ++k) fault |= found[entry * heads + k];
    if (h == 0) {
      if (fault != 0) faults[id] |= fault;
      ++generation[id];
      if (position == nullptr)
        l.appended[id] = l.seen[id] + 1;
      else if (fault == 0)
        l.appended[id] = position[entry] + 1;
    }
    index_t const at = position == nullptr ? l.seen[id] : position[entry];
    out[i] = fault == 0 ? take_slot(l, rows, id, h, at) : index_t{-1};
  }
};

/// Stores the newest tokens' queries in the rings. Index: (entry * n_q_heads + query head) * dim_k + feature.
template <class Space>
struct push_token {
  tensor_ref<float, 4, Space> ring_q;  ///< [id, q_head, ring row, dim_k]
  index_t const* appended;             ///< [id] tokens, the newest included
  batch_ref<Space> batch;
  queries q;
  KVKEEP_HD void operator()(index_t i) const noexcept {
    index_t const heads = ring_q.extent[1], ring = ring_q.extent[2], dim = ring_q.extent[3];
    index_t const row = i / dim, d = i % dim, entry = row / heads, head = row % heads;
    index_t const id = batch.id_of(entry);
    ring_q(id, head, (appended[id] + ring - 1) % ring, d) =
        query_feature(q, entry * q.entry_stride + head * q.head_stride + d);
  }
};

/// Ring rows of the newest tokens' weights. Index: entry.
template <class Space>
struct ring_rows_of {
  index_t const* appended;  ///< [id] tokens, the newest included
  batch_ref<Space> batch;
  index_t ring;
  index_t* out;  ///< [entry]
  KVKEEP_HD void operator()(index_t i) const noexcept {
    out[i] = (appended[batch.id_of(i)] + ring - 1) % ring;
  }
};

/// Remembers the blocks in use, for a report of those that leave.
template <class Space>
struct note_held {
  slot_state<Space> slots;
  tensor_ref<index_t, 3, Space> held;  ///< of plan_memory
  index_t layer;
  index_t block;  ///< slots of one
  KVKEEP_HD void operator()(index_t id, index_t h) const noexcept {
    index_t const blocks = (slots.lengths(id, h) + block - 1) / block;
    if (blocks > held(layer, id, h)) held(layer, id, h) = blocks;
  }
};

/// What a decision keeps in each head, and as `lengths` the slots of the heads for which one is due, 0 for
/// others: ops leave those alone. Index: entry * n_kv_heads + head.
template <class Space>
struct list_due {
  resolve_keep<Space> resolve;
  note_held<Space> note;
  tensor_ref<index_t, 2, Space> lengths;  ///< [id, head]
  KVKEEP_HD void operator()(index_t i) const noexcept {
    resolve(i);
    index_t const id = resolve.id[i / resolve.n_kv_heads], h = i % resolve.n_kv_heads;
    index_t const n = resolve.s.lengths(id, h);
    bool const due = resolve.out(id, h) < n;
    lengths(id, h) = due ? n : 0;
    if (due) note(id, h);
  }
};

/// Takes the lengths after a cut, where one was due. Index: entry * n_kv_heads + head.
template <class Space>
struct adopt_lengths {
  slot_state<Space> s;
  tensor_ref<index_t, 2, Space> keep;     ///< [id, head]
  tensor_ref<index_t, 2, Space> lengths;  ///< [id, head]
  batch_ref<Space> batch;
  index_t n_kv_heads;
  KVKEEP_HD void operator()(index_t i) const noexcept {
    index_t const id = batch.id_of(i / n_kv_heads), h = i % n_kv_heads;
    if (keep(id, h) < s.lengths(id, h)) s.lengths(id, h) = lengths(id, h);
  }
};

/// Memory of a cut.
template <class Space>
struct cut_memory {
  tensor_ref<index_t, 2, Space> keep{};  ///< [id, head] tokens that stay
  tensor_ref<index_t, 2, Space> due{};   ///< [id, head] list_due::lengths
  score_map<Space> scores{};             ///< [entry, head, slot]
  keep_plan<Space> plan{};               ///< of the batch
};

/// After a decision: all heads of a layer that keeps one set have its first head's victim, heads for which
/// nothing was due have none, and the newest token counts as seen. Index: entry * n_kv_heads + head.
template <class Space>
struct settle_victims {
  batch_ref<Space> batch;
  index_t n_kv_heads;
  tensor_ref<index_t, 2, Space> lengths{};      ///< [id, head]
  tensor_ref<index_t, 2, Space> victim{};       ///< [id, head]
  tensor_ref<index_t, 3, Space> fresh{};        ///< [0, id, head]
  index_t const* appended = nullptr;            ///< [id]
  index_t* seen = nullptr;                      ///< [id]
  tensor_ref<index_t, 2, Space> keep{};         ///< [id, head], or null: nothing was decided
  tensor_ref<index_t const, 2, Space> found{};  ///< [id, head] victims
  bool one_set = false;
  KVKEEP_HD void operator()(index_t i) const noexcept {
    index_t const id = batch.id_of(i / n_kv_heads), h = i % n_kv_heads;
    if (h == 0) seen[id] = appended[id];  // until here `appended` is what ops read
    fresh(0, id, h) = -1;
    if (keep.data == nullptr) return;
    index_t const own = found(id, one_set ? 0 : h);
    victim(id, h) = keep(id, h) < lengths(id, h) ? own : -1;
  }
};

}  // namespace detail
}  // namespace kvkeep
