// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Per-index steps of a device session whose engine allocates and commits itself: all layers of a sequence at a time.
#pragma once

#include "device_steps.hpp"
#include "tables.hpp"

namespace kvkeep::detail {

/// Heads of all layers. Index: entry * each_entry() + layer * n_kv_heads + head.
template <class Space>
struct every_layer {
  layer_state<Space> const* layers;  ///< in the backend's memory
  index_t n_layers;
  index_t n_kv_heads;
  batch_ref<Space> batch;
  KVKEEP_HD index_t each_entry() const noexcept { return n_layers * n_kv_heads; }
  KVKEEP_HD index_t entry(index_t i) const noexcept { return i / each_entry(); }
  KVKEEP_HD index_t head(index_t i) const noexcept { return i % n_kv_heads; }
  KVKEEP_HD layer_state<Space> const& layer(index_t i) const noexcept {
    return layers[i / n_kv_heads % n_layers];
  }
  /// What was found of an entry's heads.
  KVKEEP_HD index_t joined(index_t const* found, index_t entry) const noexcept {
    index_t all = 0;
    for (index_t i = 0; i < each_entry(); ++i) all |= found[entry * each_entry() + i];
    return all;
  }
};

/// What stands against giving a token the tail slot of every head. Index: that of every_layer.
template <class Space>
struct find_tail_faults {
  every_layer<Space> at;
  tensor_ref<index_t, 3, Space> n_kept;  ///< of plan_memory
  index_t const* faults;                 ///< [id]
  std::int64_t const* slot_mapping;      ///< [entry] where the engine writes the token, or null
  index_t* found;                        ///< [entry, layer, kv_head]
  index_t drafts;                        ///< of fault_of_next
  index_t* position;                     ///< [entry, layer] of the next token
  KVKEEP_HD void operator()(index_t i) const noexcept {
    layer_state<Space> const& l = at.layer(i);
    index_t const e = at.entry(i), h = at.head(i), id = at.batch.id_of(e), row = at.batch.row_of(e);
    if (h == 0) position[i / at.n_kv_heads] = drafts > 0 ? l.appended[id] : l.seen[id];
    index_t fault = stops(faults[id]) | table_fault(n_kept, l.number, id, h);
    if (l.victim(id, h) >= 0) fault |= static_cast<index_t>(device_fault::bad_order);
    fault |= fault_of_next(l, id, row, h, drafts);
    if (i % at.each_entry() == 0) fault |= fault_of_entry(at.batch, e);
    if (fault == 0 && slot_mapping != nullptr && l.kv.k.layout.kind == layout_kind::paged) {
      auto const& pages = l.kv.k.layout.paged;
      index_t const slot = l.slots.lengths(id, h), size = pages.block_size;
      std::int64_t const own = std::int64_t{pages.entry(row, h, slot / size)} * size + slot % size;
      if (own != slot_mapping[e]) fault = static_cast<index_t>(device_fault::wrong_slot);
    }
    found[i] = fault;
  }
};

/// Gives every head of an entry its tail slot in every layer, or none at all. Index: that of every_layer.
template <class Space>
struct take_tails {
  every_layer<Space> at;
  row_plan rows;
  index_t const* found;       ///< [entry, layer, kv_head] of find_tail_faults
  index_t const* position;    ///< [entry, layer]
  index_t* faults;            ///< [id]
  std::uint32_t* generation;  ///< [id]
  KVKEEP_HD void operator()(index_t i) const noexcept {
    layer_state<Space> const& l = at.layer(i);
    index_t const e = at.entry(i), h = at.head(i), id = at.batch.id_of(e);
    index_t const fault = at.joined(found, e);
    if (i % at.each_entry() == 0) {
      if (fault != 0) faults[id] |= fault;
      ++generation[id];
    }
    if (fault != 0) return;
    index_t const here = position[i / at.n_kv_heads];
    if (h == 0) l.appended[id] = here + 1;
    (void)take_slot(l, rows, id, h, here);
  }
};

/// Whether heads may be decided on: every token has had its evidence, tables are as the session knows them, and the
/// sequence is the one of `stamped`. Index: that of every_layer.
template <class Space>
struct find_unready {
  every_layer<Space> at;
  tensor_ref<index_t, 3, Space> n_kept;
  std::uint32_t const* generation;  ///< [id]
  std::uint32_t const* stamped;     ///< [entry] of a plan, or null
  index_t* found;                   ///< [entry, layer, kv_head]
  KVKEEP_HD void operator()(index_t i) const noexcept {
    layer_state<Space> const& l = at.layer(i);
    index_t const e = at.entry(i), h = at.head(i), id = at.batch.id_of(e);
    bool const stale = stamped != nullptr && stamped[e] != generation[id];
    bool const open = l.appended[id] != l.seen[id];
    found[i] = stale  ? static_cast<index_t>(device_fault::stale_plan)
               : open ? static_cast<index_t>(device_fault::bad_order)
                      : table_fault(n_kept, l.number, id, h);
  }
};

/// A plan is for the sequences as they are now. Index: entry.
template <class Space>
struct stamp_plan {
  every_layer<Space> at;
  index_t const* found;  ///< of find_unready
  index_t* faults;       ///< [id]
  std::uint32_t const* generation;
  plan_memory<Space> p;
  KVKEEP_HD void operator()(index_t e) const noexcept {
    index_t const id = at.batch.id_of(e);
    faults[id] |= at.joined(found, e);
    p.row[e] = at.batch.row_of(e);
    p.id[e] = id;
    p.generation[e] = generation[id];
  }
};

/// A plan is applied to the sequences that are as it found them. Index: entry.
template <class Space>
struct admit_plan {
  every_layer<Space> at;
  index_t const* found;  ///< of find_unready
  index_t* faults;       ///< [id]
  std::uint32_t* generation;
  index_t* refused;  ///< [entry] 0: applied
  KVKEEP_HD void operator()(index_t e) const noexcept {
    index_t const id = at.batch.id_of(e);
    refused[e] = at.joined(found, e);
    faults[id] |= refused[e];
    if (refused[e] == 0) ++generation[id];
  }
};

/// A sequence is not the one that it was; index: 0.
struct next_generation {
  std::uint32_t* generation;  ///< [id]
  index_t id;
  KVKEEP_HD void operator()(index_t) const noexcept { ++generation[id]; }
};

/// Before a layer's part of a plan is applied: as `lengths` the slots in use, 0 where it is refused: ops leave those
/// alone. Index: entry * n_kv_heads + head.
template <class Space>
struct open_commit {
  note_held<Space> note;
  batch_ref<Space> batch;
  tensor_ref<index_t, 2, Space> count;    ///< [entry, head] of the plan
  index_t const* refused;                 ///< [entry]
  tensor_ref<index_t, 2, Space> lengths;  ///< [id, head]
  KVKEEP_HD void operator()(index_t i) const noexcept {
    index_t const heads = count.extent[1], e = i / heads, h = i % heads, id = batch.id_of(e);
    bool const applies = refused[e] == 0;
    lengths(id, h) = applies ? note.slots.lengths(id, h) : 0;
    if (applies)
      note(id, h);
    else
      count(e, h) = 0;
  }
};

/// After it: the slots in use are those that the plan has left. Index: entry * n_kv_heads + head.
template <class Space>
struct close_commit {
  slot_state<Space> s;
  batch_ref<Space> batch;
  index_t const* refused;                 ///< [entry]
  tensor_ref<index_t, 2, Space> lengths;  ///< [id, head]
  KVKEEP_HD void operator()(index_t i) const noexcept {
    index_t const heads = lengths.extent[1], e = i / heads, h = i % heads, id = batch.id_of(e);
    if (refused[e] == 0) s.lengths(id, h) = lengths(id, h);
  }
};

/// Copies a layer's arrays' addresses to where the backend reads them; index: 0.
template <class Space>
struct store_layer {
  layer_state<Space> l;
  layer_state<Space>* to;
  KVKEEP_HD void operator()(index_t) const noexcept { *to = l; }
};

}  // namespace kvkeep::detail
