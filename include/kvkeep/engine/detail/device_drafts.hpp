// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Device session: drafts, of which the backend says how many stay.
#pragma once

#include <algorithm>

#include "../device_session.hpp"

namespace kvkeep {

template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::confirm(batch_ref<space> const& b,
                                          index_t const* accepted) noexcept {
  if (limits_.max_draft == 0) return status::unsupported;
  if (accepted == nullptr || b.n < 1 || b.n > limits_.max_batch) return status::bad_argument;
  KVKEEP_TRY(join());
  workspace w = scratch();
  return confirm_drafts(b, accepted, w);
}

/// Drops what is not accepted, folds the evidence of the rest, token after token, then decides.
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::confirm_drafts(batch_ref<space> const& b, index_t const* accepted,
                                                 workspace& w) noexcept {
  using count = detail::count_drafts<space>;
  using drop = detail::drop_drafts<space>;
  using open = detail::open_drafts<space>;
  auto const at = every(b);
  index_t const n = b.n * at.each_entry(), drafts = limits_.max_draft, ids = shape_.n_sequences;
  auto* const found = w.take<index_t>(static_cast<std::size_t>(n));
  detail::draft_counts const counts{w.take<index_t>(product(b.n, n_layers())),
                                    w.take<index_t>(product(b.n)), w.take<index_t>(product(b.n))};
  index_t const heads = shape_.cache.n_kv_heads;
  auto* const lengths = w.take<index_t>(product(drafts, n_layers(), ids, heads));
  detail::draft_folds<space> const folds{row_major<space>(lengths, drafts, n_layers(), ids, heads),
                                         w.take<index_t>(product(drafts, b.n)),
                                         w.take<index_t>(product(drafts, ids))};
  if (!w.measuring() && !w.ok()) return status::workspace_too_small;
  op::for_each<count, space> const look{n, {at, n_kept(), accepted, counts, found}};
  op::for_each<drop, space> const act{n,
                                      {at, accepted, counts, found, faults_, shared_.generation}};
  index_t const ring = std::max(1, shape_.rows.weight_ring), each_entry = drafts * at.each_entry();
  op::for_each<open, space> const confirm{b.n * each_entry, {at, counts, drafts, ring, folds}};
  KVKEEP_TRY(run(*ctx_, op::make_chain<space>(b.n, 1, each_entry, look, act, confirm), w));
  KVKEEP_TRY(fold_drafts(b, folds, w));
  if (limits_.engine_commits || !detail::cuts_while_decoding(decode_.score)) return status::ok;
  if (decode_.width() == scope::sequence) return cut_sequences(b, w);
  for (auto& l : layers_) {
    workspace::frame const frame(w);
    score_input<space> in;
    KVKEEP_TRY(newest(l, b, in, w));
    KVKEEP_TRY(cut({*ctx_, w}, l, in));
  }
  return status::ok;
}

/// A launch per draft and layer, for scorers that fold anything.
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::fold_drafts(batch_ref<space> const& b,
                                              detail::draft_folds<space> const& folds,
                                              workspace& w) noexcept {
  if (!decode_.score.traits().at_decode) return status::ok;
  for (index_t t = 0; t < limits_.max_draft; ++t)
    for (auto& l : layers_) {
      auto in = input(l, pool(l, b), false);
      in.fresh = detail::slice(l.fresh, t);
      in.layer.slots.lengths = detail::slice(detail::slice(folds.lengths, t), l.number);
      in.newest_row = &shape_.n_sequences;  // measuring: any pointer
      if (!w.measuring()) {
        in.seen = folds.seen + t * shape_.n_sequences;
        in.newest_row = folds.newest + t * b.n;
      }
      KVKEEP_TRY(decode_.score.fold(*ctx_, in, w));
    }
  return status::ok;
}

}  // namespace kvkeep
