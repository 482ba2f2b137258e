// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Decisions with the newest token's own query, before or beside its attention.
#pragma once

#include <algorithm>

#include "../session.hpp"
#include "visibility.hpp"

namespace kvkeep {

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
    auto const visible = row_major<space>(w.take<std::uint8_t>(size), n, hq, slots);
    float* own = decode_.when.per_head_mask ? w.take<float>(size) : nullptr;
    auto const scores = row_major<space>(w.take<float>(product(n, heads, slots)), n, heads, slots);
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
    auto const heads_map = own == nullptr && !measuring ? tensor_ref<float, 3, space>{}
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
    KVKEEP_TRY(
        each(n * hq,
             detail::hide_victims<space>{visible, l.victim, s.batch.id, shape_.cache.group()}, w));
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
  tensor_ref<index_t, 2, space> keep;
  KVKEEP_TRY(resolve_keep(l, s, 1, keep, w));
  auto const size = product(n, heads);
  keep_plan<space> const plan{
      row_major<space>(w.take<index_t>(product(size, slots)), n, heads, slots),
      row_major<space>(w.take<index_t>(size), n, heads)};
  if (!w.measuring() && !w.ok()) return status::workspace_too_small;
  guard_ref<space> guard = guard_of(false, 0);
  guard.recent += 1;
  for (index_t g = 0; g < group; ++g) {
    auto const scores = detail::heads_of_groups(own, group, g);
    KVKEEP_TRY(
        run(*ctx_, op::select_k<space>{s.batch, s.layer.slots, scores, keep, guard, plan}, w));
    using show = detail::show_plan<space>;
    KVKEEP_TRY(each(n * heads * show::pieces(slots), show{visible, plan, heads, group, g}, w));
  }
  return status::ok;
}

}  // namespace kvkeep

#include "moving.hpp"
