// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// A session during prompts: tokens and evidence, chunk by chunk.
#pragma once

#include <algorithm>

#include "../session.hpp"
#include "pieces.hpp"
#include "prompt_steps.hpp"

namespace kvkeep {

template <backend Ctx, class P, class D>
status session<Ctx, P, D>::observe(index_t layer, index_t id, queries const& q,
                                   kv_ref<space> const* prompt, index_t row) noexcept {
  index_t const m = managed(layer);
  if (m == -1) return status::ok;
  if (m < 0) return status::bad_argument;
  if (!alive(id)) return status::bad_sequence;
  layer_data& l = layers_[static_cast<std::size_t>(m)];
  if (l.prompt_done[id] != 0) return status::bad_order;
  if (!limits_.concurrent_layers && detail::token_has_come(layers_, id)) return status::bad_order;
  index_t const n = q.n_tokens();
  KVKEEP_TRY(detail::check_chunk(q));
  bool const all =
      prompt_.score.traits().prompt == evidence::all_queries ||
      (decode_.score.traits().at_decode && decode_.score.traits().prompt == evidence::all_queries);
  if (all && q.n_rows != n) return status::bad_argument;
  index_t const p0 = l.appended[id];
  index_t const zero = 0;
  index_t const at = row >= 0 ? row : limits_.max_prompt > 0 ? 0 : id;
  source from = pool(l, &id, &at, 1);
  if (limits_.max_prompt > 0) {
    if (all && prompt == nullptr) return status::bad_argument;
    if (n > limits_.max_prompt - p0) return status::capacity_exceeded;
    if (prompt != nullptr)
      KVKEEP_TRY(detail::check_prompt_view(*prompt, l.kv, limits_.max_prompt, at, p0 + n));
    KVKEEP_TRY(take_staging(l, id, p0));
    from = transient(l, id, prompt != nullptr ? *prompt : l.kv, &zero, &at);
  } else {
    if (prompt != nullptr || at >= l.kv.shape.n_seq) return status::bad_argument;
    KVKEEP_TRY(check_blocks(l, at, id, n));
  }
  workspace w = scratch(m);
  index_t const state_row = limits_.max_prompt > 0 ? 0 : id;
  KVKEEP_TRY(each(
      shape_.cache.n_kv_heads,
      detail::extend_head<space>{from.layer.slots, state_row, p0, n, shape_.rows.weights_at}, w));
  l.appended[id] = l.seen[id] = l.attended[id] = p0 + n;
  l.count.tokens += n;
  next_generation(id);  // plans of before are stale
  KVKEEP_TRY(push_ring(l, id, q, 0, p0 + n - q.n_rows, w));
  if (q.n_rows > 0) KVKEEP_TRY(feed_scorers(l, from, q, p0, w));
  note_scratch(l, w);
  return status::ok;
}

/// One transient prompt is under way at a time, layer after layer.
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::take_staging(layer_data const& l, index_t id, index_t p0) noexcept {
  index_t const owner = shared_.staging_id;
  bool const mine = owner == id && shared_.staging_layer == l.number;
  bool const taken =
      owner >= 0 &&
      detail::in_prompt(layers_[static_cast<std::size_t>(shared_.staging_layer)], owner);
  if (!mine && (p0 > 0 || taken)) return status::bad_order;
  if (p0 == 0) {
    shared_.staging_layer = l.number;
    shared_.staging_id = id;
    for (index_t h = 0; h < shape_.cache.n_kv_heads; ++h) shared_.staging.slots.lengths(0, h) = 0;
  }
  return status::ok;
}

/// Stores the newest query rows; the last row of q belongs to position `first + n_rows - 1`.
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::push_ring(layer_data& l, index_t id, queries const& q, index_t entry,
                                     index_t first, workspace& w) noexcept {
  index_t const ring = shape_.rows.query_ring;
  if (ring == 0) return status::ok;
  index_t const end = first + q.n_rows;
  bool const gap = q.n_rows < q.n_tokens();
  if (gap) {
    l.ring_from[id] = first;
    l.has_lse[id] = 1;
  }
  if (q.n_rows == 0) return status::ok;
  if (q.lse == nullptr) l.has_lse[id] = 0;
  index_t const count = std::min(q.n_rows, ring);
  detail::push_queries<space> const push{
      q, entry, id, q.n_rows - count, count, end - count, shape_.cache.dim_k, l.ring_q, l.ring_lse};
  return each(shape_.cache.n_q_heads * count, push, w);
}

/// Hands prompt queries to the scorers that want all of them.
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::feed_scorers(layer_data& l, source const& s, queries const& q,
                                        index_t p0, workspace& w) noexcept {
  index_t const most = limits_.max_chunk;
  KVKEEP_TRY(detail::feed_prompt(*ctx_, prompt_.score, input(l, s, true, nullptr), q, p0, most, w));
  if (one_policy_ || !decode_.score.traits().at_decode) return status::ok;
  return detail::feed_prompt(*ctx_, decode_.score, input(l, s, false, nullptr), q, p0, most, w);
}

}  // namespace kvkeep

#include "prompt_cut.hpp"
