// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Decisions while decoding: one victim per head in the steady state, a cut otherwise.
#pragma once

#include <algorithm>

#include "../session.hpp"

namespace kvkeep {

/// After the evidence of one token, without drafts: fold it in, and decide for the next token.
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::after_token(layer_data& l, index_t const* ids, index_t const* rows,
                                       index_t n, workspace& w) noexcept {
  KVKEEP_TRY(fold(l, ids, rows, n, 0, w));
  bool const later = decode_.width() == scope::sequence || limits_.engine_commits ||
                     detail::decides_late(decode_.when);
  if (later && !w.measuring()) return status::ok;
  return decide(l, ids, rows, n, 0, w);
}

/// Slots by which some head of a sequence exceeds what a due decision would keep; 0: nothing is due.
template <backend Ctx, class P, class D>
index_t session<Ctx, P, D>::excess(layer_data const& l, index_t id, index_t extra) const noexcept {
  index_t most = 0;
  auto const rule = detail::cut_rule_of(decode_);
  for (index_t h = 0; h < shape_.cache.n_kv_heads; ++h) {
    if (l.victim(id, h) >= 0) continue;
    index_t const n = l.slots.lengths(id, h), k = l.k(id, h);
    if (rule.due(n, k, extra)) most = std::max(most, n - rule.kept(k, extra));
  }
  return most;
}

/// Whether one token leaves every head that is due, so that its slot can be given to the next one.
template <backend Ctx, class P, class D>
bool session<Ctx, P, D>::one_leaves(layer_data const& l, index_t id, index_t extra) const noexcept {
  return decode_.select.traits().evicts_one && excess(l, id, extra) == 1;
}

/// The sequences of a batch for which a decision is due in a layer, those that need no cut first. The
/// whole batch while measuring.
template <backend Ctx, class P, class D>
auto session<Ctx, P, D>::list_due(layer_data const& l, index_t const* ids, index_t const* rows,
                                  index_t n, index_t extra, workspace& w) const noexcept
    -> due_entries {
  auto const size = static_cast<std::size_t>(n);
  due_entries due{{n, w.take<index_t>(size), w.take<index_t>(size)}, n};
  if (w.measuring() || !w.ok()) return due;
  due.n = due.single = 0;
  for (index_t i = 0; i < n; ++i) {
    if (excess(l, ids[i], extra) == 0) continue;
    index_t at = due.n++;
    if (one_leaves(l, ids[i], extra)) {
      due.ids[at] = due.ids[due.single];
      due.rows[at] = due.rows[due.single];
      at = due.single++;
    }
    due.ids[at] = ids[i];
    due.rows[at] = rows[i];
  }
  return due;
}

/// What a scorer sees of a source whose newest tokens have been folded in. Takes the rows' list from the
/// scratch.
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::newest_input(layer_data const& l, source const& s,
                                        score_input<space>& in, workspace& w) const noexcept {
  index_t* const newest = w.take<index_t>(static_cast<std::size_t>(s.batch.n));
  in = input(l, s, false, newest);
  if (w.measuring()) {
    in.newest_row = &limits_.max_sequences;  // any pointer: the decode form is measured
    return status::ok;
  }
  if (!w.ok()) return status::workspace_too_small;
  index_t const ring = std::max(1, shape_.rows.weight_ring);
  for (index_t i = 0; i < s.batch.n; ++i) newest[i] = (l.seen[s.batch.id[i]] + ring - 1) % ring;
  return status::ok;
}

/// Scores of all slots in use, joined over heads where one set serves a layer.
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::score_tokens(layer_data& l, source const& s, index_t extra,
                                        score_map<space> out, workspace& w) noexcept {
  workspace::frame const frame(w);
  score_input<space> in;
  KVKEEP_TRY(newest_input(l, s, in, w));
  in.guard.recent += extra;
  KVKEEP_TRY(decode_.score.score(*ctx_, in, out, w));
  if (decode_.width() == scope::head || !decode_.score.traits().comparable) return status::ok;
  return run(*ctx_, op::mean_heads<space>{s.batch, s.layer.slots, out}, w);
}

/// What each head of a source keeps when a decision is due, else all it has: `[id, kv_head]`, in scratch.
/// @param extra  slots beyond the budget that stay
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::resolve_keep(layer_data const& l, source const& s, index_t extra,
                                        tensor_ref<index_t, 2, space>& keep,
                                        workspace& w) const noexcept {
  index_t const ids = shape_.n_sequences, heads = shape_.cache.n_kv_heads;
  keep = row_major<space>(w.take<index_t>(product(ids, heads)), ids, heads);
  if (!w.measuring() && !w.ok()) return status::workspace_too_small;
  detail::resolve_keep<space> const step{
      l.k, s.layer.slots, s.batch.id, s.batch.id, heads, detail::cut_rule_of(decode_), extra,
      0,   keep};
  return each(s.batch.n * heads, step, w);
}

/// Victims of a scorer that finds them itself.
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::take_victims(layer_data& l, source const& s, workspace& w) noexcept {
  if constexpr (finds_victims<typename D::score_type, Ctx>) {
    workspace::frame const frame(w);
    score_input<space> in;
    KVKEEP_TRY(newest_input(l, s, in, w));
    tensor_ref<index_t, 2, space> keep;
    KVKEEP_TRY(resolve_keep(l, s, 0, keep, w));
    KVKEEP_TRY(decode_.score.victims(*ctx_, in, keep, l.victim, w));
    for (index_t i = 0; i < s.batch.n && !w.measuring(); ++i) next_generation(s.batch.id[i]);
    if (!w.measuring()) note_victims(l, s.batch);
    return status::ok;
  } else {
    (void)l, (void)s, (void)w;
    return status::unsupported;
  }
}

/// One victim per head of each sequence.
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::evict_single(layer_data& l, source const& s, ranking const& by,
                                        workspace& w) noexcept {
  index_t const heads = shape_.cache.n_kv_heads, n = s.batch.n;
  op::evict_one<space> evict{s.batch, s.layer.slots, by.scores, by.guard, l.victim};
  bool const one_set = decode_.width() != scope::head;  // then all heads hold the same slots
  if (one_set) evict.slots.lengths.extent[1] = 1;
  KVKEEP_TRY(run(*ctx_, evict, w));
  if (one_set)
    KVKEEP_TRY(each(n * heads, detail::share_victim<space>{l.victim, s.batch.id, heads}, w));
  KVKEEP_TRY(each(n * heads,
                  detail::drop_idle_victims<space>{l.slots, by.keep, l.victim, s.batch.id, heads},
                  w));
  if (w.measuring()) return status::ok;
  for (index_t i = 0; i < n; ++i) next_generation(s.batch.id[i]);
  note_victims(l, s.batch);
  return status::ok;
}

/// Cuts each sequence down to what it keeps.
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::evict_several(layer_data& l, source const& s, ranking const& by,
                                         workspace& w) noexcept {
  workspace::frame const frame(w);
  index_t const heads = shape_.cache.n_kv_heads, n = s.batch.n, slots = l.kv.shape.max_slots;
  keep_plan<space> const plan{
      row_major<space>(w.take<index_t>(product(n, heads, slots)), n, heads, slots),
      row_major<space>(w.take<index_t>(product(n, heads)), n, heads)};
  if (!w.measuring() && !w.ok()) return status::workspace_too_small;
  KVKEEP_TRY(
      decode_.select.select(*ctx_, s.batch, s.layer.slots, by.scores, by.keep, by.guard, plan, w));
  if (!w.measuring()) {
    note_cut(l, s, plan);
    for (index_t i = 0; i < n; ++i) next_generation(s.batch.id[i]);
  }
  op::compact<space> move{s.batch, s.layer, s.batch, s.layer, plan, op::move_kind::fill_holes};
  return run(*ctx_, move, w);
}

/// Applies scores to sequences that are due; those that come first and lose one token need no cut.
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::apply(layer_data& l, source const& s,
                                 tensor_ref<float const, 3, space> scores, index_t extra,
                                 workspace& w) noexcept {
  workspace::frame const frame(w);
  ranking by{scores, guard_of(false, 0)};
  by.guard.recent += extra;
  KVKEEP_TRY(resolve_keep(l, s, extra, by.keep, w));
  if (w.measuring()) {
    KVKEEP_TRY(evict_single(l, s, by, w));
    return evict_several(l, s, by, w);
  }
  index_t single = 0;
  while (single < s.batch.n && one_leaves(l, s.batch.id[single], extra)) ++single;
  source part = s;
  part.batch.n = single;
  if (single > 0) KVKEEP_TRY(evict_single(l, part, by, w));
  if (single == s.batch.n) return status::ok;
  part.batch = {s.batch.n - single, s.batch.row + single, s.batch.id + single};
  by.scores = detail::rebase(scores, single);
  return evict_several(l, part, by, w);
}

/// Decides for the sequences that are due in one layer.
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::decide(layer_data& l, index_t const* ids, index_t const* rows, index_t n,
                                  index_t extra, workspace& w) noexcept {
  if (!detail::cuts_while_decoding(decode_.score)) return status::ok;
  workspace::frame const frame(w);
  due_entries const due = list_due(l, ids, rows, n, extra, w);
  if (!w.measuring() && !w.ok()) return status::workspace_too_small;
  index_t found = 0;  // sequences whose scorer finds the victims itself
  bool const finds = decode_.score.traits().finds_victims && decode_.width() == scope::head;
  if (finds && (w.measuring() || (extra == 0 && due.single > 0))) {
    KVKEEP_TRY(take_victims(l, pool(l, due.ids, due.rows, due.single), w));
    if (!w.measuring()) found = due.single;
  }
  n = due.n - found;
  if (n == 0) return status::ok;
  source const s = pool(l, due.ids + found, due.rows + found, n);
  index_t const heads = shape_.cache.n_kv_heads, slots = l.kv.shape.max_slots;
  auto const scores = row_major<space>(w.take<float>(product(n, heads, slots)), n, heads, slots);
  if (!w.measuring() && !w.ok()) return status::workspace_too_small;
  KVKEEP_TRY(score_tokens(l, s, extra, scores, w));
  return apply(l, s, scores, extra, w);
}

/// @param m  scores of a layer and their sum
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::add_layer(layer_data const& l, bool comparable,
                                     op::mean_layers<space> const& m, workspace& w) const noexcept {
  auto const n = static_cast<index_t>(layers_.size());
  return run(*ctx_, detail::placed_among(l.number, n, comparable, m), w);
}

/// The mean over all layers of a batch's scores, `sequence_scores`. @param scores  scratch for a layer's
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::score_layers(batch_ref<space> const& b, score_map<space> scores,
                                        workspace& w) noexcept {
  for (auto& l : layers_) {
    source const s = pool(l, b.id, b.row, b.n);
    KVKEEP_TRY(score_tokens(l, s, 0, scores, w));
    KVKEEP_TRY(add_layer(l, decode_.score.traits().comparable,
                         {s.batch, s.layer.slots, scores, false, false, 1, shared_.sequence_scores},
                         w));
  }
  return status::ok;
}

/// One kept set for all layers, by the mean of their scores.
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::decide_sequences(index_t const* ids, index_t const* rows, index_t n,
                                            workspace& w) noexcept {
  if (!detail::cuts_while_decoding(decode_.score)) return status::ok;
  workspace::frame const frame(w);
  due_entries const due = list_due(layers_[0], ids, rows, n, 0, w);
  if (!w.measuring() && !w.ok()) return status::workspace_too_small;
  if (due.n == 0) return status::ok;
  n = due.n;
  index_t const heads = shape_.cache.n_kv_heads, slots = shape_.cache.max_slots;
  auto const scores = row_major<space>(w.take<float>(product(n, heads, slots)), n, heads, slots);
  if (!w.measuring() && !w.ok()) return status::workspace_too_small;
  KVKEEP_TRY(score_layers({n, due.rows, due.ids}, scores, w));
  for (auto& l : layers_)
    KVKEEP_TRY(apply(l, pool(l, due.ids, due.rows, n), shared_.sequence_scores, 0, w));
  return status::ok;
}

}  // namespace kvkeep

#include "decide_special.hpp"
