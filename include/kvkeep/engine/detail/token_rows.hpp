// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Keys and values of new tokens into the slots that they have been given.
#pragma once

#include <cstring>

#include "../../view/evidence.hpp"
#include "../../view/kv_ref.hpp"

namespace kvkeep::detail {

/// Whether rows `from` can become a plane's: opaque rows from opaque ones alone.
template <class Space>
bool same_kind(plane_ref<Space> const& to, head_vectors const& from) noexcept {
  return (to.type == dtype::opaque) == (from.type == dtype::opaque);
}
/// Elements of a row: features, or bytes of an opaque one.
template <class Space>
KVKEEP_HD index_t row_elements(plane_ref<Space> const& p) noexcept {
  return p.type == dtype::opaque ? p.row_bytes : p.dim;
}

/// Whether the new rows' bytes are those to be stored.
template <class Space>
KVKEEP_HD bool stored_as_is(plane_ref<Space> const& to, head_vectors const& from) noexcept {
  return to.type == from.type && (from.scale == 1 || to.type == dtype::opaque);
}

/// Element `source` of the new rows as element `at` of a plane, rounded to the plane's type.
template <class Space>
KVKEEP_HD void store_element(plane_ref<Space> const& to, offset_t at, head_vectors const& from,
                             offset_t source) noexcept {
  if (dtype_bytes(to.type) == 1 && stored_as_is(to, from)) {
    to.data[at] = static_cast<std::byte const*>(from.data)[source];
    return;
  }
  float const x = from.scale * number_at(from.data, from.type, source);
  switch (to.type) {
    case dtype::f16:
      reinterpret_cast<fp16*>(to.data)[at] = to_fp16(x);
      break;
    case dtype::bf16:
      reinterpret_cast<bf16*>(to.data)[at] = to_bf16(x);
      break;
    case dtype::e4m3:
      reinterpret_cast<fp8_e4m3*>(to.data)[at] = to_e4m3(x);
      break;
    case dtype::e5m2:
      reinterpret_cast<fp8_e5m2*>(to.data)[at] = to_e5m2(x);
      break;
    default:
      reinterpret_cast<float*>(to.data)[at] = x;
  }
}

/// A token per entry, where a thread is cheap. Custom layouts are the host's alone (see write_token_rows).
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
    offset_t const at = l.kind == layout_kind::paged    ? l.paged.offset(row, h, slot)
                        : l.kind == layout_kind::ragged ? l.ragged.offset(row, h, slot)
                                                        : l.strided.offset(row, h, slot);
    store_element(to, at + to.features(d), from,
                  entry * from.entry_stride + h * from.head_stride + d);
  }
};

/// The same on the host, a row at a time, in any layout. Index: entry * n_kv_heads + head.
struct write_token_rows {
  kv_ref<> kv;
  batch_ref<> batch;
  token_kv from;
  index_t const* slots;  ///< [entry, kv_head]

  void operator()(index_t i) const noexcept {
    write(kv.k, i, from.k);
    write(kv.v, i, from.v);
  }

 private:
  void write(plane_ref<> const& to, index_t i, head_vectors const& rows) const noexcept {
    index_t const entry = i / kv.shape.n_kv_heads, h = i % kv.shape.n_kv_heads;
    offset_t const at = visit_layout(
        to.layout, [&](auto const& l) { return l.offset(batch.row_of(entry), h, slots[i]); });
    offset_t const source = entry * rows.entry_stride + h * rows.head_stride;
    index_t const n = row_elements(to);
    if (stored_as_is(to, rows) && to.contiguous()) {
      auto const bytes = static_cast<offset_t>(dtype_bytes(to.type));
      std::memcpy(to.data + at * bytes, static_cast<std::byte const*>(rows.data) + source * bytes,
                  static_cast<std::size_t>(n * bytes));
      return;
    }
    for (index_t d = 0; d < n; ++d) store_element(to, at + to.features(d), rows, source + d);
  }
};

}  // namespace kvkeep::detail
