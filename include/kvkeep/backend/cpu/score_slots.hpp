// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CPU: functors per slot and per index.
#pragma once

#include "../../op/score_slots.hpp"
#include "rows.hpp"

namespace kvkeep::cpu {
inline namespace KVKEEP_CPU_ISA {

/// One row as floats: where it lies if it is such already, else a copy. @param copy [dim]
inline float const* float_row(head_rows const& h, index_t slot, float* copy) noexcept {
  plane const& p = *h.p;
  offset_t const at =
      visit_layout(p.layout, [&](auto const& l) { return l.offset(h.seq, h.head, slot); });
  visit_type(p.type, [&](auto const* type) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
    T const* const row = reinterpret_cast<T const*>(p.data) + at;
    if constexpr (std::is_same_v<T, float>) {
      if (p.contiguous()) {
        copy = const_cast<float*>(row);
        return;
      }
    }
    read_row(p, row, copy);
  });
  return copy;
}

/// Fetches the one slot that a later head scores: its rows were written long ago, or elsewhere.
template <class Fn>
void prefetch_only(op::score_slots<Fn, host_space> const& o, index_t b, index_t h) noexcept {
  index_t const slot = o.only(o.batch.id_of(b), h), seq = o.batch.row_of(b);
  auto const fetch = [&](plane const& p) {
    if (slot < 0 || !direct(p)) return;
    offset_t const at =
        visit_layout(p.layout, [&](auto const& l) { return l.offset(seq, h, slot); });
    prefetch_row(p.data + at * dtype_bytes(p.type), p.row_bytes);
  };
  if constexpr (Fn::reads_k) fetch(o.layer.kv.k);
  if constexpr (Fn::reads_v) fetch(o.layer.kv.v);
}

/// Scores every slot by a functor. Cost: the rows that it reads, converted one by one.
template <class Fn>
status enqueue(context& c, op::score_slots<Fn, host_space> const& o, workspace& ws) noexcept {
  kv_ref<host_space> const& kv = o.layer.kv;
  if ((Fn::reads_k && !readable(kv.k)) || (Fn::reads_v && !readable(kv.v)))
    return status::unsupported;
  if (!slots_contiguous(o.out) || !slots_contiguous(o.layer.slots.positions) || o.first_slot < 0)
    return status::bad_argument;
  workspace::frame const frame(ws);
  int const workers = c.workers(o.batch.n * kv.shape.n_kv_heads);
  std::size_t const dims = size_of(kv.shape.dim_k) + size_of(kv.shape.dim_v);
  auto const copies = take_each<float>(ws, workers, dims);
  if (!placed(ws)) return not_placed(ws);
  for_heads(c, o.batch.n, kv.shape.n_kv_heads, [&](index_t b, index_t h, int worker) {
    index_t const id = o.batch.id_of(b), seq = o.batch.row_of(b), n = o.layer.slots.lengths(id, h);
    index_t const* const positions = o.layer.slots.positions.at(id, h, 0);
    float* const out = o.out.at(o.out_by_id ? id : b, h, 0);
    float* const copy = copies(worker);
    slot_values v;
    v.seen = o.seen != nullptr ? o.seen[id] : 0;
    v.dim_k = kv.shape.dim_k;
    v.dim_v = kv.shape.dim_v;
    v.entry = b;
    v.head = h;
    index_t first = o.first_slot, last = n;
    if (o.only.data != nullptr) {
      with_next_head(o.batch.n, kv.shape.n_kv_heads, b, h,
                     [&](index_t b2, index_t h2) { prefetch_only(o, b2, h2); });
      first = o.only(id, h);
      last = first >= 0 ? std::min(first + 1, n) : first;
    }
    for (index_t j = first; j < last; ++j) {
      v.position = positions[j];
      v.slot = j;
      if constexpr (Fn::reads_k) v.k = float_row({&kv.k, seq, h}, j, copy);
      if constexpr (Fn::reads_v) v.v = float_row({&kv.v, seq, h}, j, copy + kv.shape.dim_k);
      out[j] = o.fn(static_cast<slot_values const&>(v));
    }
  });
  return status::ok;
}

/// fn(0), fn(1), ... in order.
template <class Fn>
status enqueue(context&, op::for_each<Fn, host_space> const& o, workspace& ws) noexcept {
  if (!placed(ws)) return not_placed(ws);
  Fn fn = o.fn;
  for (index_t i = 0; i < o.n; ++i) fn(i);
  return status::ok;
}

}  // namespace KVKEEP_CPU_ISA
}  // namespace kvkeep::cpu
