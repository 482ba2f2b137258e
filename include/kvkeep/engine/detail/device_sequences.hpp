// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Device session: one kept set for all layers of a sequence, which the last one decides.
#pragma once

#include "../device_session.hpp"

namespace kvkeep {

/// Attention of the newest tokens and what the scorer folds of it; nothing is decided.
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::fold_token(score_input<space> const& in,
                                             detail::token_steps<space>& t, workspace& w) noexcept {
  auto const settle = detail::each_head(in, t.settle);
  if (bound_.attention_folds && !t.attended)
    return detail::run_heads(*ctx_, in, w, t.attend, t.push, settle);
  KVKEEP_TRY(detail::attend_alone(*ctx_, in, t, w));
  if (!bound_.attention_folds) KVKEEP_TRY(decode_.score.fold(*ctx_, in, w));
  return each(settle.n, settle.fn, w);
}

/// @param m  scores of a layer and their sum
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::add_layer(runner const& by, layer_data const& l, bool comparable,
                                            op::mean_layers<space> const& m) noexcept {
  return by(detail::placed_among(l.number, n_layers(), comparable, m));
}

template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::decide_sequences(batch_ref<space> const& b,
                                                   workspace& w) noexcept {
  return one_leaves_ ? evict_sequences(b, w) : cut_sequences(b, w);
}

/// One victim per sequence over its budget, the same in all layers and heads.
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::evict_sequences(batch_ref<space> const& b,
                                                  workspace& w) noexcept {
  workspace::frame const frame(w);
  runner const by{*ctx_, w};
  index_t const heads = shape_.cache.n_kv_heads, n_ids = shape_.n_sequences;
  auto const size = product(n_ids, heads);
  auto const keep = row_major<space>(w.take<index_t>(size), n_ids, heads);
  auto const victims = row_major<space>(w.take<index_t>(size), n_ids, heads);
  auto const scores = take_scores(b.n, w);
  if (!w.measuring() && !w.ok()) return status::workspace_too_small;
  for (auto& l : layers_) {
    workspace::frame const inner(w);
    score_input<space> in;
    KVKEEP_TRY(newest(l, b, in, w));
    KVKEEP_TRY(score_tokens(by, in, scores));
    KVKEEP_TRY(
        add_layer(by, l, decode_.score.traits().comparable,
                  {in.batch, in.layer.slots, scores, false, false, 1, shared_.sequence_scores}));
  }
  for (auto& l : layers_) {
    score_input<space> const in = input(l, pool(l, b), false);
    op::evict_one<space> evict{b, l.slots, shared_.sequence_scores, in.guard, victims};
    evict.slots.lengths.extent[1] = 1;
    auto settle = settling(l, b);
    settle.keep = keep;
    settle.found = victims;
    settle.one_set = true;
    KVKEEP_TRY(by(detail::entries_chain(in, evict, detail::each_head(in, resolving(l, b, 0, keep)),
                                        detail::each_head(in, settle))));
  }
  return status::ok;
}

/// Cuts the sequences for which a cut is due, all layers alike.
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::cut_sequences(batch_ref<space> const& b, workspace& w) noexcept {
  workspace::frame const frame(w);
  runner const by{*ctx_, w};
  auto c = take_cut(b.n, w);
  if (!w.measuring() && !w.ok()) return status::workspace_too_small;
  for (bool const sums : {true, false})
    for (auto& l : layers_) {
      workspace::frame const inner(w);
      score_input<space> in;
      KVKEEP_TRY(newest(l, b, in, w));
      KVKEEP_TRY(list_cut(by, l, b, 0, c));
      if (!sums) {
        auto all = c;
        all.scores = shared_.sequence_scores;
        KVKEEP_TRY(apply_cut(by, l, in, all));
        continue;
      }
      in.layer.slots.lengths = c.due;
      KVKEEP_TRY(score_tokens(by, in, c.scores));
      KVKEEP_TRY(add_layer(
          by, l, decode_.score.traits().comparable,
          {in.batch, in.layer.slots, c.scores, false, false, 1, shared_.sequence_scores}));
    }
  return status::ok;
}

}  // namespace kvkeep
