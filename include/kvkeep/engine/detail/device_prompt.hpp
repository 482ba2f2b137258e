// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Device session: prompts, whose lengths the host knows.
#pragma once

#include <algorithm>

#include "../device_session.hpp"

namespace kvkeep {

/// Where a prompt's keys and values are: in the cache, or in a transient view, one prompt and layer at a time.
/// @param more  tokens that come now
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::find_prompt(layer_data const& l, index_t id,
                                              kv_ref<space> const* prompt, index_t row,
                                              index_t more, source& from) noexcept {
  if (!alive(id)) return status::bad_sequence;
  if (sequences_[static_cast<std::size_t>(id)].ended_layers > l.number) return status::bad_order;
  index_t const tokens = prompt_of(l, id).tokens;
  index_t const most = limits_.max_prompt;
  if (more > (most > 0 ? most : l.kv.shape.max_slots) - tokens) return status::capacity_exceeded;
  if (most == 0) {
    if (row < 0) row = id;
    if (prompt != nullptr || row >= l.kv.shape.n_seq) return status::bad_argument;
    from = pool(l, one(id, row));
    return status::ok;
  }
  if (row < 0) row = 0;
  if (row >= n_numbers_ || id >= l.kv.shape.n_seq) return status::bad_argument;
  bool const mine = shared_.staging_layer == l.number && shared_.staging_id == id;
  if (!mine && (tokens > 0 || staging_taken())) return status::bad_order;
  auto const& own = shared_.staging;
  from = {one(0, row), {l.kv, own.slots}, own.weight_sum, own.gathered, id};
  if (prompt == nullptr) return status::ok;
  from.layer.kv = *prompt;
  from.layer.slots.positions.extent[2] = prompt->shape.max_slots;
  KVKEEP_TRY(detail::check_prompt_view(*prompt, l.kv, most, row, tokens + more));
  // Ops may need copies of scattered rows, for which scratch was counted if the cache has such.
  if ((l.kv.k.contiguous() && !prompt->k.contiguous()) ||
      (l.kv.v.contiguous() && !prompt->v.contiguous()))
    return status::unsupported;
  // Whether the backend can reach its rows: a count of scratch, nothing is enqueued.
  workspace counting;
  source const to = pool(l, one(id, id));
  keep_plan<space> const none{row_major<space>(numbers_, 1, 1, 1),
                              row_major<space>(numbers_, 1, 1)};
  return run(*ctx_, op::compact<space>{from.batch, from.layer, to.batch, to.layer, none}, counting);
}

template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::observe(index_t layer, index_t id, queries const& q,
                                          kv_ref<space> const* prompt, index_t row) noexcept {
  index_t const m = managed(layer);
  if (m == -1) return status::ok;
  if (m < 0) return status::bad_argument;
  layer_data& l = layers_[static_cast<std::size_t>(m)];
  index_t const n = q.n_tokens();
  KVKEEP_TRY(detail::check_chunk(q));
  bool const all =
      prompt_.score.traits().prompt == evidence::all_queries ||
      (decode_.score.traits().at_decode && decode_.score.traits().prompt == evidence::all_queries);
  if (all && (q.n_rows != n || (limits_.max_prompt > 0 && prompt == nullptr)))
    return status::bad_argument;
  source from;
  KVKEEP_TRY(find_prompt(l, id, prompt, row, n, from));
  KVKEEP_TRY(wait_for_decision(m));
  index_t const p0 = prompt_of(l, id).tokens, state_row = limits_.max_prompt > 0 ? 0 : id;
  workspace w = scratch();
  KVKEEP_TRY(
      extend({from.layer.slots, state_row, p0, n, shape_.rows.weights_at, l.appended + id}, w));
  shared_.staging_layer = m;
  shared_.staging_id = id;
  prompt_of(l, id).tokens = p0 + n;
  prompt_of(l, id).observed = true;
  if (limits_.engine_commits) KVKEEP_TRY(mark(l, id, detail::prompt_open, w));
  KVKEEP_TRY(push_prompt(l, id, q, p0, w));
  return feed_scorers(l, from, q, p0, w);
}

/// Counts a prompt's chunk of which the tokens from `p0` on are new, and stores its newest query rows.
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::push_prompt(layer_data& l, index_t id, queries const& q,
                                              index_t p0, workspace& w) noexcept {
  prompt_state& p = prompt_of(l, id);
  index_t const ring = shape_.rows.query_ring, first = p.tokens - q.n_rows;
  bool const gap = q.n_rows < q.n_tokens();
  if (gap) p.has_lse = true, p.ring_from = first;
  if (q.n_rows > 0 && q.lse == nullptr) p.has_lse = false;
  detail::set_counters<space> const counters{l,  faults_,  shared_.generation, id,
                                             p0, p.tokens, gap ? first : -1};
  KVKEEP_TRY(each(1, counters, w));
  if (ring == 0 || q.n_rows == 0) return status::ok;
  index_t const count = std::min(q.n_rows, ring);
  detail::push_queries<space> const push{
      q,        0,         id, q.n_rows - count, count, p.tokens - count, shape_.cache.dim_k,
      l.ring_q, l.ring_lse};
  return each(shape_.cache.n_q_heads * count, push, w);
}

/// Hands prompt queries to the scorers that want all of them.
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::feed_scorers(layer_data& l, source const& s, queries const& q,
                                               index_t p0, workspace& w) noexcept {
  index_t const most = limits_.max_chunk;
  KVKEEP_TRY(detail::feed_prompt(*ctx_, prompt_.score, input(l, s, true), q, p0, most, w));
  if (one_policy_ || !decode_.score.traits().at_decode) return status::ok;
  return detail::feed_prompt(*ctx_, decode_.score, input(l, s, false), q, p0, most, w);
}

template <backend Ctx, class P, class D>
layer_range device_session<Ctx, P, D>::due(index_t layer) const noexcept {
  index_t const m = managed(layer);
  return m < 0 ? layer_range{} : detail::due_layers(prompt_, layers_, m);
}

template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::end_prompt(index_t id) noexcept {
  if (!alive(id)) return status::bad_sequence;
  if (limits_.max_prompt > 0) return status::bad_argument;
  bool const joins = detail::joins_layers(prompt_);
  for (auto const& l : layers_) {  // all of them or none
    auto const& p = prompt_of(l, id);
    if (id >= l.kv.shape.n_seq) return status::bad_argument;
    if (sequences_[static_cast<std::size_t>(id)].ended_layers > 0 ||
        (joins && prompt_owner_ >= 0) || p.tokens != prompt_of(layers_[0], id).tokens ||
        detail::lacks_queries(prompt_, shape_.cache, p))
      return status::bad_order;
  }
  for (auto const& l : layers_) KVKEEP_TRY(end_prompt(l.spec, id));
  return status::ok;
}

template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::end_prompt(index_t layer, index_t id, kv_ref<space> const* prompt,
                                             index_t row) noexcept {
  index_t const m = managed(layer);
  if (m == -1) return status::ok;
  if (m < 0) return status::bad_argument;
  layer_data& l = layers_[static_cast<std::size_t>(m)];
  source from;
  KVKEEP_TRY(find_prompt(l, id, prompt, row, 0, from));
  host_state& s = sequences_[static_cast<std::size_t>(id)];
  if (s.ended_layers != m) return status::bad_order;
  index_t const tokens = prompt_of(l, id).tokens;
  if (m > 0 && prompt_of(layers_[static_cast<std::size_t>(m - 1)], id).tokens != tokens)
    return status::bad_order;
  bool const together = detail::joins_layers(prompt_);
  if (together && (m > 0 ? prompt_owner_ != id : prompt_owner_ >= 0)) return status::bad_order;
  bool const transient = limits_.max_prompt > 0;
  if (transient && prompt == nullptr) return status::bad_argument;
  KVKEEP_TRY(join());
  workspace w = scratch();
  detail::set_counters<space> const no_token{l,      faults_, shared_.generation, id, tokens,
                                             tokens, -1};
  KVKEEP_TRY(each(1, no_token, w));
  if (transient && tokens == 0) {
    KVKEEP_TRY(extend({from.layer.slots, 0, 0, 0, 0}, w));
    shared_.staging_layer = m;
    shared_.staging_id = id;
  }
  source const to = transient ? pool(l, one(id, id)) : from;
  KVKEEP_TRY(decide_prompt(l, id, from, to, w));
  s.ended_layers = m + 1;
  if (together) prompt_owner_ = is_last(l) ? -1 : id;
  return status::ok;
}

}  // namespace kvkeep

#include "device_prompt_cut.hpp"
