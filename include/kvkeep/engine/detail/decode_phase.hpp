// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// A session while decoding: slots, attention with evidence, decisions, drafts.
#pragma once

#include <algorithm>

#include "../session.hpp"

namespace kvkeep {

// -- slots ------------------------------------------------------------------------------------------

template <backend Ctx, class P, class D>
status session<Ctx, P, D>::check_append(layer_data const& l, batch const& b) const noexcept {
  for (std::size_t i = 0; i < b.ids.size(); ++i) {
    index_t const id = b.ids[i];
    index_t const row = b.rows.empty() ? id : b.rows[i];
    index_t const pending = l.appended[id] - shared_.confirmed[id];
    if (l.prompt_done[id] == 0 && l.appended[id] > shared_.confirmed[id]) return status::bad_order;
    if (l.attended[id] != l.appended[id] && limits_.decode != decode_offer::nothing)
      return status::bad_order;
    if (pending >= shape_.drafts) return status::capacity_exceeded;
    bool tail = false;
    for (index_t h = 0; h < shape_.cache.n_kv_heads; ++h) tail = tail || l.victim(id, h) < 0;
    KVKEEP_TRY(check_blocks(l, row, id, tail ? 1 : 0));
  }
  return status::ok;
}

template <backend Ctx, class P, class D>
status session<Ctx, P, D>::take_slots(layer_data& l, batch const& b, index_t* slots,
                                      workspace& w) noexcept {
  auto const n = static_cast<index_t>(b.ids.size());
  workspace::frame const frame(w);
  index_t* ids = w.take<index_t>(b.ids.size());
  index_t* position = w.take<index_t>(b.ids.size());
  index_t* pending = w.take<index_t>(b.ids.size());
  if (!w.ok()) return status::workspace_too_small;
  for (index_t i = 0; i < n; ++i) {
    index_t const id = b.ids[static_cast<std::size_t>(i)];
    ids[i] = id;
    position[i] = l.appended[id];
    pending[i] = l.appended[id] - shared_.confirmed[id];
  }
  index_t const heads = shape_.cache.n_kv_heads;
  KVKEEP_TRY(each(n * heads,
                  detail::append_token<space>{l, shape_.rows, ids, position, pending, heads, slots},
                  w));
  for (index_t i = 0; i < n; ++i) ++l.appended[ids[i]];
  l.count.tokens += n;
  return status::ok;
}

template <backend Ctx, class P, class D>
status session<Ctx, P, D>::append(index_t layer, batch const& b, index_t* slots) noexcept {
  index_t const m = managed(layer);
  if (m == -1) return status::ok;
  if (m < 0) return status::bad_argument;
  KVKEEP_TRY(check_batch(b));
  layer_data& l = layers_[static_cast<std::size_t>(m)];
  KVKEEP_TRY(check_append(l, b));
  workspace w = scratch(m);
  return take_slots(l, b, slots, w);
}

template <backend Ctx, class P, class D>
status session<Ctx, P, D>::append_at(batch const& b, std::int64_t const* slot_mapping) noexcept {
  KVKEEP_TRY(check_batch(b));
  for (auto const& l : layers_) {
    KVKEEP_TRY(check_append(l, b));
    for (std::size_t i = 0; i < b.ids.size(); ++i) {
      index_t const id = b.ids[i], row = b.rows.empty() ? id : b.rows[i];
      for (index_t h = 0; h < shape_.cache.n_kv_heads; ++h) {
        if (l.victim(id, h) >= 0) return status::bad_order;  // the tail is not the next slot
        auto const& layout = l.kv.k.layout;
        if (slot_mapping == nullptr || layout.kind != layout_kind::paged) continue;
        index_t const slot = l.slots.lengths(id, h), block = layout.paged.block_size;
        std::int64_t const at = static_cast<std::int64_t>(layout.paged.entry(row, h, slot / block)) *
                                    block + slot % block;
        if (at != slot_mapping[i]) return status::bad_argument;
      }
    }
  }
  for (auto& l : layers_) {
    workspace w = scratch(l.number);
    KVKEEP_TRY(take_slots(l, b, nullptr, w));
  }
  return status::ok;
}

// -- evidence ---------------------------------------------------------------------------------------

/// Every entry has one appended token in this layer whose evidence is due.
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::check_token(layer_data const& l, batch const& b) const noexcept {
  for (std::size_t i = 0; i < b.ids.size(); ++i) {
    index_t const id = b.ids[i];
    if (l.appended[id] != l.attended[id] + 1 || l.appended[id] <= shared_.confirmed[id])
      return status::bad_order;
    KVKEEP_TRY(check_blocks(l, b.rows.empty() ? id : b.rows[i], id, 0));
  }
  return status::ok;
}

template <backend Ctx, class P, class D>
status session<Ctx, P, D>::attend(index_t layer, batch const& b, queries const& q, float* out,
                                  float* lse) noexcept {
  index_t const m = managed(layer);
  if (m == -1) return status::unsupported;
  if (m < 0 || q.data == nullptr || q.n_rows != 1 || out == nullptr) return status::bad_argument;
  KVKEEP_TRY(check_batch(b));
  layer_data& l = layers_[static_cast<std::size_t>(m)];
  KVKEEP_TRY(check_token(l, b));
  workspace w = scratch(m);
  KVKEEP_TRY(weigh(l, b, q, out, lse, w));
  note_scratch(l, w);
  return status::ok;
}

template <backend Ctx, class P, class D>
status session<Ctx, P, D>::observe(index_t layer, batch const& b, queries const& q) noexcept {
  index_t const m = managed(layer);
  if (m == -1) return status::ok;
  if (m < 0 || q.data == nullptr || q.n_rows != 1) return status::bad_argument;
  if (decode_.when.before_attention || decode_.when.per_head_mask) return status::unsupported;
  KVKEEP_TRY(check_batch(b));
  layer_data& l = layers_[static_cast<std::size_t>(m)];
  KVKEEP_TRY(check_token(l, b));
  workspace w = scratch(m);
  KVKEEP_TRY(weigh(l, b, q, nullptr, nullptr, w));
  note_scratch(l, w);
  return status::ok;
}

/// Attention (or, without `out`, weights alone), the query ring, and what follows a token.
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::weigh(layer_data& l, batch const& b, queries const& q, float* out,
                                 float* lse, workspace& w) noexcept {
  bool const measuring = w.measuring();
  auto const n = measuring ? limits_.max_batch : static_cast<index_t>(b.ids.size());
  auto const size = static_cast<std::size_t>(n);
  index_t const hq = shape_.cache.n_q_heads, dim = shape_.cache.dim_k;
  index_t* ids = w.take<index_t>(size);
  index_t* rows = w.take<index_t>(size);
  index_t* ring_row = w.take<index_t>(size);
  index_t* position = w.take<index_t>(size);
  float* dense = w.take<float>(size * hq * dim);
  if (!measuring) {
    if (!w.ok()) return status::workspace_too_small;
    for (index_t i = 0; i < n; ++i) {
      ids[i] = b.ids[static_cast<std::size_t>(i)];
      rows[i] = b.rows.empty() ? ids[i] : b.rows[static_cast<std::size_t>(i)];
      position[i] = l.appended[ids[i]] - 1;
      ring_row[i] = shape_.rows.weight_ring > 0 ? position[i] % shape_.rows.weight_ring : 0;
      KVKEEP_TRY(each(hq, detail::copy_queries<space>{q, i, 0, 1, position[i], dim,
                                                      dense + static_cast<offset_t>(i) * hq * dim,
                                                      nullptr, position + i},
                      w));
      KVKEEP_TRY(push_ring(l, ids[i], q, i, position[i], w));
    }
  }
  source const s = pool(l, ids, rows, n);
  op::attend<space> a{s.batch, s.layer};
  a.q = row_major<space>(static_cast<float const*>(dense), n, hq, dim);
  if (out != nullptr || measuring) a.out = row_major<space>(out, n, hq, shape_.cache.dim_v);
  if (lse != nullptr) a.lse = row_major<space>(lse, n, hq);
  if (shape_.rows.weight_ring > 0) {
    a.weights = detail::weight_rows(l.slots.rows, shape_.rows, shape_.cache.group());
    a.weight_sum = l.weight_sum;
    a.weight_row = ring_row;
    a.ring_stride = l.slots.rows.stride[2];
  }
  if (decode_.when.before_attention || decode_.when.per_head_mask)
    KVKEEP_TRY(attend_special(l, b, s, a, w));
  else if (out != nullptr || shape_.rows.weight_ring > 0 || measuring)
    KVKEEP_TRY(run(*ctx_, a, w));
  for (index_t i = 0; i < n && !measuring; ++i) l.attended[ids[i]] = l.appended[ids[i]];
  if (limits_.max_draft > 0 && !measuring) return status::ok;
  return after_token(l, ids, rows, n, w);
}

template <backend Ctx, class P, class D>
status session<Ctx, P, D>::observe(index_t layer, batch const& b,
                                   attention_rows const& a) noexcept {
  index_t const m = managed(layer);
  if (m == -1) return status::ok;
  if (m < 0 || a.data == nullptr) return status::bad_argument;
  if (shape_.rows.weight_ring == 0 || shape_.rows.query_ring > 2 + limits_.max_draft)
    return status::unsupported;
  KVKEEP_TRY(check_batch(b));
  layer_data& l = layers_[static_cast<std::size_t>(m)];
  KVKEEP_TRY(check_token(l, b));
  workspace w = scratch(m);
  auto const n = static_cast<index_t>(b.ids.size());
  index_t* ids = w.take<index_t>(b.ids.size());
  index_t* rows = w.take<index_t>(b.ids.size());
  index_t* row = w.take<index_t>(b.ids.size());
  if (!w.ok()) return status::workspace_too_small;
  index_t const ring = shape_.rows.weight_ring, group = shape_.cache.group();
  for (index_t i = 0; i < n; ++i) {
    ids[i] = b.ids[static_cast<std::size_t>(i)];
    rows[i] = b.rows.empty() ? ids[i] : b.rows[static_cast<std::size_t>(i)];
    index_t const r = (l.appended[ids[i]] - 1) % ring;
    row[i] = shape_.rows.weights_at + r;
    KVKEEP_TRY(each(shape_.cache.n_q_heads, detail::unit_sum<space>{l.weight_sum, ids[i], r}, w));
  }
  KVKEEP_TRY(each(n * shape_.cache.n_q_heads,
                  detail::copy_slot_row<space>{a.data, a.entry_stride, a.head_stride,
                                               shape_.cache.n_q_heads, group, ids, row, ring,
                                               l.slots},
                  w));
  for (index_t i = 0; i < n; ++i) l.attended[ids[i]] = l.appended[ids[i]];
  if (limits_.max_draft > 0) return status::ok;
  return after_token(l, ids, rows, n, w);
}

template <backend Ctx, class P, class D>
status session<Ctx, P, D>::observe(index_t layer, index_t id, own_scores const& s) noexcept {
  index_t const m = managed(layer);
  if (m == -1) return status::ok;
  if (m < 0 || s.data == nullptr) return status::bad_argument;
  if (!alive(id)) return status::bad_sequence;
  if (prompt_.score.traits().prompt != evidence::engine_scores || limits_.max_prompt > 0)
    return status::unsupported;
  layer_data& l = layers_[static_cast<std::size_t>(m)];
  workspace w = scratch(m);
  index_t const row = 0;
  return each(shape_.cache.n_kv_heads,
              detail::copy_slot_row<space>{s.data, s.entry_stride, s.head_stride,
                                           shape_.cache.n_kv_heads, 1, &id, &row, 0, l.slots},
              w);
}

template <backend Ctx, class P, class D>
status session<Ctx, P, D>::observe(index_t layer, batch const& b, own_scores const& s) noexcept {
  index_t const m = managed(layer);
  if (m == -1) return status::ok;
  if (m < 0 || s.data == nullptr) return status::bad_argument;
  if (decode_.score.traits().decode != evidence::engine_scores) return status::unsupported;
  KVKEEP_TRY(check_batch(b));
  layer_data& l = layers_[static_cast<std::size_t>(m)];
  KVKEEP_TRY(check_token(l, b));
  workspace w = scratch(m);
  auto const n = static_cast<index_t>(b.ids.size());
  index_t* ids = w.take<index_t>(b.ids.size());
  index_t* rows = w.take<index_t>(b.ids.size());
  index_t* row = w.take<index_t>(b.ids.size());
  if (!w.ok()) return status::workspace_too_small;
  for (index_t i = 0; i < n; ++i) {
    ids[i] = b.ids[static_cast<std::size_t>(i)];
    rows[i] = b.rows.empty() ? ids[i] : b.rows[static_cast<std::size_t>(i)];
    row[i] = shape_.rows.decode_at;
  }
  KVKEEP_TRY(each(n * shape_.cache.n_kv_heads,
                  detail::copy_slot_row<space>{s.data, s.entry_stride, s.head_stride,
                                               shape_.cache.n_kv_heads, 1, ids, row, 0, l.slots},
                  w));
  for (index_t i = 0; i < n; ++i) l.attended[ids[i]] = l.appended[ids[i]];
  return after_token(l, ids, rows, n, w);
}

// -- drafts -----------------------------------------------------------------------------------------

template <backend Ctx, class P, class D>
status session<Ctx, P, D>::confirm(batch const& b, index_t n) noexcept {
  KVKEEP_TRY(check_batch(b));
  if (n < 1) return status::bad_argument;
  for (auto const& l : layers_)
    for (index_t const id : b.ids) {
      index_t const have = limits_.decode == decode_offer::nothing ? l.appended[id] : l.attended[id];
      if (have - shared_.confirmed[id] < n || have != l.appended[id]) return status::bad_order;
    }
  workspace w = scratch();
  auto const size = b.ids.size();
  index_t* ids = w.take<index_t>(size);
  index_t* rows = w.take<index_t>(size);
  if (!w.ok()) return status::workspace_too_small;
  for (std::size_t i = 0; i < size; ++i) {
    ids[i] = b.ids[i];
    rows[i] = b.rows.empty() ? ids[i] : b.rows[i];
  }
  auto const count = static_cast<index_t>(size);
  if (limits_.max_draft > 0 || limits_.decode == decode_offer::nothing)
    for (auto& l : layers_)
      for (index_t t = 0; t < n; ++t) KVKEEP_TRY(fold(l, ids, rows, count, t, w));
  for (index_t i = 0; i < count; ++i) shared_.confirmed[ids[i]] += n;
  return settle_tokens(ids, rows, count, n, w);
}

template <backend Ctx, class P, class D>
status session<Ctx, P, D>::rollback(batch const& b, index_t n) noexcept {
  KVKEEP_TRY(check_batch(b));
  if (limits_.max_draft == 0) return status::unsupported;
  if (n < 1) return status::bad_argument;
  for (auto const& l : layers_)
    for (index_t const id : b.ids)
      if (l.appended[id] - shared_.confirmed[id] < n) return status::bad_order;
  workspace w = scratch();
  auto const size = b.ids.size();
  index_t* ids = w.take<index_t>(size);
  index_t* rows = w.take<index_t>(size);
  if (!w.ok()) return status::workspace_too_small;
  for (std::size_t i = 0; i < size; ++i) {
    ids[i] = b.ids[i];
    rows[i] = b.rows.empty() ? ids[i] : b.rows[i];
  }
  for (auto& l : layers_)
    for (index_t const id : b.ids)
      for (index_t t = 0; t < n; ++t) {
        index_t const pending = --l.appended[id] - shared_.confirmed[id];
        KVKEEP_TRY(each(shape_.cache.n_kv_heads, detail::drop_token<space>{l, id, pending}, w));
        l.attended[id] = std::min(l.attended[id], l.appended[id]);
      }
  return settle_tokens(ids, rows, static_cast<index_t>(size), 0, w);
}

/// After confirm or rollback: moves leftover drafts to the front of their list, and decides for the
/// sequences without unconfirmed tokens.
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::settle_tokens(index_t const* ids, index_t const* rows, index_t n,
                                         index_t confirmed, workspace& w) noexcept {
  index_t* free_ids = w.take<index_t>(static_cast<std::size_t>(n));
  index_t* free_rows = w.take<index_t>(static_cast<std::size_t>(n));
  if (!w.ok()) return status::workspace_too_small;
  index_t count = 0;
  for (index_t i = 0; i < n; ++i) {
    index_t const pending = layers_[0].appended[ids[i]] - shared_.confirmed[ids[i]];
    if (pending == 0) {
      free_ids[count] = ids[i];
      free_rows[count++] = rows[i];
    } else if (confirmed > 0) {
      for (auto& l : layers_)
        KVKEEP_TRY(each(shape_.cache.n_kv_heads,
                        detail::shift_drafts<space>{l.fresh, ids[i], confirmed, pending}, w));
    }
  }
  if (count == 0 || limits_.engine_commits) return status::ok;
  if (decode_.width() == scope::sequence) return decide_sequences(free_ids, free_rows, count, w);
  if (limits_.max_draft == 0 && limits_.decode != decode_offer::nothing) return status::ok;
  for (auto& l : layers_) KVKEEP_TRY(decide(l, free_ids, free_rows, count, 0, w));
  return status::ok;
}

/// Confirms one token in one layer: `draft` is its index among the unconfirmed ones.
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::fold(layer_data& l, index_t const* ids, index_t const* rows, index_t n,
                                index_t draft, workspace& w) noexcept {
  workspace::frame const frame(w);
  index_t* newest = w.take<index_t>(static_cast<std::size_t>(n));
  if (!w.measuring()) {
    if (!w.ok()) return status::workspace_too_small;
    index_t const ring = std::max(1, shape_.rows.weight_ring);
    for (index_t i = 0; i < n; ++i) newest[i] = l.seen[ids[i]]++ % ring;
  }
  if (!decode_.score.traits().at_decode) return status::ok;
  auto in = input(l, pool(l, ids, rows, n), false, newest);
  if (w.measuring()) in.newest_row = &n;  // any pointer: the decode form is measured
  if (in.fresh.data != nullptr) in.fresh.data += draft * l.fresh.stride[0];
  return decode_.score.fold(*ctx_, in, w);
}

}  // namespace kvkeep

#include "decide.hpp"
