// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Device session: what an engine brings per row goes to its place: keys and values, attention, scores.
#pragma once

#include "../../view/evidence.hpp"
#include "../../view/kv_ref.hpp"

namespace kvkeep::detail {

/// Whether steps on a backend can write rows `from` into a plane: no layout behind host functions, and opaque rows
/// from opaque rows alone.
template <class Space>
bool can_write(plane_ref<Space> const& to, head_vectors const& from) noexcept {
  return to.layout.kind != layout_kind::custom &&
         (to.type == dtype::opaque) == (from.type == dtype::opaque);
}
/// Elements of a row: features, or bytes of an opaque one.
template <class Space>
KVKEEP_HD index_t row_elements(plane_ref<Space> const& p) noexcept {
  return p.type == dtype::opaque ? p.row_bytes : p.dim;
}

/// Writes keys and values of one token per entry, rounded to the cache's type, into the slots it has been given.
/// Index: (entry * n_kv_heads + head) * (elements of a key row and a value row) + element. Bytes: the rows, read and
/// written.
template <class Space>
struct write_token_kv {
  kv_ref<Space> kv;
  batch_ref<Space> batch;
  token_kv from;
  index_t const* slots;  ///< [entry, kv_head]; -1: nothing is written

  KVKEEP_HD index_t elements() const noexcept { return row_elements(kv.k) + row_elements(kv.v); }
  KVKEEP_HD void operator()(index_t i) const noexcept {
    index_t const of_key = row_elements(kv.k), heads = kv.shape.n_kv_heads;
    index_t const place = i / elements(), d = i % elements(), slot = slots[place];
    if (slot < 0) return;
    index_t const entry = place / heads, h = place % heads, row = batch.row_of(entry);
    if (d < of_key)
      write(kv.k, row, h, slot, d, from.k, entry);
    else
      write(kv.v, row, h, slot, d - of_key, from.v, entry);
  }

 private:
  KVKEEP_HD static void write(plane_ref<Space> const& to, index_t row, index_t h, index_t slot,
                              index_t d, head_vectors const& from, index_t entry) noexcept {
    any_layout const& l = to.layout;
    offset_t const at = (l.kind == layout_kind::paged    ? l.paged.offset(row, h, slot)
                         : l.kind == layout_kind::ragged ? l.ragged.offset(row, h, slot)
                                                         : l.strided.offset(row, h, slot)) +
                        to.features(d);
    offset_t const source = entry * from.entry_stride + h * from.head_stride + d;
    if (to.type == dtype::opaque) {
      to.data[at] = static_cast<std::byte const*>(from.data)[source];
      return;
    }
    float const x = number_at(from.data, from.type, source);
    switch (to.type) {
      case dtype::f16:
        reinterpret_cast<fp16*>(to.data)[at] = to_fp16(x);
        break;
      case dtype::bf16:
        reinterpret_cast<bf16*>(to.data)[at] = to_bf16(x);
        break;
      default:
        reinterpret_cast<float*>(to.data)[at] = x;
    }
  }
};

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
