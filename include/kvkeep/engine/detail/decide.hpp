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
                     decode_.when.before_attention || decode_.when.per_head_mask;
  if (later && !w.measuring()) return status::ok;
  return decide(l, ids, rows, n, 0, w);
}

/// Slots by which some head of a sequence exceeds what a due decision would keep; 0: nothing is due.
template <backend Ctx, class P, class D>
index_t session<Ctx, P, D>::excess(layer_data const& l, index_t id, index_t extra) const noexcept {
  index_t most = 0;
  index_t const block = decode_.select.traits().block;
  index_t const room = decode_.when.room;
  for (index_t h = 0; h < shape_.cache.n_kv_heads; ++h) {
    index_t const n = l.slots.lengths(id, h) - (l.victim(id, h) >= 0 ? 1 : 0);
    index_t const k = l.k(id, h);
    bool const due = n >= detail::trigger(k, decode_.when.evict_after) - room + extra &&
                     (block == 1 || n / block > k / block);
    if (due && l.victim(id, h) < 0) most = std::max(most, n - (std::max(k - room, 0) + extra));
  }
  return most;
}

/// The sequences of a batch for which a decision is due in a layer.
template <backend Ctx, class P, class D>
index_t session<Ctx, P, D>::list_due(layer_data const& l, index_t const* ids, index_t const* rows,
                                     index_t n, index_t extra, index_t* due_ids,
                                     index_t* due_rows) const noexcept {
  index_t count = 0;
  for (index_t i = 0; i < n; ++i) {
    if (excess(l, ids[i], extra) == 0) continue;
    due_ids[count] = ids[i];
    due_rows[count++] = rows[i];
  }
  return count;
}

/// Scores of all slots in use, joined over heads where one set serves a layer.
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::score_tokens(layer_data& l, source const& s, index_t extra,
                                        score_map<space> out, workspace& w) noexcept {
  workspace::frame const frame(w);
  index_t* newest = w.take<index_t>(static_cast<std::size_t>(s.batch.n));
  auto in = input(l, s, false, newest);
  in.guard.recent += extra;
  if (w.measuring()) {
    in.newest_row = &in.query_ring;  // any pointer: the decode form is measured
  } else {
    if (!w.ok()) return status::workspace_too_small;
    index_t const ring = std::max(1, shape_.rows.weight_ring);
    for (index_t i = 0; i < s.batch.n; ++i)
      newest[i] = (l.seen[s.batch.id[i]] + ring - 1) % ring;
  }
  KVKEEP_TRY(decode_.score.score(*ctx_, in, out, w));
  if (decode_.width() == scope::head || !decode_.score.traits().comparable) return status::ok;
  return run(*ctx_, op::mean_heads<space>{s.batch, s.layer.slots, out}, w);
}

/// Turns scores into victims where one token leaves every head, else into a cut.
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::apply(layer_data& l, source const& s,
                                 tensor_ref<float const, 3, space> scores, index_t extra,
                                 workspace& w) noexcept {
  workspace::frame const frame(w);
  bool const measuring = w.measuring();
  index_t const heads = shape_.cache.n_kv_heads, n = s.batch.n;
  guard_ref<space> guard = guard_of(false, 0);
  guard.recent += extra;
  index_t most = 0;
  for (index_t i = 0; i < n && !measuring; ++i)
    most = std::max(most, excess(l, s.batch.id[i], extra));
  auto const ids = static_cast<std::size_t>(shape_.n_sequences);
  auto keep = row_major<space>(w.take<index_t>(product(ids, heads)), shape_.n_sequences, heads);
  if (!measuring && !w.ok()) return status::workspace_too_small;
  auto const t = decode_.select.traits();
  detail::resolve_keep<space> const resolve{l.k, s.layer.slots, s.batch.id, s.batch.id, heads,
                                            decode_.when.evict_after, decode_.when.room, extra,
                                            t.block, 0, keep};
  KVKEEP_TRY(each(n * heads, resolve, w));
  if (measuring || (t.evicts_one && most == 1)) {
    op::evict_one<space> evict{s.batch, s.layer.slots, scores, guard, l.victim};
    bool const one_set = decode_.width() != scope::head;  // then all heads hold the same slots
    if (one_set) evict.slots.lengths.extent[1] = 1;
    KVKEEP_TRY(run(*ctx_, evict, w));
    if (one_set)
      KVKEEP_TRY(each(n * heads, detail::share_victim<space>{l.victim, s.batch.id, heads}, w));
    KVKEEP_TRY(each(n * heads,
                    detail::drop_idle_victims<space>{l.slots, keep, l.victim, s.batch.id, heads},
                    w));
    if (!measuring) {
      for (index_t i = 0; i < n; ++i) next_generation(s.batch.id[i]);
      note_victims(l, s.batch);
      return status::ok;
    }
  }
  auto const size = product(n, heads);
  index_t const slots = l.kv.shape.max_slots;
  keep_plan<space> const plan{row_major<space>(w.take<index_t>(product(size, slots)), n, heads, slots),
                              row_major<space>(w.take<index_t>(size), n, heads)};
  if (!measuring && !w.ok()) return status::workspace_too_small;
  KVKEEP_TRY(decode_.select.select(*ctx_, s.batch, s.layer.slots, scores, keep, guard, plan, w));
  if (!measuring) {
    note_cut(l, s, plan);
    for (index_t i = 0; i < n; ++i) next_generation(s.batch.id[i]);
  }
  op::compact<space> move{s.batch, s.layer, s.batch, s.layer, plan, op::move_kind::fill_holes};
  return run(*ctx_, move, w);
}

