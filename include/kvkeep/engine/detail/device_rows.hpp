// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Device session: what an engine brings per row goes to its place: attention and scores (keys and values:
/// token_rows.hpp).
#pragma once

#include "token_rows.hpp"

namespace kvkeep::detail {

/// Whether a backend can write rows `from` into a plane: no layout behind host functions.
template <class Space>
bool can_write(plane_ref<Space> const& to, head_vectors const& from) noexcept {
  return to.layout.kind != layout_kind::custom && same_kind(to, from);
}

/// Floats per slot in use that an engine brings, and the state rows that they belong to.
struct row_evidence {
  float const* data = nullptr;
  offset_t entry_stride = 0, head_stride = 0;
  index_t heads = 0;      ///< rows of an entry
  index_t group = 1;      ///< rows of a KV head
  index_t first_row = 0;  ///< state row of a KV head's first one
  index_t row_step = 0;   ///< state rows between them
  bool of_ring = false;   ///< the newest token's row of a ring is added to that
};

/// Stores them. Index: (entry * heads + head) * max_slots + slot.
template <class Space>
struct store_slot_rows {
  slot_state<Space> s;
  batch_ref<Space> batch;
  row_evidence from;
  index_t const* ring_row;  ///< [entry], or null
  /// [id, kv_head, g, ring row] is set to 1, or null: given probabilities need no normaliser
  tensor_ref<float, 4, Space> sum;
  index_t max_slots;

  KVKEEP_HD void operator()(index_t i) const noexcept {
    index_t const slot = i % max_slots, place = i / max_slots;
    index_t const entry = place / from.heads, head = place % from.heads;
    index_t const h = head / from.group, g = head % from.group;
    index_t const id = batch.id_of(entry), ring = ring_row != nullptr ? ring_row[entry] : 0;
    if (sum.data != nullptr && slot == 0) sum(id, h, g, ring) = 1;
    if (slot < s.lengths(id, h))
      s.rows(id, h, from.first_row + g * from.row_step + ring, slot) =
          from.data[entry * from.entry_stride + head * from.head_stride + slot];
  }
};

}  // namespace kvkeep::detail
