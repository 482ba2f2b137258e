// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Small per-index steps of a session, run by the backend's for_each so that state may live on a device.
#pragma once

#include "../view/evidence.hpp"
#include "state.hpp"

namespace kvkeep::detail {

template <class T>
KVKEEP_HD void load_row(T const* from, index_t dim, float* to) noexcept {
  for (index_t d = 0; d < dim; ++d) to[d] = to_float(from[d]);
}

/// One query row as fp32.
KVKEEP_HD inline void load_row(queries const& q, offset_t at, index_t dim, float* to) noexcept {
  switch (q.type) {
    case dtype::f16:
      return load_row(static_cast<fp16 const*>(q.data) + at, dim, to);
    case dtype::bf16:
      return load_row(static_cast<bf16 const*>(q.data) + at, dim, to);
    default:
      return load_row(static_cast<float const*>(q.data) + at, dim, to);
  }
}

KVKEEP_HD inline float natural_lse(queries const& q, offset_t entry, offset_t head,
                                   offset_t row) noexcept {
  float const v = q.lse[entry * q.lse_entry_stride + head * q.lse_head_stride + row];
  return q.lse_base == log_base::two ? v * 0.693147180559945309F : v;
}

/// Gives `n` new tokens the tail slots of one sequence; index: KV head.
template <class Space>
struct extend_head {
  slot_state<Space> s;
  index_t id;        ///< state row
  index_t position;  ///< of the first new token
  index_t n;
  index_t own_rows;  ///< scorer rows to clear
  KVKEEP_HD void operator()(index_t h) const noexcept {
    index_t const first = s.lengths(id, h);
    for (index_t t = 0; t < n; ++t) s.positions(id, h, first + t) = position + t;
    for (index_t r = 0; r < own_rows; ++r)
      for (index_t t = 0; t < n; ++t) s.rows(id, h, r, first + t) = 0;
    s.lengths(id, h) = first + n;
  }
};

/// Stores query rows in the ring; index: query head * count + row.
template <class Space>
struct push_queries {
  queries q;
  index_t entry;  ///< batch entry of q
  index_t id;     ///< row of the ring
  index_t first;  ///< row of q that comes first
  index_t count;
  index_t position;  ///< of row `first`
  index_t dim;
  tensor_ref<float, 4, Space> ring_q;
  tensor_ref<float, 3, Space> ring_lse;
  KVKEEP_HD void operator()(index_t i) const noexcept {
    index_t const head = i / count;
    index_t const row = first + i % count;
    index_t const at = (position + i % count) % ring_q.extent[2];
    offset_t const src = entry * q.entry_stride + head * q.head_stride + row * q.row_stride;
    load_row(q, src, dim, ring_q.at(id, head, at));
    if (q.lse != nullptr) ring_lse(id, head, at) = natural_lse(q, entry, head, row);
  }
};

/// Copies query rows to a dense fp32 block `[1, q_head, count, dim]`; index: query head * count + row.
template <class Space>
struct copy_queries {
  queries q;
  index_t entry;
  index_t first;
  index_t count;
  index_t position;  ///< of row `first`
  index_t dim;
  float* out;
  float* lse;
  index_t* out_position;
  KVKEEP_HD void operator()(index_t i) const noexcept {
    index_t const head = i / count;
    index_t const row = first + i % count;
    offset_t const src = entry * q.entry_stride + head * q.head_stride + row * q.row_stride;
    load_row(q, src, dim, out + static_cast<offset_t>(i) * dim);
    if (lse != nullptr) lse[i] = natural_lse(q, entry, head, row);
    if (head == 0) out_position[i % count] = position + i % count;
  }
};

/// Unconfirmed tokens did not see the one that comes after them and takes a slot.
/// @param pending  how many of them there are
template <class Space>
KVKEEP_HD void hide_from_drafts(layer_state<Space> const& l, row_plan const& rows, index_t id,
                                index_t h, index_t slot, index_t position,
                                index_t pending) noexcept {
  index_t const group = l.weight_sum.extent[2];
  for (index_t u = 1; u <= pending && rows.weight_ring > 0; ++u) {
    index_t const ring_row = (position - u) % rows.weight_ring;
    for (index_t g = 0; g < group; ++g)
      l.slots.rows(id, h, rows.weights_at + g * rows.weight_ring + ring_row, slot) = 0;
  }
}

/// Gives every head of every entry a slot for one token: its free slot, else the tail.
/// Index: entry * n_kv_heads + head.
template <class Space>
struct append_token {
  layer_state<Space> l;
  row_plan rows;
  index_t const* id;        ///< [entry]
  index_t const* position;  ///< [entry]
  index_t const* pending;   ///< [entry] unconfirmed tokens before this one
  index_t n_kv_heads;
  index_t* out;  ///< [entry, kv_head] or null
  KVKEEP_HD void operator()(index_t i) const noexcept {
    index_t const entry = i / n_kv_heads, h = i % n_kv_heads, s = id[entry];
    index_t const free = l.victim(s, h);
    index_t const slot = free >= 0 ? free : l.slots.lengths(s, h)++;
    l.victim(s, h) = -1;
    l.slots.positions(s, h, slot) = position[entry];
    l.fresh(pending[entry], s, h) = slot;
    for (index_t r = 0; r < rows.weights_at; ++r) l.slots.rows(s, h, r, slot) = 0;
    hide_from_drafts(l, rows, s, h, slot, position[entry], pending[entry]);
    if (out != nullptr) out[i] = slot;
  }
};

/// Drops the newest unconfirmed token of one sequence; index: KV head.
template <class Space>
struct drop_token {
  layer_state<Space> l;
  index_t id;
  index_t pending;  ///< its index among the unconfirmed tokens
  KVKEEP_HD void operator()(index_t h) const noexcept {
    index_t const slot = l.fresh(pending, id, h);
    if (slot == l.slots.lengths(id, h) - 1)
      --l.slots.lengths(id, h);
    else
      l.victim(id, h) = slot;
  }
};

/// Own scores or attention rows of the engine into one state row; index: entry * heads + head.
template <class Space>
struct copy_slot_row {
  float const* src;
  offset_t entry_stride, head_stride;
  index_t heads;
  index_t group;       ///< heads per KV head (1 for KV heads)
  index_t const* id;   ///< [entry]
  index_t const* row;  ///< [entry] state row of head 0 of the group
  index_t row_step;    ///< state rows between heads of a group
  slot_state<Space> s;
  KVKEEP_HD void operator()(index_t i) const noexcept {
    index_t const entry = i / heads, head = i % heads, h = head / group;
    float const* const from = src + entry * entry_stride + head * head_stride;
    float* const to = s.rows.at(id[entry], h, row[entry] + head % group * row_step);
    for (index_t j = 0; j < s.lengths(id[entry], h); ++j) to[j] = from[j];
  }
};

/// Given probabilities need no normaliser; index: query head.
template <class Space>
struct unit_sum {
  tensor_ref<float, 4, Space> sum;  ///< [id, kv_head, g, ring row]
  index_t id;
  index_t row;
  KVKEEP_HD void operator()(index_t q_head) const noexcept {
    sum(id, q_head / sum.extent[2], q_head % sum.extent[2], row) = 1;
  }
};

/// The drafts that stay unconfirmed move to the front of the list; index: KV head.
template <class Space>
struct shift_drafts {
  tensor_ref<index_t, 3, Space> fresh;  ///< [draft, id, kv_head]
  index_t id;
  index_t by;
  index_t n;
  KVKEEP_HD void operator()(index_t h) const noexcept {
    for (index_t t = 0; t < n; ++t) fresh(t, id, h) = fresh(t + by, id, h);
  }
};

/// Heads for which nothing is due keep all their tokens; index: entry * n_kv_heads + head.
template <class Space>
struct drop_idle_victims {
  slot_state<Space> s;
  tensor_ref<index_t, 2, Space> keep;  ///< [id, head]
  tensor_ref<index_t, 2, Space> victim;
  index_t const* id;
  index_t n_kv_heads;
  KVKEEP_HD void operator()(index_t i) const noexcept {
    index_t const at = id[i / n_kv_heads], h = i % n_kv_heads;
    if (keep(at, h) >= s.lengths(at, h)) victim(at, h) = -1;
  }
};

/// One set for all heads: the first head's victim is everybody's; index: entry * n_kv_heads + head.
template <class Space>
struct share_victim {
  tensor_ref<index_t, 2, Space> victim;
  index_t const* id;
  index_t n_kv_heads;
  KVKEEP_HD void operator()(index_t i) const noexcept {
    victim(id[i / n_kv_heads], i % n_kv_heads) = victim(id[i / n_kv_heads], 0);
  }
};

/// Fixes a budget for decoding, which keeps at least what it protects: a decision that cannot be carried out would stay
/// due for ever. Index: KV head.
template <class Space>
struct fix_budget {
  tensor_ref<index_t, 2, Space> from;  ///< [layer, head] the prompt's, or null: written already
  index_t layer;
  tensor_ref<index_t, 2, Space> to;  ///< [id, head]
  index_t id;
  index_t least;          ///< least_budget: what sinks and recent tokens take
  index_t const* frozen;  ///< [id]
  index_t beyond;         ///< recent tokens, which stay besides frozen ones
  index_t block;          ///< slots that leave together
  KVKEEP_HD void operator()(index_t h) const noexcept {
    index_t k = from.data != nullptr ? from(layer, h) : to(id, h);
    index_t const blocks = (frozen[id] + block - 1) / block + (beyond + block - 1) / block;
    index_t const prefix = frozen[id] > 0 ? blocks * block : 0;
    k = k > prefix ? k : prefix;
    to(id, h) = k > least ? k : least;
  }
};

/// Tokens that a decision keeps: what the budget says where a cut is due, else everything.
/// Index: entry * n_kv_heads + head.
template <class Space>
struct resolve_keep {
  tensor_ref<index_t const, 2, Space> k;  ///< [id, head]
  slot_state<Space> s;
  index_t const* k_id;  ///< [entry] row of k
  index_t const* id;    ///< [entry] row of s
  index_t n_kv_heads;
  cut_rule rule;
  index_t extra;                      ///< slots beyond k (decisions before attention keep C + 1)
  index_t least;                      ///< heads with fewer tokens stay whole
  tensor_ref<index_t, 2, Space> out;  ///< [id, head]
  KVKEEP_HD void operator()(index_t i) const noexcept {
    index_t const entry = i / n_kv_heads, h = i % n_kv_heads;
    index_t const n = s.lengths(id[entry], h), budget = k(k_id[entry], h);
    bool const due = n >= least && rule.due(n, budget, extra);
    out(id[entry], h) = due ? rule.kept(budget, extra) : n;
  }
};

}  // namespace kvkeep::detail
