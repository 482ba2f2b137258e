// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Device session: decisions with the newest token's own query, before or beside its attention.
#pragma once

#include "../device_session.hpp"
#include "visibility.hpp"

namespace kvkeep {

/// Decisions that precede the attention of their own token (MorphKV's include_current and the official
/// per-query-head attention). A prompt is whole until the first of them, when many tokens leave: what is due
/// is always a cut, and the slots in use are what attention sees.
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::attend_special(layer_data& l, score_input<space> in,
                                                 detail::token_steps<space>& t,
                                                 workspace& w) noexcept {
  if constexpr (detail::scores_directly<typename D::score_type, Ctx>) {
    workspace::frame const frame(w);
    bool const masks = decode_.when.per_head_mask;
    index_t const n = in.batch.n, hq = shape_.cache.n_q_heads, slots = shape_.cache.max_slots;
    auto const c = take_cut(n, w);
    tensor_ref<float, 3, space> own{};
    tensor_ref<std::uint8_t, 3, space> visible{};
    if (masks) {
      own = row_major<space>(w.take<float>(product(n, hq, slots)), n, hq, slots);
      visible = row_major<space>(w.take<std::uint8_t>(product(n, hq, slots)), n, hq, slots);
    }
    if (!w.measuring() && !w.ok()) return status::workspace_too_small;
    // include_current counts this token's query among the rows.
    in.seen = decode_.when.before_attention ? l.appended : l.seen;
    in.guard.recent += 1;
    runner const here{*ctx_, w};
    auto const settle = detail::each_head(in, t.settle);
    KVKEEP_TRY(each(t.push.n, t.push.fn, w));
    KVKEEP_TRY(list_cut(here, l, in.batch, 1, c));
    KVKEEP_TRY(decode_.score.score_direct(*ctx_, in, c.scores, own, w));
    if (!masks) {
      KVKEEP_TRY(apply_cut(here, l, in, c));
      return detail::run_heads(*ctx_, in, w, t.attend, settle);
    }
    // The published attention still sees the cache as it was: attend first, then let go.
    KVKEEP_TRY(mask_heads(in, own, visible, c, w));
    t.attend.visible = visible;
    KVKEEP_TRY(detail::run_heads(*ctx_, in, w, t.attend));
    return apply_cut(here, l, in, c, settle);
  } else {
    (void)l, (void)in, (void)t, (void)w;
    return status::unsupported;
  }
}

/// Published MorphKV attention: each query head sees its own best C - W old tokens and the protected ones.
/// @param own  [entry, q_head, slot] scores
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::mask_heads(score_input<space> const& in,
                                             tensor_ref<float, 3, space> const& own,
                                             tensor_ref<std::uint8_t, 3, space> const& visible,
                                             detail::cut_memory<space> const& c,
                                             workspace& w) noexcept {
  using show = detail::show_plan<space>;
  index_t const heads = shape_.cache.n_kv_heads, group = shape_.cache.group();
  index_t const pieces = show::pieces(visible.extent[2]);
  for (index_t g = 0; g < group; ++g) {
    auto const scores = detail::heads_of_groups(own, group, g);
    KVKEEP_TRY(run(
        *ctx_, op::select_k<space>{in.batch, in.layer.slots, scores, c.keep, in.guard, c.plan}, w));
    KVKEEP_TRY(each(in.batch.n * heads * pieces, show{visible, c.plan, heads, group, g}, w));
  }
  return status::ok;
}

}  // namespace kvkeep