/// Decides for the sequences that are due in one layer.
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::decide(layer_data& l, index_t const* ids, index_t const* rows,
                                  index_t n, index_t extra, workspace& w) noexcept {
  bool const whole = decode_.score.least_tokens() == std::numeric_limits<index_t>::max();
  if (!decode_.score.traits().at_decode || whole) return status::ok;
  workspace::frame const frame(w);
  index_t* due_ids = w.take<index_t>(static_cast<std::size_t>(n));
  index_t* due_rows = w.take<index_t>(static_cast<std::size_t>(n));
  if (!w.measuring()) {
    if (!w.ok()) return status::workspace_too_small;
    n = list_due(l, ids, rows, n, extra, due_ids, due_rows);
    if (n == 0) return status::ok;
  }
  source const s = pool(l, due_ids, due_rows, n);
  index_t const heads = shape_.cache.n_kv_heads, slots = l.kv.shape.max_slots;
  auto const scores = row_major<space>(
      w.take<float>(product(n, heads, slots)), n, heads, slots);
  if (!w.measuring() && !w.ok()) return status::workspace_too_small;
  KVKEEP_TRY(score_tokens(l, s, extra, scores, w));
  return apply(l, s, scores, extra, w);
}

/// One kept set for all layers: scores are summed over the layers first.
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::decide_sequences(index_t const* ids, index_t const* rows, index_t n,
                                            workspace& w) noexcept {
  bool const whole = decode_.score.least_tokens() == std::numeric_limits<index_t>::max();
  if (!decode_.score.traits().at_decode || whole) return status::ok;
  workspace::frame const frame(w);
  index_t* due_ids = w.take<index_t>(static_cast<std::size_t>(n));
  index_t* due_rows = w.take<index_t>(static_cast<std::size_t>(n));
  if (!w.measuring()) {
    if (!w.ok()) return status::workspace_too_small;
    n = list_due(layers_[0], ids, rows, n, 0, due_ids, due_rows);
    if (n == 0) return status::ok;
  }
  index_t const heads = shape_.cache.n_kv_heads, slots = shape_.cache.max_slots;
  auto const scores = row_major<space>(
      w.take<float>(product(n, heads, slots)), n, heads, slots);
  if (!w.measuring() && !w.ok()) return status::workspace_too_small;
  auto const n_layers = static_cast<index_t>(layers_.size());
  for (auto& l : layers_) {
    source const s = pool(l, due_ids, due_rows, n);
    KVKEEP_TRY(score_tokens(l, s, 0, scores, w));
    KVKEEP_TRY(run(*ctx_,
                   op::mean_layers<space>{s.batch, s.layer.slots, scores, l.number == 0,
                                          l.number + 1 == n_layers, n_layers,
                                          shared_.sequence_scores},
                   w));
  }
  for (auto& l : layers_)
    KVKEEP_TRY(apply(l, pool(l, due_ids, due_rows, n), shared_.sequence_scores, 0, w));
  return status::ok;
}

