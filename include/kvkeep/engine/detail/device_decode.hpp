// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Device session: decoding. Nothing here depends on what only the backend knows.
#pragma once

#include "../device_session.hpp"

namespace kvkeep {

/// Attention (or, without `out`, weights alone), and what follows a token.
/// @param pushed  the append of the same batch has pushed queries and listed ring rows
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::weigh(layer_data& l, batch_ref<space> const& b, queries const& q,
                                        bool pushed, float* out, float* lse,
                                        workspace& w) noexcept {
  bool const measuring = w.measuring();
  index_t const hq = shape_.cache.n_q_heads, ring = shape_.rows.weight_ring;
  score_input<space> in;
  KVKEEP_TRY(newest(l, b, in, w, pushed));
  op::attend<space> a{b, {l.kv, l.slots}};
  a.raw = q;
  if (out != nullptr || measuring) a.out = row_major<space>(out, b.n, hq, shape_.cache.dim_v);
  if (lse != nullptr) a.lse = row_major<space>(lse, b.n, hq);
  a.tickets = row_tickets_;
  a.usual_slots = usual_slots_[static_cast<std::size_t>(l.number)];
  if (ring > 0) {
    a.weights = detail::weight_rows(l.slots.rows, shape_.rows, shape_.cache.group());
    a.weight_sum = l.weight_sum;
    if (shape_.rows.head_floats > 0) a.weight_max = l.weight_max;
    if (ring > 1) a.weight_row = newest_rows_of(l);
    a.ring_stride = l.slots.rows.stride[2];
  }
  if (bound_.attention_folds) a.fold = decode_.score.attention_fold(in);
  detail::token_steps<space> t;
  t.attend = a;
  t.push = pushing(l, b, q);
  if (pushed) t.push.n = 0;
  t.settle = settling(l, b);
  return decide(l, in, t, w);
}

/// Scores of all slots in use, joined over heads where one set serves a layer.
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::score_tokens(runner const& by, score_input<space> const& in,
                                               score_map<space> out) noexcept {
  workspace::frame const frame(by.w);
  KVKEEP_TRY(decode_.score.score(by.ctx, in, out, by.w));
  if (decode_.width() == scope::head || !decode_.score.traits().comparable) return status::ok;
  return by(op::mean_heads<space>{in.batch, in.layer.slots, out});
}

/// Attention of the newest tokens and the decision after it, for the next ones.
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::decide(layer_data& l, score_input<space> const& in,
                                         detail::token_steps<space>& t, workspace& w) noexcept {
  if (limits_.max_draft > 0)
    return detail::run_heads(*ctx_, in, w, t.attend, t.push,
                             detail::each_head(in, detail::mark_attended<space>{l, in.batch}));
  auto const settle = detail::each_head(in, t.settle);
  if (!detail::cuts_while_decoding(decode_.score))
    return detail::run_heads(*ctx_, in, w, t.attend, t.push, settle);
  if (detail::decides_late(decode_.when)) return attend_special(l, in, t, w);
  bool const wide = decode_.width() == scope::sequence;
  if (limits_.engine_commits || wide) {
    KVKEEP_TRY(fold_token(in, t, w));
    return limits_.engine_commits || !is_last(l) ? status::ok : decide_sequences(in.batch, w);
  }
  if (aside_.ctx != nullptr) return decide_aside(l, in, t, w);
  if (w.measuring() && aside_.measured != nullptr) KVKEEP_TRY(measure_aside(l, in, t));
  return decide_by({*ctx_, w}, l, in, t);
}

/// What is left of attention, and the decision after it.
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::decide_by(runner const& by, layer_data& l,
                                            score_input<space> const& in,
                                            detail::token_steps<space>& t) noexcept {
  if (one_leaves_) return evict(by, l, in, t);
  auto const settle = detail::each_head(in, t.settle);
  KVKEEP_TRY(detail::attend_alone(by.ctx, in, t, by.w));
  if (!bound_.attention_folds) KVKEEP_TRY(decode_.score.fold(by.ctx, in, by.w));
  return cut(by, l, in, settle);
}

/// One victim per head over its budget.
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::evict(runner const& by, layer_data& l,
                                        score_input<space> const& in,
                                        detail::token_steps<space>& t) noexcept {
  workspace& w = by.w;
  workspace::frame const frame(w);
  index_t const heads = shape_.cache.n_kv_heads, n_ids = shape_.n_sequences;
  auto const size = product(n_ids, heads);
  auto const keep = row_major<space>(w.take<index_t>(size), n_ids, heads);
  t.victims = row_major<space>(w.take<index_t>(size), n_ids, heads);
  if (!w.measuring() && !w.ok()) return status::workspace_too_small;
  t.resolve = resolving(l, in.batch, 0, keep);
  t.settle.keep = keep;
  t.settle.found = t.victims;
  t.one_set = t.settle.one_set = decode_.width() != scope::head;
  t.tickets = tickets_;
  t.joins = decode_.score.traits().comparable;
  t.folds = !bound_.attention_folds;
  return detail::decide_token(by.ctx, decode_.score, in, t, w);
}

/// What heads keep when a decision is due, else all they have.
/// @param extra  slots beyond the budget that stay
template <backend Ctx, class P, class D>
auto device_session<Ctx, P, D>::resolving(layer_data const& l, batch_ref<space> const& b,
                                          index_t extra,
                                          tensor_ref<index_t, 2, space> const& keep) const noexcept
    -> detail::resolve_keep<space> {
  return {l.k,   l.slots, b.id, b.id, shape_.cache.n_kv_heads, detail::cut_rule_of(decode_),
          extra, 0,       keep};
}

/// Lists the heads of a batch for which a cut is due, and what all of them keep.
/// @param extra  slots beyond the budget that stay
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::list_cut(runner const& by, layer_data const& l,
                                           batch_ref<space> const& b, index_t extra,
                                           detail::cut_memory<space> const& c) const noexcept {
  return by.each(b.n * shape_.cache.n_kv_heads,
                 detail::list_due<space>{resolving(l, b, extra, c.keep), holding(l), c.due});
}

/// Cuts the heads that are listed, by `c.scores`. @param after  steps per head that come last
template <backend Ctx, class P, class D>
template <class... After>
status device_session<Ctx, P, D>::apply_cut(runner const& by, layer_data& l, score_input<space> in,
                                            detail::cut_memory<space> const& c,
                                            After const&... after) noexcept {
  batch_ref<space> const b = in.batch;
  detail::adopt_lengths<space> const adopt{l.slots, c.keep, c.due, b, shape_.cache.n_kv_heads};
  in.layer.slots.lengths = c.due;
  KVKEEP_TRY(
      decode_.select.select(by.ctx, b, in.layer.slots, c.scores, c.keep, in.guard, c.plan, by.w));
  KVKEEP_TRY(by(op::compact<space>{b, in.layer, b, in.layer, c.plan, op::move_kind::fill_holes}));
  return detail::run_heads(by.ctx, in, by.w, detail::each_head(in, adopt), after...);
}

/// A cut of the heads for which one is due.
template <backend Ctx, class P, class D>
template <class... After>
status device_session<Ctx, P, D>::cut(runner const& by, layer_data& l, score_input<space> in,
                                      After const&... after) noexcept {
  workspace::frame const frame(by.w);
  auto const c = take_cut(in.batch.n, by.w);
  if (!by.w.measuring() && !by.w.ok()) return status::workspace_too_small;
  KVKEEP_TRY(list_cut(by, l, in.batch, 0, c));
  in.layer.slots.lengths = c.due;
  KVKEEP_TRY(score_tokens(by, in, c.scores));
  return apply_cut(by, l, in, c, after...);
}

}  // namespace kvkeep

#include "device_aside.hpp"
#include "device_drafts.hpp"
#include "device_moving.hpp"
#include "device_sequences.hpp"
#include "device_special.hpp"
