// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Device session: decoding. Nothing here depends on what only the backend knows.
#pragma once

#include "../device_session.hpp"

namespace kvkeep {

template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::append(index_t layer, batch_ref<space> const& b,
                                         index_t* slots) noexcept {
  index_t const m = managed(layer);
  if (m == -1) return status::ok;
  if (m < 0 || slots == nullptr || b.n < 1 || b.n > limits_.max_batch) return status::bad_argument;
  workspace w = scratch();
  return give_slots(layers_[static_cast<std::size_t>(m)], b, slots, w);
}

/// A block per entry: a head has a slot only if all have.
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::give_slots(layer_data& l, batch_ref<space> const& b,
                                             index_t* slots, workspace& w) noexcept {
  index_t const heads = shape_.cache.n_kv_heads, n = b.n * heads;
  auto* const found = w.take<index_t>(static_cast<std::size_t>(n));
  if (!w.measuring() && !w.ok()) return status::workspace_too_small;
  using find = detail::find_faults<space>;
  using take = detail::take_slots<space>;
  op::for_each<find, space> const look{n, find{l, b, faults_, found}};
  op::for_each<take, space> const give{n, take{l, shape_.rows, b, found, faults_, slots}};
  // A block has as much to do as it has heads, not slots.
  return run(*ctx_, op::make_chain<space>(b.n, 1, heads, look, give), w);
}

template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::attend(index_t layer, batch_ref<space> const& b, queries const& q,
                                         float* out, float* lse) noexcept {
  if (out == nullptr) return status::bad_argument;
  return show_token(layer, b, q, out, lse);
}

template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::observe(index_t layer, batch_ref<space> const& b,
                                          queries const& q) noexcept {
  if (detail::decides_late(decode_.when)) return status::unsupported;
  return show_token(layer, b, q, nullptr, nullptr);
}

template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::show_token(index_t layer, batch_ref<space> const& b,
                                             queries const& q, float* out, float* lse) noexcept {
  index_t const m = managed(layer);
  if (m == -1) return out != nullptr ? status::unsupported : status::ok;
  if (m < 0 || q.data == nullptr || q.n_rows != 1 || b.n < 1 || b.n > limits_.max_batch)
    return status::bad_argument;
  workspace w = scratch();
  return weigh(layers_[static_cast<std::size_t>(m)], b, q, out, lse, w);
}

/// Attention (or, without `out`, weights alone), the query ring, and what follows a token.
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::weigh(layer_data& l, batch_ref<space> const& b, queries const& q,
                                        float* out, float* lse, workspace& w) noexcept {
  bool const measuring = w.measuring();
  index_t const hq = shape_.cache.n_q_heads, ring = shape_.rows.weight_ring;
  index_t* const rows = w.take<index_t>(static_cast<std::size_t>(b.n));
  if (!measuring && !w.ok()) return status::workspace_too_small;
  if (ring > 1) KVKEEP_TRY(each(b.n, detail::ring_rows_of<space>{l.appended, b, ring, rows}, w));
  auto in = input(l, b, false);
  in.seen = l.appended;  // the newest tokens count, though not all heads may know it yet
  // Without a ring, and while measuring, any pointer says that there is a newest token.
  in.newest_row = measuring ? &shape_.n_sequences : ring > 1 ? rows : first_rows_;
  op::attend<space> a{b, {l.kv, l.slots}};
  a.raw = q;
  if (out != nullptr || measuring) a.out = row_major<space>(out, b.n, hq, shape_.cache.dim_v);
  if (lse != nullptr) a.lse = row_major<space>(lse, b.n, hq);
  if (ring > 0) {
    a.weights = detail::weight_rows(l.slots.rows, shape_.rows, shape_.cache.group());
    a.weight_sum = l.weight_sum;
    if (shape_.rows.head_floats > 0) a.weight_max = l.weight_max;
    if (ring > 1) a.weight_row = rows;
    a.ring_stride = l.slots.rows.stride[2];
  }
  if (bound_.attention_folds) a.fold = decode_.score.attention_fold(in);
  detail::token_steps<space> t;
  t.attend = a;
  t.push = {bound_.rings_tokens ? b.n * hq * shape_.cache.dim_k : 0, {l.ring_q, l.appended, b, q}};
  t.settle = settling(l, b);
  return decide(l, in, t, w);
}

/// Scores of all slots in use, joined over heads where one set serves a layer.
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::score_tokens(score_input<space> const& in, score_map<space> out,
                                               workspace& w) noexcept {
  workspace::frame const frame(w);
  KVKEEP_TRY(decode_.score.score(*ctx_, in, out, w));
  if (decode_.width() == scope::head || !decode_.score.traits().comparable) return status::ok;
  return run(*ctx_, op::mean_heads<space>{in.batch, in.layer.slots, out}, w);
}

/// Attention of the newest tokens and the decision after it, for the next ones.
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::decide(layer_data& l, score_input<space> const& in,
                                         detail::token_steps<space>& t, workspace& w) noexcept {
  auto const settle = detail::each_head(in, t.settle);
  if (!detail::cuts_while_decoding(decode_.score))
    return detail::run_heads(*ctx_, in, w, t.attend, t.push, settle);
  if (detail::decides_late(decode_.when)) return attend_special(l, in, t, w);
  if (one_leaves_) return evict(l, in, t, w);
  KVKEEP_TRY(detail::run_heads(*ctx_, in, w, t.attend, t.push));
  if (!bound_.attention_folds) KVKEEP_TRY(decode_.score.fold(*ctx_, in, w));
  KVKEEP_TRY(cut(l, in, w));
  return each(settle.n, settle.fn, w);
}

/// One victim per head over its budget.
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::evict(layer_data& l, score_input<space> const& in,
                                        detail::token_steps<space>& t, workspace& w) noexcept {
  workspace::frame const frame(w);
  index_t const heads = shape_.cache.n_kv_heads, n_ids = shape_.n_sequences;
  auto const size = product(n_ids, heads);
  auto const keep = row_major<space>(w.take<index_t>(size), n_ids, heads);
  t.victims = row_major<space>(w.take<index_t>(size), n_ids, heads);
  if (!w.measuring() && !w.ok()) return status::workspace_too_small;
  index_t const* const ids = in.batch.id;
  t.resolve = {l.k, l.slots, ids, ids, heads, 1.0, decode_.when.room, 0, 1, 0, keep};
  t.settle.keep = keep;
  t.settle.found = t.victims;
  t.one_set = t.settle.one_set = decode_.width() != scope::head;
  t.tickets = tickets_;
  t.joins = decode_.score.traits().comparable;
  t.folds = !bound_.attention_folds;
  return detail::decide_token(*ctx_, decode_.score, in, t, w);
}

/// Takes the memory of a cut from the scratch.
template <backend Ctx, class P, class D>
auto device_session<Ctx, P, D>::take_cut(index_t n, workspace& w) const noexcept
    -> detail::cut_memory<space> {
  index_t const heads = shape_.cache.n_kv_heads, slots = shape_.cache.max_slots;
  index_t const n_ids = shape_.n_sequences;
  auto const ids = product(n_ids, heads), size = product(n, heads);
  detail::cut_memory<space> c;
  c.keep = row_major<space>(w.take<index_t>(ids), n_ids, heads);
  c.due = row_major<space>(w.take<index_t>(ids), n_ids, heads);
  c.scores = row_major<space>(w.take<float>(product(size, slots)), n, heads, slots);
  c.plan = {row_major<space>(w.take<index_t>(product(size, slots)), n, heads, slots),
            row_major<space>(w.take<index_t>(size), n, heads)};
  return c;
}

/// Lists the heads of a batch for which a cut is due, and what all of them keep.
/// @param extra  slots beyond the budget that stay
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::list_cut(layer_data const& l, batch_ref<space> const& b,
                                           index_t extra, detail::cut_memory<space> const& c,
                                           workspace& w) const noexcept {
  index_t const heads = shape_.cache.n_kv_heads;
  detail::resolve_keep<space> const resolve{l.k,
                                            l.slots,
                                            b.id,
                                            b.id,
                                            heads,
                                            decode_.when.evict_after,
                                            decode_.when.room,
                                            extra,
                                            decode_.select.traits().block,
                                            0,
                                            c.keep};
  return each(b.n * heads, detail::list_due<space>{resolve, c.due}, w);
}

/// Cuts the heads that are listed, by `c.scores`.
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::apply_cut(layer_data& l, score_input<space> in,
                                            detail::cut_memory<space> const& c,
                                            workspace& w) noexcept {
  batch_ref<space> const b = in.batch;
  index_t const heads = shape_.cache.n_kv_heads;
  in.layer.slots.lengths = c.due;
  KVKEEP_TRY(
      decode_.select.select(*ctx_, b, in.layer.slots, c.scores, c.keep, in.guard, c.plan, w));
  KVKEEP_TRY(run(
      *ctx_, op::compact<space>{b, in.layer, b, in.layer, c.plan, op::move_kind::fill_holes}, w));
  return each(b.n * heads, detail::adopt_lengths<space>{l.slots, c.keep, c.due, b, heads}, w);
}

/// A cut of the heads for which one is due.
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::cut(layer_data& l, score_input<space> in, workspace& w) noexcept {
  workspace::frame const frame(w);
  auto const c = take_cut(in.batch.n, w);
  if (!w.measuring() && !w.ok()) return status::workspace_too_small;
  KVKEEP_TRY(list_cut(l, in.batch, 0, c, w));
  in.layer.slots.lengths = c.due;
  KVKEEP_TRY(score_tokens(in, c.scores, w));
  return apply_cut(l, in, c, w);
}

}  // namespace kvkeep

#include "device_special.hpp"