/// Decisions that precede the attention of their own token (MorphKV's include_current and the official
/// per-query-head attention). Slots hold C + 2 tokens; C + 1 of them stay.
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::attend_special(layer_data& l, source const& s, op::attend<space>& a,
                                          workspace& w) noexcept {
  if constexpr (detail::scores_directly<typename D::score_type, Ctx>) {
    workspace::frame const frame(w);
    bool const measuring = w.measuring();
    index_t const n = s.batch.n, hq = shape_.cache.n_q_heads, slots = l.kv.shape.max_slots;
    index_t const heads = shape_.cache.n_kv_heads;
    auto const size = product(n, hq, slots);
    auto const visible =
        row_major<space>(w.take<std::uint8_t>(size), n, hq, slots);
    float* own = decode_.when.per_head_mask ? w.take<float>(size) : nullptr;
    auto const scores = row_major<space>(
        w.take<float>(product(n, heads, slots)), n, heads, slots);
    index_t* seen = w.take<index_t>(static_cast<std::size_t>(shape_.n_sequences));
    if (!measuring && !w.ok()) return status::workspace_too_small;
    auto in = input(l, s, false, nullptr);
    in.guard.recent += 1;
    if (!measuring) {
      // include_current counts this token's query among the rows.
      std::copy_n(l.seen, shape_.n_sequences, seen);
      for (index_t i = 0; i < n && decode_.when.before_attention; ++i) ++seen[s.batch.id[i]];
      in.seen = seen;
      KVKEEP_TRY(each(n * hq, detail::show_all<space>{visible}, w));
    }
    auto const heads_map = own == nullptr && !measuring
                               ? tensor_ref<float, 3, space>{}
                               : row_major<space>(own, n, hq, slots);
    KVKEEP_TRY(decode_.score.score_direct(*ctx_, in, scores, heads_map, w));
    if (decode_.when.per_head_mask) KVKEEP_TRY(mask_heads(l, s, heads_map, visible, w));
    if (measuring) {
      KVKEEP_TRY(decide(l, nullptr, nullptr, n, 1, w));
      a.visible = visible;
      return run(*ctx_, a, w);
    }
    // The published attention still sees the cache as it was: attend first, then let go.
    if (decode_.when.per_head_mask) {
      a.visible = visible;
      KVKEEP_TRY(run(*ctx_, a, w));
      return let_go(l, s, scores, w);
    }
    KVKEEP_TRY(let_go(l, s, scores, w));
    KVKEEP_TRY(each(n * hq,
                    detail::hide_victims<space>{visible, l.victim, s.batch.id,
                                                shape_.cache.group()},
                    w));
    a.visible = visible;
    return run(*ctx_, a, w);
  } else {
    (void)l, (void)s, (void)a, (void)w;
    return status::unsupported;
  }
}

/// Applies scores to those sequences of a source that are due; one slot stays for the current token.
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::let_go(layer_data& l, source const& s, score_map<space> scores,
                                  workspace& w) noexcept {
  for (index_t i = 0; i < s.batch.n; ++i) {
    if (excess(l, s.batch.id[i], 1) == 0) continue;
    source one = s;
    one.batch = {1, s.batch.row + i, s.batch.id + i};
    KVKEEP_TRY(apply(l, one, detail::rebase(scores, i), 1, w));
  }
  return status::ok;
}

/// Published MorphKV attention: each query head sees its own best C - W old tokens and the protected ones.
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::mask_heads(layer_data& l, source const& s,
                                      tensor_ref<float, 3, space> own,
                                      tensor_ref<std::uint8_t, 3, space> visible,
                                      workspace& w) noexcept {
  workspace::frame const frame(w);
  index_t const n = s.batch.n, heads = shape_.cache.n_kv_heads, group = shape_.cache.group();
  index_t const slots = l.kv.shape.max_slots;
  auto const ids = static_cast<std::size_t>(shape_.n_sequences);
  auto keep = row_major<space>(w.take<index_t>(product(ids, heads)), shape_.n_sequences, heads);
  auto const size = product(n, heads);
  keep_plan<space> const plan{row_major<space>(w.take<index_t>(product(size, slots)), n, heads, slots),
                              row_major<space>(w.take<index_t>(size), n, heads)};
  if (!w.measuring() && !w.ok()) return status::workspace_too_small;
  detail::resolve_keep<space> const resolve{l.k, s.layer.slots, s.batch.id, s.batch.id, heads,
                                            decode_.when.evict_after, decode_.when.room, 1, 1, 0,
                                            keep};
  KVKEEP_TRY(each(n * heads, resolve, w));
  guard_ref<space> guard = guard_of(false, 0);
  guard.recent += 1;
  for (index_t g = 0; g < group; ++g) {
    tensor_ref<float const, 3, space> scores;
    scores.data = own.data == nullptr ? nullptr : own.at(0, g);
    index_t const extent[] = {n, heads, slots};
    offset_t const stride[] = {own.stride[0], own.stride[1] * group, own.stride[2]};
    for (int axis = 0; axis < 3; ++axis) {
      scores.extent[axis] = extent[axis];
      scores.stride[axis] = stride[axis];
    }
    KVKEEP_TRY(run(*ctx_,
                   op::select_k<space>{s.batch, s.layer.slots, scores, keep, guard, plan}, w));
    KVKEEP_TRY(each(n * heads, detail::show_plan<space>{visible, plan, heads, group, g}, w));
  }
  return status::ok;
}

}  // namespace kvkeep

#include "moving.hpp"
