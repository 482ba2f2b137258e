// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Device session: prompts, whose lengths the host knows, and their first cut.
#pragma once

#include <algorithm>
#include <limits>

#include "../device_session.hpp"

namespace kvkeep {

template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::check_prompt(layer_data const& l, index_t id,
                                               index_t row) const noexcept {
  if (!alive(id)) return status::bad_sequence;
  if (row < 0 || row >= l.kv.shape.n_seq) return status::bad_argument;
  bool const ended = sequences_[static_cast<std::size_t>(id)].ended_layers > l.number;
  return ended ? status::bad_order : status::ok;
}

template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::observe(index_t layer, index_t id, queries const& q,
                                          index_t row) noexcept {
  index_t const m = managed(layer);
  if (m == -1) return status::ok;
  if (m < 0) return status::bad_argument;
  layer_data& l = layers_[static_cast<std::size_t>(m)];
  if (row < 0) row = id;
  KVKEEP_TRY(check_prompt(l, id, row));
  index_t const n = q.n_tokens();
  if (q.n_rows < 0 || q.n_rows > n || (q.n_rows > 0 && q.data == nullptr))
    return status::bad_argument;
  bool const all =
      prompt_.score.traits().prompt == evidence::all_queries ||
      (decode_.score.traits().at_decode && decode_.score.traits().prompt == evidence::all_queries);
  if (all && q.n_rows != n) return status::bad_argument;
  index_t const p0 = prompt_of(l, id).tokens;
  if (n > l.kv.shape.max_slots - p0) return status::capacity_exceeded;
  KVKEEP_TRY(wait_for_decision(m));
  workspace w = scratch();
  KVKEEP_TRY(each(shape_.cache.n_kv_heads,
                  detail::extend_head<space>{l.slots, id, p0, n, shape_.rows.weights_at}, w));
  prompt_of(l, id).tokens = p0 + n;
  KVKEEP_TRY(push_prompt(l, id, q, w));
  return feed_scorers(l, one(id, row), q, p0, w);
}

/// Stores the newest query rows of a prompt's chunk, whose tokens are counted already.
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::push_prompt(layer_data& l, index_t id, queries const& q,
                                              workspace& w) noexcept {
  prompt_state& p = prompt_of(l, id);
  index_t const ring = shape_.rows.query_ring, first = p.tokens - q.n_rows;
  bool const gap = q.n_rows < q.n_tokens();
  if (gap) p.has_lse = true;
  if (q.n_rows > 0 && q.lse == nullptr) p.has_lse = false;
  KVKEEP_TRY(each(1, detail::set_counters<space>{l, id, p.tokens, gap ? first : -1}, w));
  if (ring == 0 || q.n_rows == 0) return status::ok;
  index_t const count = std::min(q.n_rows, ring);
  detail::push_queries<space> const push{
      q,        0,         id, q.n_rows - count, count, p.tokens - count, shape_.cache.dim_k,
      l.ring_q, l.ring_lse};
  return each(shape_.cache.n_q_heads * count, push, w);
}

/// Hands prompt queries to the scorers that want all of them.
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::feed_scorers(layer_data& l, batch_ref<space> const& b,
                                               queries const& q, index_t p0,
                                               workspace& w) noexcept {
  index_t const most = limits_.max_chunk;
  KVKEEP_TRY(detail::feed_prompt(*ctx_, prompt_.score, input(l, b, true), q, p0, most, w));
  if (one_policy_ || !decode_.score.traits().at_decode) return status::ok;
  return detail::feed_prompt(*ctx_, decode_.score, input(l, b, false), q, p0, most, w);
}

template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::end_prompt(index_t id) noexcept {
  if (!alive(id)) return status::bad_sequence;
  for (auto const& l : layers_) KVKEEP_TRY(end_prompt(l.spec, id));
  return status::ok;
}

template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::end_prompt(index_t layer, index_t id, index_t row) noexcept {
  index_t const m = managed(layer);
  if (m == -1) return status::ok;
  if (m < 0) return status::bad_argument;
  layer_data& l = layers_[static_cast<std::size_t>(m)];
  if (row < 0) row = id;
  KVKEEP_TRY(check_prompt(l, id, row));
  host_state& s = sequences_[static_cast<std::size_t>(id)];
  if (s.ended_layers != m) return status::bad_order;
  if (m > 0 &&
      prompt_of(layers_[static_cast<std::size_t>(m - 1)], id).tokens != prompt_of(l, id).tokens)
    return status::bad_order;
  bool const together = prompt_.budget.traits().couples_layers;
  if (together && (m > 0 ? prompt_owner_ != id : prompt_owner_ >= 0)) return status::bad_order;
  KVKEEP_TRY(join());
  workspace w = scratch();
  KVKEEP_TRY(decide_prompt(l, id, one(id, row), w));
  s.ended_layers = m + 1;
  bool const last = m + 1 == static_cast<index_t>(layers_.size());
  if (together) prompt_owner_ = last ? -1 : id;
  return status::ok;
}

/// Scores, budgets and the first cut of one layer; where layers are coupled, smaller cuts of earlier ones.
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::decide_prompt(layer_data& l, index_t id,
                                                batch_ref<space> const& b, workspace& w) noexcept {
  bool const measuring = w.measuring();
  index_t const heads = shape_.cache.n_kv_heads, slots = shape_.cache.max_slots;
  auto const n_layers = static_cast<index_t>(layers_.size());
  index_t const tokens = measuring ? slots : prompt_of(l, id).tokens;
  auto const bt = prompt_.budget.traits();
  budget_input<space> in{n_layers, l.number,           heads,
                         tokens,   prompt_.keep.sinks, prompt_.keep.recent,
                         {},       shared_.prompt_k};
  if (bt.needs_scores) in.scores = shared_.prompt_scores;
  bool const whole = detail::keeps_all(prompt_.score);
  bool const short_prompt = whole || (!bt.fixed && tokens < prompt_.budget.capacity());
  if (short_prompt && !measuring)
    KVKEEP_TRY(
        detail::fill_layer(*ctx_, in, l.number, std::max(tokens, prompt_.budget.capacity()), w));
  else if (!bt.needs_scores)
    KVKEEP_TRY(prompt_.budget.allocate(*ctx_, in, w));
  workspace::frame const frame(w);
  auto scores = row_major<space>(bt.needs_scores ? nullptr : w.take<float>(product(heads, slots)),
                                 1, heads, slots);
  if (bt.needs_scores) {
    scores.data = shared_.prompt_scores.at(l.number);
    scores.stride[0] = shared_.prompt_scores.stride[1];
    scores.stride[1] = shared_.prompt_scores.stride[2];
  }
  bool const wanted = bt.needs_scores || !detail::decides_late(prompt_.when);
  bool const scored = !whole && (bt.couples_layers || (!short_prompt && wanted));
  if (scored || measuring) {
    auto view = input(l, b, true);
    view.has_lse = measuring || prompt_of(l, id).has_lse;
    KVKEEP_TRY(prompt_.score.score(*ctx_, view, scores, w));
    if (prompt_.width() != scope::head && prompt_.score.traits().comparable)
      KVKEEP_TRY(run(*ctx_, op::mean_heads<space>{b, l.slots, scores}, w));
    if (bt.couples_layers) {
      detail::copy_slot_row<space> const keep{scores.data,
                                              scores.stride[0],
                                              scores.stride[1],
                                              heads,
                                              1,
                                              b.id,
                                              numbers_ + shape_.rows.score_at,
                                              0,
                                              l.slots};
      KVKEEP_TRY(each(heads, keep, w));
    }
    if (bt.needs_scores && !short_prompt) KVKEEP_TRY(prompt_.budget.allocate(*ctx_, in, w));
    KVKEEP_TRY(cut_prompt(l, id, b, scores, w));
  }
  if (!measuring && !short_prompt)
    for (index_t j = prompt_.budget.due(l.number, n_layers).first; j < l.number; ++j) {
      layer_data& earlier = layers_[static_cast<std::size_t>(j)];
      auto const row = detail::row_as_map(earlier.slots.rows, shape_.rows.score_at);
      KVKEEP_TRY(cut_prompt(earlier, id, b, detail::rebase(row, id), w));
      KVKEEP_TRY(fix_budget(earlier, id, tokens, w));
    }
  KVKEEP_TRY(fix_budget(l, id, tokens, w));
  if (decode_.score.traits().at_decode) {
    auto view = input(l, b, false);
    view.has_lse = measuring || prompt_of(l, id).has_lse;
    KVKEEP_TRY(decode_.score.settle(*ctx_, view, w));
  }
  // The decode policy takes over, and cuts where it keeps less: coupled layers once all have ended.
  if (!detail::cuts_while_decoding(decode_.score) || (one_policy_ && !measuring)) return status::ok;
  if (detail::decides_late(decode_.when)) return status::ok;
  if (!bt.couples_layers || measuring) return cut_once(l, b, w);
  if (l.number + 1 != n_layers) return status::ok;
  for (auto& each_layer : layers_) KVKEEP_TRY(cut_once(each_layer, b, w));
  return status::ok;
}

/// A cut by the decode policy, before any token is decoded.
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::cut_once(layer_data& l, batch_ref<space> const& b,
                                           workspace& w) noexcept {
  workspace::frame const frame(w);
  index_t* const newest = w.take<index_t>(static_cast<std::size_t>(b.n));
  if (!w.measuring() && !w.ok()) return status::workspace_too_small;
  index_t const ring = std::max(1, shape_.rows.weight_ring);
  KVKEEP_TRY(each(b.n, detail::ring_rows_of<space>{l.appended, b, ring, newest}, w));
  auto in = input(l, b, false);
  in.newest_row = w.measuring() ? &shape_.n_sequences : newest;  // measuring: any pointer
  return cut({*ctx_, w}, l, in);
}

/// Applies the budgets of `prompt_k` to one layer, in place; without excess everything stays.
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::cut_prompt(layer_data& l, index_t id, batch_ref<space> const& b,
                                             tensor_ref<float const, 3, space> scores,
                                             workspace& w) noexcept {
  bool const measuring = w.measuring();
  // LagKV and the like leave short prompts whole, decisions before attention all of them.
  bool const whole =
      prompt_of(l, id).tokens < prompt_.score.least_tokens() || detail::decides_late(prompt_.when);
  if (!measuring && whole) return status::ok;
  workspace::frame const frame(w);
  index_t const heads = shape_.cache.n_kv_heads, slots = shape_.cache.max_slots;
  auto const ids = static_cast<std::size_t>(shape_.n_sequences);
  auto const keep =
      row_major<space>(w.take<index_t>(product(ids, heads)), shape_.n_sequences, heads);
  keep_plan<space> const plan{
      row_major<space>(w.take<index_t>(product(heads, slots)), 1, heads, slots),
      row_major<space>(w.take<index_t>(product(heads)), 1, heads)};
  if (!measuring && !w.ok()) return status::workspace_too_small;
  detail::resolve_keep<space> const resolve{shared_.prompt_k,
                                            l.slots,
                                            numbers_ + l.number,
                                            b.id,
                                            heads,
                                            prompt_.when.evict_after,
                                            prompt_.when.room,
                                            0,
                                            prompt_.select.traits().block,
                                            0,
                                            keep};
  KVKEEP_TRY(each(heads, resolve, w));
  guard_ref<space> const guard{prompt_.keep.sinks, prompt_.keep.recent, shared_.frozen};
  KVKEEP_TRY(prompt_.select.select(*ctx_, b, l.slots, scores, keep, guard, plan, w));
  layer_ref<space> const layer{l.kv, l.slots};
  return run(*ctx_, op::compact<space>{b, layer, b, layer, plan}, w);
}

}  // namespace kvkeep

#include "device_append.hpp"
