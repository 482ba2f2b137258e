// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// A session while decoding: attention and other evidence of the newest token.
#pragma once

#include <algorithm>

#include "../session.hpp"

namespace kvkeep {

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
  if (m < 0 || out == nullptr) return status::bad_argument;
  return show_token(m, b, q, out, lse);
}

template <backend Ctx, class P, class D>
status session<Ctx, P, D>::observe(index_t layer, batch const& b, queries const& q) noexcept {
  index_t const m = managed(layer);
  if (m == -1) return status::ok;
  if (m < 0) return status::bad_argument;
  if (detail::decides_late(decode_.when)) return status::unsupported;
  return show_token(m, b, q, nullptr, nullptr);
}

/// The newest token's queries in managed layer `m`.
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::show_token(index_t m, batch const& b, queries const& q, float* out,
                                      float* lse) noexcept {
  KVKEEP_TRY(detail::check_token_query(q));
  if (limits_.decode != decode_offer::attend) return status::unsupported;
  KVKEEP_TRY(check_batch(b));
  layer_data& l = layers_[static_cast<std::size_t>(m)];
  KVKEEP_TRY(check_token(l, b));
  workspace w = scratch(m);
  KVKEEP_TRY(weigh(l, b, q, out, lse, w));
  note_scratch(l, w);
  return status::ok;
}

/// Whether the newest tokens' weights are asked for: always if there is a ring of them, but for scorers that
/// look at them only where something leaves.
template <backend Ctx, class P, class D>
bool session<Ctx, P, D>::wants_weights(layer_data const& l, entries const& e) const noexcept {
  if (shape_.rows.weight_ring == 0) return false;
  if (!decode_.score.traits().finds_victims || limits_.max_draft > 0) return true;
  for (index_t i = 0; i < e.n; ++i)
    if (excess(l, e.ids[i], 0) > 0) return true;
  return false;
}

/// Attention (or, without `out`, weights alone), the query ring, and what follows a token.
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::weigh(layer_data& l, batch const& b, queries const& q, float* out,
                                 float* lse, workspace& w) noexcept {
  bool const measuring = w.measuring();
  entries const e = list(b, w);
  auto const size = static_cast<std::size_t>(e.n);
  index_t const hq = shape_.cache.n_q_heads, dim = shape_.cache.dim_k;
  index_t* ring_row = w.take<index_t>(size);
  index_t* position = w.take<index_t>(size);
  float* dense = w.take<float>(product(size, hq, dim));
  if (!measuring && !w.ok()) return status::workspace_too_small;
  for (index_t i = 0; i < e.n && !measuring; ++i) {
    index_t const p = l.appended[e.ids[i]] - 1;
    ring_row[i] = shape_.rows.weight_ring > 0 ? p % shape_.rows.weight_ring : 0;
    if (q.type != dtype::f32)
      KVKEEP_TRY(each(hq,
                      detail::copy_queries<space>{q, i, 0, 1, p, dim,
                                                  dense + static_cast<offset_t>(i) * hq * dim,
                                                  nullptr, position + i},
                      w));
    if (shape_.rows.rings_tokens) KVKEEP_TRY(push_ring(l, e.ids[i], q, i, p, w));
  }
  source const s = pool(l, e.ids, e.rows, e.n);
  op::attend<space> a{s.batch, s.layer};
  a.q = row_major<space>(static_cast<float const*>(dense), e.n, hq, dim);
  if (q.type == dtype::f32 && !measuring) {  // read in place
    a.q.data = static_cast<float const*>(q.data);
    a.q.stride[0] = q.entry_stride;
    a.q.stride[1] = q.head_stride;
  }
  if (out != nullptr || measuring) a.out = row_major<space>(out, e.n, hq, shape_.cache.dim_v);
  if (lse != nullptr) a.lse = row_major<space>(lse, e.n, hq);
  bool const weights = measuring || wants_weights(l, e);
  if (weights && shape_.rows.weight_ring > 0) {
    a.weights = detail::weight_rows(l.slots.rows, shape_.rows, shape_.cache.group());
    a.weight_sum = l.weight_sum;
    if (shape_.rows.head_floats > 0) a.weight_max = l.weight_max;
    a.weight_row = ring_row;
    a.ring_stride = l.slots.rows.stride[2];
  }
  if (attention_folds_) a.fold = decode_.score.attention_fold(input(l, s, false, nullptr));
  if (detail::decides_late(decode_.when))
    KVKEEP_TRY(attend_special(l, s, a, w));
  else if (out != nullptr || weights || attention_folds_)
    KVKEEP_TRY(run(*ctx_, a, w));
  return token_done(l, e, w);
}

/// The evidence of one token per entry is in place.
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::token_done(layer_data& l, entries const& e, workspace& w) noexcept {
  bool const measuring = w.measuring();
  for (index_t i = 0; i < e.n && !measuring; ++i) l.attended[e.ids[i]] = l.appended[e.ids[i]];
  if (limits_.max_draft > 0 && !measuring) return status::ok;
  return after_token(l, e.ids, e.rows, e.n, w);
}

template <backend Ctx, class P, class D>
status session<Ctx, P, D>::observe(index_t layer, batch const& b,
                                   attention_rows const& a) noexcept {
  index_t const m = managed(layer);
  if (m == -1) return status::ok;
  if (m < 0 || a.data == nullptr) return status::bad_argument;
  if (shape_.rows.weight_ring == 0 || shape_.rows.rings_tokens) return status::unsupported;
  KVKEEP_TRY(check_batch(b));
  layer_data& l = layers_[static_cast<std::size_t>(m)];
  KVKEEP_TRY(check_token(l, b));
  workspace w = scratch(m);
  entries const e = list(b, w);
  index_t* row = w.take<index_t>(b.ids.size());
  if (!w.ok()) return status::workspace_too_small;
  index_t const ring = shape_.rows.weight_ring, heads = shape_.cache.n_q_heads;
  for (index_t i = 0; i < e.n; ++i) {
    index_t const r = (l.appended[e.ids[i]] - 1) % ring;
    row[i] = shape_.rows.weights_at + r;
    KVKEEP_TRY(each(heads, detail::unit_sum<space>{l.weight_sum, e.ids[i], r}, w));
  }
  KVKEEP_TRY(each(e.n * heads,
                  detail::copy_slot_row<space>{a.data, a.entry_stride, a.head_stride, heads,
                                               shape_.cache.group(), e.ids, row, ring, l.slots},
                  w));
  return token_done(l, e, w);
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
  entries const e = list(b, w);
  index_t* row = w.take<index_t>(b.ids.size());
  if (!w.ok()) return status::workspace_too_small;
  std::fill_n(row, e.n, shape_.rows.decode_at);
  KVKEEP_TRY(each(e.n * shape_.cache.n_kv_heads,
                  detail::copy_slot_row<space>{s.data, s.entry_stride, s.head_stride,
                                               shape_.cache.n_kv_heads, 1, e.ids, row, 0, l.slots},
                  w));
  return token_done(l, e, w);
}

}  // namespace kvkeep

#include "decide.hpp"
