// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// A session at the end of a prompt: scores, budgets, the first cut.
#pragma once

#include <algorithm>

#include "../session.hpp"
#include "prompt_steps.hpp"

namespace kvkeep {

template <backend Ctx, class P, class D>
layer_range session<Ctx, P, D>::due(index_t layer) const noexcept {
  index_t const m = managed(layer);
  return m < 0 ? layer_range{} : detail::due_layers(prompt_, layers_, m);
}

template <backend Ctx, class P, class D>
status session<Ctx, P, D>::end_prompt(index_t id) noexcept {
  if (!alive(id)) return status::bad_sequence;
  if (limits_.max_prompt > 0) return status::bad_argument;
  if (detail::joins_layers(prompt_) && shared_.prompt_owner >= 0) return status::bad_order;
  for (auto const& l : layers_) {  // all of them or none
    if (id >= l.kv.shape.n_seq) return status::bad_argument;
    if (l.prompt_done[id] != 0 || l.appended[id] != layers_[0].appended[id])
      return status::bad_order;
    KVKEEP_TRY(check_blocks(l, id, id, 0));
    workspace w = scratch(l.number);
    source const s = pool(l, &id, &id, 1);
    detail::prompt_budget<space> b;
    KVKEEP_TRY(detail::begin_budget(*ctx_, prompt_, shared_, l, l.slots.lengths(id, 0), b, w));
    if (detail::scores_prompt(prompt_, b, [&] { return cuts_at_prompt(l, s); }) &&
        detail::lacks_queries(prompt_, shape_.cache, l, id, shared_.frozen[id]))
      return status::bad_order;
  }
  for (auto const& l : layers_) KVKEEP_TRY(end_prompt(l.spec, id));
  return status::ok;
}

template <backend Ctx, class P, class D>
status session<Ctx, P, D>::end_prompt(index_t layer, index_t id, kv_ref<space> const* prompt,
                                      index_t row) noexcept {
  index_t const m = managed(layer);
  if (m == -1) return status::ok;
  if (m < 0) return status::bad_argument;
  if (!alive(id)) return status::bad_sequence;
  layer_data& l = layers_[static_cast<std::size_t>(m)];
  if (l.prompt_done[id] != 0) return status::bad_order;
  if (!limits_.concurrent_layers && detail::token_has_come(layers_, id)) return status::bad_order;
  bool const together = detail::joins_layers(prompt_);
  if (m > 0) {
    layer_data const& before = layers_[static_cast<std::size_t>(m - 1)];
    if (before.prompt_done[id] == 0 || before.appended[id] != l.appended[id])
      return status::bad_order;
    if (together && shared_.prompt_owner != id) return status::bad_order;
  } else if (together) {
    if (shared_.prompt_owner >= 0 && shared_.prompt_owner != id) return status::bad_order;
  }
  index_t const zero = 0;
  source const to = pool(l, &id, limits_.max_prompt > 0 || row < 0 ? &id : &row, 1);
  source from = to;
  index_t const at = row >= 0 ? row : limits_.max_prompt > 0 ? 0 : id;
  if (limits_.max_prompt > 0) {
    index_t const tokens = l.appended[id];
    if (prompt == nullptr) return status::bad_argument;
    KVKEEP_TRY(detail::check_prompt_view(*prompt, l.kv, limits_.max_prompt, at, tokens));
    if (id >= l.kv.shape.n_seq) return status::bad_argument;
    KVKEEP_TRY(check_blocks(l, id, id, 0));
    KVKEEP_TRY(take_staging(l, id, tokens));
    from = transient(l, id, *prompt, &zero, &at);
  } else {
    if (prompt != nullptr || at >= l.kv.shape.n_seq) return status::bad_argument;
    KVKEEP_TRY(check_blocks(l, at, id, 0));
  }
  workspace w = scratch(m);
  KVKEEP_TRY(decide_prompt(l, id, from, to, w));
  note_scratch(l, w);
  l.prompt_done[id] = 1;
  bool const last = m + 1 == static_cast<index_t>(layers_.size());
  if (together) shared_.prompt_owner = last ? -1 : id;
  if (last) shared_.confirmed[id] = l.appended[id];
  return status::ok;
}

/// Scores of a prompt's slots, joined over heads where one set serves them all.
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::score_prompt(layer_data& l, source const& s, score_map<space> out,
                                        workspace& w) noexcept {
  workspace::frame const frame(w);
  auto in = input(l, s, true, nullptr);
  if (prompt_.budget.traits().needs_spread)
    in.spread = detail::rebase(shared_.prompt_spread, l.number);
  KVKEEP_TRY(prompt_.score.score(*ctx_, in, out, w));
  if (prompt_.width() == scope::head || !prompt_.score.traits().comparable) return status::ok;
  return run(*ctx_, op::mean_heads<space>{s.batch, s.layer.slots, out}, w);
}

/// Scores, budgets and the first cut of one layer; where layers are coupled, smaller cuts of earlier ones.
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::decide_prompt(layer_data& l, index_t id, source const& from,
                                         source const& to, workspace& w) noexcept {
  bool const measuring = w.measuring();
  index_t const heads = shape_.cache.n_kv_heads;
  index_t const tokens = measuring ? 0 : from.layer.slots.lengths(from.batch.id[0], 0);
  auto const bt = prompt_.budget.traits();
  detail::prompt_budget<space> b;
  KVKEEP_TRY(detail::begin_budget(*ctx_, prompt_, shared_, l, tokens, b, w));
  bool const whole = detail::keeps_all(prompt_.score);
  bool const wide = !whole && prompt_.width() == scope::sequence;
  bool const scored =
      measuring ? !whole
                : detail::scores_prompt(prompt_, b, [&] { return cuts_at_prompt(l, from); });
  index_t const slots = from.layer.kv.shape.max_slots;
  score_map<space> scores = row_major<space>(
      bt.needs_scores ? nullptr : w.take<float>(product(heads, slots)), 1, heads, slots);
  if (bt.needs_scores) {
    scores.data = shared_.prompt_scores.at(measuring ? 0 : l.number);
    scores.stride[0] = shared_.prompt_scores.stride[1];
    scores.stride[1] = shared_.prompt_scores.stride[2];
  }
  if (scored && !measuring &&
      detail::lacks_queries(prompt_, shape_.cache, l, id, shared_.frozen[id]))
    return status::bad_order;
  if (scored) KVKEEP_TRY(score_prompt(l, from, scores, w));
  // Whole blocks leave the table, which the engine adopts later: read the keys before.
  if (!prompt_.select.traits().moves_tokens) KVKEEP_TRY(settle(l, to, w));
  if (wide) {
    KVKEEP_TRY(join_layers(l, to, scores, w));
  } else {
    if (bt.couples_layers && !measuring) KVKEEP_TRY(keep_scores(l, from, scores, w));
    if (bt.after_scores() && (measuring || !b.short_prompt))
      KVKEEP_TRY(prompt_.budget.allocate(*ctx_, b.in, w));
    KVKEEP_TRY(cut_prompt(l, from, to, scores, w));
    if (measuring || !b.short_prompt) KVKEEP_TRY(cut_earlier(l, id, to, tokens, w));
  }
  KVKEEP_TRY(fix_decode_budget(l, id, tokens, w));
  return hand_over(l, to, w);
}

/// Adds a layer's scores to the sequence's; the last layer's decide for all.
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::join_layers(layer_data& l, source const& to, score_map<space> scores,
                                       workspace& w) noexcept {
  KVKEEP_TRY(add_layer(l, prompt_.score.traits().comparable,
                       {to.batch, to.layer.slots, scores, false, false, 1, shared_.prompt_sum}, w));
  bool const last = static_cast<std::size_t>(l.number) + 1 == layers_.size();
  return last || w.measuring() ? decide_sequence_prompt(to, w) : status::ok;
}

/// Smaller cuts of the layers before `l` that are due with it.
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::cut_earlier(layer_data const& l, index_t id, source const& to,
                                       index_t tokens, workspace& w) noexcept {
  layer_range const r = prompt_.budget.due(l.number, static_cast<index_t>(layers_.size()));
  for (index_t j = r.first; j < l.number; ++j) {
    layer_data& earlier = layers_[static_cast<std::size_t>(j)];
    source const s = pool(earlier, to.batch.id, to.batch.row, 1);
    auto const row = detail::row_as_map(earlier.slots.rows, shape_.rows.score_at);
    KVKEEP_TRY(cut_prompt(earlier, s, s, detail::rebase(row, id), w));
    KVKEEP_TRY(fix_decode_budget(earlier, id, tokens, w));
  }
  return status::ok;
}

/// Builds the decode scorer's per-slot state of a prompt's slots.
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::settle(layer_data& l, source const& to, workspace& w) noexcept {
  if (!decode_.score.traits().at_decode) return status::ok;
  workspace::frame const frame(w);
  return decode_.score.settle(*ctx_, input(l, to, false, nullptr), w);
}

/// The decode policy takes over what the prompt's policy left, and decides where it keeps less.
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::hand_over(layer_data& l, source const& to, workspace& w) noexcept {
  bool const moved = prompt_.select.traits().moves_tokens;
  if (moved) KVKEEP_TRY(settle(l, to, w));
  bool const late = detail::decides_late(decode_.when);
  if (one_policy_ || late || limits_.engine_commits || !moved) return status::ok;
  index_t const* const id = to.batch.id;
  index_t const* const row = to.batch.row;
  bool const wide = decode_.width() == scope::sequence;
  bool const coupled = prompt_.budget.traits().couples_layers;
  if (w.measuring()) KVKEEP_TRY(decide(l, id, row, 1, 0, w));
  if (!wide && !coupled) return decide(l, id, row, 1, 0, w);
  // Coupled layers are final once the last one has ended.
  if (l.number + 1 != static_cast<index_t>(layers_.size())) return status::ok;
  if (wide) return decide_sequences(id, row, 1, w);
  for (auto& each_layer : layers_) KVKEEP_TRY(decide(each_layer, id, row, 1, 0, w));
  return status::ok;
}

/// Copies a layer's scores beside its slots, where coupled layers are cut again later.
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::keep_scores(layer_data const&, source const& s, score_map<space> m,
                                       workspace& w) noexcept {
  detail::copy_slot_row<space> const copy{m.data,
                                          m.stride[0],
                                          m.stride[1],
                                          shape_.cache.n_kv_heads,
                                          1,
                                          s.batch.id,
                                          &shape_.rows.score_at,
                                          0,
                                          s.layer.slots};
  return each(shape_.cache.n_kv_heads, copy, w);
}

/// Whether some head of a prompt is over the budget that `allocate` has just written.
template <backend Ctx, class P, class D>
bool session<Ctx, P, D>::cuts_at_prompt(layer_data const& l, source const& s) const noexcept {
  if (detail::decides_late(prompt_.when)) return false;
  // The prompt's tokens count: a coupled layer may hold fewer by now.
  if (l.appended[s.id0 + s.batch.id[0]] < prompt_.score.least_tokens()) return false;
  auto const rule = detail::cut_rule_of(prompt_);
  for (index_t h = 0; h < shape_.cache.n_kv_heads; ++h)
    if (rule.due(s.layer.slots.lengths(s.batch.id[0], h), shared_.prompt_k(l.number, h), 0))
      return true;
  return false;
}

/// Applies the budgets of `prompt_k` to one layer: from the prompt view into the cache, or in place.
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::cut_prompt(layer_data& l, source const& from, source const& to,
                                      tensor_ref<float const, 3, space> scores,
                                      workspace& w) noexcept {
  workspace::frame const frame(w);
  index_t const heads = shape_.cache.n_kv_heads;
  index_t const slots = from.layer.kv.shape.max_slots;
  bool const in_place = from.layer.slots.lengths.data == to.layer.slots.lengths.data;
  bool const measuring = w.measuring();
  if (!measuring && in_place && !cuts_at_prompt(l, from)) return status::ok;
  auto const ids = static_cast<std::size_t>(shape_.n_sequences);
  auto keep = row_major<space>(w.take<index_t>(product(ids, heads)), shape_.n_sequences, heads);
  auto const size = static_cast<std::size_t>(heads);
  keep_plan<space> const plan{
      row_major<space>(w.take<index_t>(product(size, slots)), 1, heads, slots),
      row_major<space>(w.take<index_t>(size), 1, heads)};
  if (!measuring && !w.ok()) return status::workspace_too_small;
  bool const cuts = measuring || cuts_at_prompt(l, from);
  detail::resolve_keep<space> const resolve{shared_.prompt_k,
                                            from.layer.slots,
                                            &l.number,
                                            from.batch.id,
                                            heads,
                                            detail::cut_rule_of(prompt_),
                                            0,
                                            cuts ? 0 : std::numeric_limits<index_t>::max(),
                                            keep};
  KVKEEP_TRY(each(heads, resolve, w));
  KVKEEP_TRY(prompt_.select.select(*ctx_, from.batch, from.layer.slots, scores, keep,
                                   guard_of(true, from.id0), plan, w));
  if (!measuring) {
    KVKEEP_TRY(room_for_plan(l, plan, to.batch));
    note_cut(l, from, plan);
    if (!prompt_.select.traits().moves_tokens) KVKEEP_TRY(record_blocks(l, from.batch, plan, w));
    next_generation(to.batch.id[0]);
  }
  op::compact<space> move{from.batch, from.layer, to.batch, to.layer, plan};
  if (!prompt_.select.traits().moves_tokens) move.how = op::move_kind::renumber;
  return run(*ctx_, move, w);
}

/// One kept set for all layers, once the last layer's scores are known; `at` is the sequence in any layer.
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::decide_sequence_prompt(source const& at, workspace& w) noexcept {
  for (auto& l : layers_) {
    source const s = pool(l, at.batch.id, at.batch.row, 1);
    KVKEEP_TRY(cut_prompt(l, s, s, shared_.prompt_sum, w));
  }
  return status::ok;
}

/// The tokens per head that decoding keeps. A prompt shorter than the capacity leaves the capacity; a
/// head whose share is less than what decoding protects (even none is legal) keeps that.
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::fix_decode_budget(layer_data& l, index_t id, index_t tokens,
                                             workspace& w) noexcept {
  return detail::fix_decode_budget(*ctx_, prompt_, decode_, one_policy_,
                                   static_cast<index_t>(layers_.size()), l, id, tokens,
                                   shared_.prompt_k, shared_.frozen, w);
}

}  // namespace kvkeep

#include "decode_slots.hpp"
