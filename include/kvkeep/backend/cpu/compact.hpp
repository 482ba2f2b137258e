// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CPU: moves the survivors of a keep plan.
#pragma once

#include "../../op/compact.hpp"
#include "rows.hpp"

namespace kvkeep::cpu {
inline namespace KVKEEP_CPU_ISA {

/// Moves of one head: slot from[i] goes to to[i], or to `i` where there is no list. Ascending, and
/// in place never upwards onto a slot that is still to be read.
struct slot_moves {
  index_t const* from = nullptr;  ///< [n]
  index_t const* to = nullptr;    ///< [n] or null: 0, 1, 2, ...
  index_t n = 0;

  index_t target(index_t i) const noexcept { return to != nullptr ? to[i] : i; }
};

/// Bytes of a row whose features are contiguous.
inline std::size_t row_size(plane const& p) noexcept {
  return p.type == dtype::opaque ? size_of(p.row_bytes) : size_of(p.dim * dtype_bytes(p.type));
}

/// Byte address of each listed slot. @param out [n]
inline void byte_rows(head_rows const& h, index_t const* slots, index_t n,
                      std::byte** out) noexcept {
  offset_t const size = dtype_bytes(h.p->type);
  visit_layout(h.p->layout, [&](auto const& l) {
    for (index_t i = 0; i < n; ++i) out[i] = h.p->data + l.offset(h.seq, h.head, slots[i]) * size;
  });
}

/// Copies features one by one between planes of one element type.
template <class E>
void move_features(plane const& from, std::byte const* src, plane const& to,
                   std::byte* dst) noexcept {
  E const* const s = reinterpret_cast<E const*>(src);
  E* const d = reinterpret_cast<E*>(dst);
  for (index_t i = 0; i < from.dim; ++i) d[to.features(i)] = s[from.features(i)];
}

/// Moves up to `row_chunk` rows; neighbours that stay neighbours move in one piece.
inline void move_rows(plane const& from, plane const& to, std::byte* const* src,
                      std::byte* const* dst, index_t n) noexcept {
  if (!from.contiguous() || !to.contiguous()) {
    for (index_t i = 0; i < n; ++i) {
      if (src[i] == dst[i]) continue;
      switch (dtype_bytes(from.type)) {
        case 4:
          move_features<std::uint32_t>(from, src[i], to, dst[i]);
          break;
        case 2:
          move_features<std::uint16_t>(from, src[i], to, dst[i]);
          break;
        default:
          move_features<std::uint8_t>(from, src[i], to, dst[i]);
      }
    }
    return;
  }
  std::size_t const size = row_size(from);
  for (index_t i = 0; i < n;) {
    index_t end = i + 1;
    while (end < n && src[end] == src[end - 1] + size && dst[end] == dst[end - 1] + size) ++end;
    // The pieces may overlap when slots move down by less than a piece.
    if (src[i] != dst[i]) std::memmove(dst[i], src[i], size * size_of(end - i));
    i = end;
  }
}

inline void move_plane(head_rows const& from, head_rows const& to, slot_moves const& m) noexcept {
  std::byte* src[row_chunk];
  std::byte* dst[row_chunk];
  index_t target[row_chunk];
  for (index_t at = 0; at < m.n; at += row_chunk) {
    index_t const n = std::min(row_chunk, m.n - at);
    for (index_t i = 0; i < n; ++i) target[i] = m.target(at + i);
    byte_rows(from, m.from + at, n, src);
    byte_rows(to, target, n, dst);
    move_rows(*from.p, *to.p, src, dst, n);
  }
}

/// One head's source and destination.
struct compact_head {
  index_t from_id = 0, from_seq = 0, to_id = 0, to_seq = 0, head = 0;
};

inline void move_state(slot_state<host_space> const& from, slot_state<host_space> const& to,
                       compact_head const& at, slot_moves const& m) noexcept {
  index_t const* const p = from.positions.at(at.from_id, at.head, 0);
  index_t* const q = to.positions.at(at.to_id, at.head, 0);
  for (index_t i = 0; i < m.n; ++i) q[m.target(i)] = p[m.from[i]];
  if (from.rows.data == nullptr || to.rows.data == nullptr) return;
  index_t const rows = std::min(from.rows.extent[2], to.rows.extent[2]);
  for (index_t r = 0; r < rows; ++r) {
    float const* const s = from.rows.at(at.from_id, at.head, r, 0);
    float* const d = to.rows.at(at.to_id, at.head, r, 0);
    for (index_t i = 0; i < m.n; ++i) d[m.target(i)] = s[m.from[i]];
  }
}

/// Moves of `fill_holes`: the kept slots beyond the new length, into the slots below it that are
/// not kept.
/// @param kept [count] ascending  @param holes [count] scratch for the targets
inline slot_moves hole_moves(index_t const* kept, index_t count, index_t* holes) noexcept {
  index_t const stay = static_cast<index_t>(std::lower_bound(kept, kept + count, count) - kept);
  index_t n = 0;
  for (index_t slot = 0, i = 0; slot < count; ++slot) {
    if (i < stay && kept[i] == slot)
      ++i;
    else
      holes[n++] = slot;
  }
  return {kept + stay, holes, n};
}

/// Everything that can be refused, before anything moves.
inline status check_compact(op::compact<host_space> const& o) noexcept {
  kv_ref<host_space> const& a = o.from.kv;
  kv_ref<host_space> const& b = o.to.kv;
  if (!op::same_rows(a.k, b.k) || !op::same_rows(a.v, b.v) || o.batch.n != o.to_batch.n ||
      a.shape.n_kv_heads != b.shape.n_kv_heads || !slots_contiguous(o.plan.slots) ||
      !slots_contiguous(o.from.slots.positions) || !slots_contiguous(o.to.slots.positions) ||
      !slots_contiguous(o.from.slots.rows) || !slots_contiguous(o.to.slots.rows))
    return status::bad_argument;
  for (index_t e = 0; e < o.batch.n; ++e) {
    index_t const from = o.batch.row_of(e), to = o.to_batch.row_of(e);
    if (o.how != op::move_kind::pack && (a.k.data != b.k.data || a.v.data != b.v.data ||
                                         from != to || o.batch.id_of(e) != o.to_batch.id_of(e)))
      return status::bad_argument;
    for (index_t h = 0; h < a.shape.n_kv_heads; ++h) {
      auto const room = [&](plane const& p) {
        return visit_layout(p.layout, [&](auto const& l) { return l.capacity(to, h); });
      };
      index_t const limit = std::min({room(b.k), room(b.v), b.shape.max_slots});
      if (o.plan.count(e, h) > limit) return status::capacity_exceeded;
    }
  }
  return status::ok;
}

/// Applies a keep plan. Cost: 2 bytes of traffic per byte of each slot that moves.
KVKEEP_CPU_OP status enqueue(context& c, op::compact<host_space> const& o, workspace& ws) noexcept {
  index_t const heads = o.from.kv.shape.n_kv_heads;
  workspace::frame const frame(ws);
  auto const holes =
      take_each<index_t>(ws, c.workers(o.batch.n * heads),
                         o.how == op::move_kind::fill_holes ? size_of(o.to.kv.shape.max_slots) : 0);
  if (!placed(ws)) return not_placed(ws);
  KVKEEP_TRY(check_compact(o));
  for_heads(c, o.batch.n, heads, [&](index_t e, index_t h, int worker) {
    compact_head const at{o.batch.id_of(e), o.batch.row_of(e), o.to_batch.id_of(e),
                          o.to_batch.row_of(e), h};
    index_t const* const kept = o.plan.slots.at(e, h, 0);
    index_t const count = o.plan.count(e, h);
    slot_moves const m = o.how == op::move_kind::fill_holes ? hole_moves(kept, count, holes(worker))
                                                            : slot_moves{kept, nullptr, count};
    if (o.how != op::move_kind::renumber) {
      move_plane({&o.from.kv.k, at.from_seq, h}, {&o.to.kv.k, at.to_seq, h}, m);
      move_plane({&o.from.kv.v, at.from_seq, h}, {&o.to.kv.v, at.to_seq, h}, m);
    }
    move_state(o.from.slots, o.to.slots, at, m);
    o.to.slots.lengths(at.to_id, h) = count;
  });
  return status::ok;
}

}  // namespace KVKEEP_CPU_ISA
}  // namespace kvkeep::cpu
