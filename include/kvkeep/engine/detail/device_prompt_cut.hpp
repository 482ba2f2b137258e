// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Device session at the end of a prompt: scores, budgets, the first cut.
#pragma once

#include <algorithm>
#include <limits>

#include "../device_session.hpp"

namespace kvkeep {

/// Scores of a prompt's slots, joined over heads where one set serves them all, kept beside the slots where coupled
/// layers are cut again.
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::score_prompt(layer_data& l, index_t id, source const& s,
                                               score_map<space> out, workspace& w) noexcept {
  auto view = input(l, s, true);
  view.has_lse = w.measuring() || prompt_of(l, id).has_lse;
  if (prompt_.budget.traits().needs_spread)
    view.spread = detail::rebase(shared_.prompt_spread, l.number);
  KVKEEP_TRY(prompt_.score.score(*ctx_, view, out, w));
  if (prompt_.width() != scope::head && prompt_.score.traits().comparable)
    KVKEEP_TRY(run(*ctx_, op::mean_heads<space>{s.batch, s.layer.slots, out}, w));
  if (!prompt_.budget.traits().couples_layers) return status::ok;
  index_t const heads = shape_.cache.n_kv_heads, tokens = prompt_of(l, id).tokens;
  row_evidence e{out.data, out.stride[0], out.stride[1], heads};
  e.first_row = shape_.rows.score_at;
  return each(heads * tokens,
              detail::store_slot_rows<space>{s.layer.slots, s.batch, e, nullptr, {}, tokens}, w);
}

/// Scores, budgets and the first cut of one layer; where layers are coupled, smaller cuts of earlier ones.
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::decide_prompt(layer_data& l, index_t id, source const& from,
                                                source const& to, workspace& w) noexcept {
  bool const measuring = w.measuring();
  index_t const heads = shape_.cache.n_kv_heads, slots = from.layer.kv.shape.max_slots;
  index_t const tokens = measuring ? slots : prompt_of(l, id).tokens;
  auto const bt = prompt_.budget.traits();
  detail::prompt_budget<space> b;
  KVKEEP_TRY(detail::begin_budget(*ctx_, prompt_, shared_, l, tokens, b, w));
  workspace::frame const frame(w);
  auto scores = row_major<space>(bt.needs_scores ? nullptr : w.take<float>(product(heads, slots)),
                                 1, heads, slots);
  if (bt.needs_scores) {
    scores.data = shared_.prompt_scores.at(l.number);
    scores.stride[0] = shared_.prompt_scores.stride[1];
    scores.stride[1] = shared_.prompt_scores.stride[2];
  }
  bool const wide = prompt_.width() == scope::sequence;
  bool const moves = prompt_.select.traits().moves_tokens;
  bool const scored = !measuring && detail::scores_prompt(prompt_, tokens);
  if (scored || measuring) {
    if (!measuring && detail::lacks_queries(prompt_, shape_.cache, prompt_of(l, id)))
      return status::bad_order;
    KVKEEP_TRY(score_prompt(l, id, from, scores, w));
    if (bt.after_scores() && !b.short_prompt) KVKEEP_TRY(prompt_.budget.allocate(*ctx_, b.in, w));
  }
  if (tracks_tables_) KVKEEP_TRY(mark(l, id, detail::settled, w));
  // Whole blocks leave the table, which the engine adopts later: read the keys before.
  if (!moves) KVKEEP_TRY(settle(l, id, to, w));
  if (wide && (scored || measuring))
    KVKEEP_TRY(join_layers(l, id, to, scores, w));
  else if (scored || measuring || limits_.max_prompt > 0)
    KVKEEP_TRY(cut_prompt(l, id, from, to, scores, w));
  if (measuring || !b.short_prompt)
    for (index_t j = prompt_.budget.due(l.number, n_layers()).first; j < l.number; ++j) {
      layer_data& earlier = layers_[static_cast<std::size_t>(j)];
      auto const row = detail::row_as_map(earlier.slots.rows, shape_.rows.score_at);
      source const at = pool(earlier, to.batch);
      KVKEEP_TRY(cut_prompt(earlier, id, at, at, detail::rebase(row, id), w));
      KVKEEP_TRY(fix_budget(earlier, id, tokens, w));
    }
  KVKEEP_TRY(fix_budget(l, id, tokens, w));
  return hand_over(l, id, to, w);
}

/// Adds a layer's scores to the sequence's; with the last one all layers are cut.
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::join_layers(layer_data& l, index_t id, source const& to,
                                              score_map<space> scores, workspace& w) noexcept {
  KVKEEP_TRY(add_layer({*ctx_, w}, l, prompt_.score.traits().comparable,
                       {to.batch, to.layer.slots, scores, false, false, 1, shared_.prompt_sum}));
  if (!is_last(l) && !w.measuring()) return status::ok;
  for (auto& each_layer : layers_) {
    source const at = pool(each_layer, to.batch);
    KVKEEP_TRY(cut_prompt(each_layer, id, at, at, shared_.prompt_sum, w));
  }
  return status::ok;
}

/// Builds the decode scorer's state of a prompt's slots.
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::settle(layer_data& l, index_t id, source const& to,
                                         workspace& w) noexcept {
  if (!decode_.score.traits().at_decode) return status::ok;
  auto view = input(l, to, false);
  view.has_lse = w.measuring() || prompt_of(l, id).has_lse;
  return decode_.score.settle(*ctx_, view, w);
}

/// The tokens per head that decoding keeps.
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::fix_budget(layer_data& l, index_t id, index_t tokens,
                                             workspace& w) noexcept {
  return detail::fix_decode_budget(*ctx_, prompt_, decode_, one_policy_, n_layers(), l, id, tokens,
                                   shared_.prompt_k, shared_.frozen, w);
}

/// The decode policy takes over, and cuts where it keeps less: coupled layers once all have ended.
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::hand_over(layer_data& l, index_t id, source const& to,
                                            workspace& w) noexcept {
  bool const measuring = w.measuring(), moved = prompt_.select.traits().moves_tokens;
  if (moved) KVKEEP_TRY(settle(l, id, to, w));
  if (!detail::cuts_while_decoding(decode_.score) || (one_policy_ && !measuring)) return status::ok;
  if (detail::decides_late(decode_.when) || limits_.engine_commits || !moved) return status::ok;
  bool const wide = decode_.width() == scope::sequence;
  bool const coupled = prompt_.budget.traits().couples_layers;
  if (!wide && (!coupled || measuring)) return cut_once(l, to.batch, w);
  if (!is_last(l) && !measuring) return status::ok;
  if (wide) return cut_sequences(to.batch, w);
  for (auto& each_layer : layers_) KVKEEP_TRY(cut_once(each_layer, to.batch, w));
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
  auto in = input(l, pool(l, b), false);
  in.newest_row = w.measuring() ? &shape_.n_sequences : newest;  // measuring: any pointer
  return cut({*ctx_, w}, l, in);
}

/// Applies the budgets of `prompt_k` to one layer, in place or into the cache; without excess everything stays.
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::cut_prompt(layer_data& l, index_t id, source const& from,
                                             source const& to,
                                             tensor_ref<float const, 3, space> scores,
                                             workspace& w) noexcept {
  bool const measuring = w.measuring();
  bool const in_place = from.layer.slots.lengths.data == to.layer.slots.lengths.data;
  // LagKV and the like leave short prompts whole, decisions before attention all of them.
  bool const whole =
      prompt_of(l, id).tokens < prompt_.score.least_tokens() || detail::decides_late(prompt_.when);
  if (!measuring && whole && in_place) return status::ok;
  workspace::frame const frame(w);
  index_t const heads = shape_.cache.n_kv_heads, slots = from.layer.kv.shape.max_slots;
  auto const ids = static_cast<std::size_t>(shape_.n_sequences);
  auto const keep =
      row_major<space>(w.take<index_t>(product(ids, heads)), shape_.n_sequences, heads);
  keep_plan<space> const plan{
      row_major<space>(w.take<index_t>(product(heads, slots)), 1, heads, slots),
      row_major<space>(w.take<index_t>(product(heads)), 1, heads)};
  if (!measuring && !w.ok()) return status::workspace_too_small;
  detail::resolve_keep<space> const resolve{shared_.prompt_k,
                                            from.layer.slots,
                                            numbers_ + l.number,
                                            from.batch.id,
                                            heads,
                                            detail::cut_rule_of(prompt_),
                                            0,
                                            whole ? std::numeric_limits<index_t>::max() : 0,
                                            keep};
  KVKEEP_TRY(each(heads, resolve, w));
  if (in_place) KVKEEP_TRY(each(heads, detail::note_prompt<space>{holding(l), id}, w));
  KVKEEP_TRY(prompt_.select.select(*ctx_, from.batch, from.layer.slots, scores, keep,
                                   guard_of(true, from.id0), plan, w));
  if (!in_place || measuring) KVKEEP_TRY(refuse_misfits(l, to, plan, w));
  op::compact<space> move{from.batch, from.layer, to.batch, to.layer, plan};
  if (!prompt_.select.traits().moves_tokens) {
    detail::record_blocks<space> const record{l, from.batch, plan, plan_};
    KVKEEP_TRY(each(heads * record.steps(), record, w));
    move.how = op::move_kind::renumber;
  }
  return run(*ctx_, move, w);
}

/// Where the cache has no place for what a head keeps, no head of the layer keeps anything.
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::refuse_misfits(layer_data& l, source const& to,
                                                 keep_plan<space> const& plan,
                                                 workspace& w) noexcept {
  index_t const heads = shape_.cache.n_kv_heads;
  using find = detail::find_misfits<space>;
  using refuse = detail::refuse_plan<space>;
  workspace::frame const frame(w);
  auto* const found = w.take<index_t>(static_cast<std::size_t>(heads));
  if (!w.measuring() && !w.ok()) return status::workspace_too_small;
  op::for_each<find, space> const look{heads, find{l.kv, to.batch, plan, found}};
  op::for_each<refuse, space> const act{heads, refuse{to.batch, plan, found, faults_}};
  return run(*ctx_, op::make_chain<space>(1, 1, heads, look, act), w);
}

}  // namespace kvkeep

#include "device_append.hpp"
