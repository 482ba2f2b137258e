// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Device session: engines that allocate and commit themselves, and what they read back.
#pragma once

#include "../device_session.hpp"

namespace kvkeep {

template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::append_at(batch_ref<space> const& b,
                                            std::int64_t const* slot_mapping) noexcept {
  if (b.n < 1 || b.n > limits_.max_batch) return status::bad_argument;
  KVKEEP_TRY(join());
  workspace w = scratch();
  return give_tails(b, slot_mapping, w);
}

/// A block per entry: a sequence has slots in all layers, or in none.
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::give_tails(batch_ref<space> const& b,
                                             std::int64_t const* slot_mapping,
                                             workspace& w) noexcept {
  using find = detail::find_tail_faults<space>;
  using take = detail::take_tails<space>;
  auto const at = every(b);
  index_t const n = b.n * at.each_entry();
  auto* const found = w.take<index_t>(static_cast<std::size_t>(n));
  auto* const position = w.take<index_t>(product(b.n, n_layers()));
  if (!w.measuring() && !w.ok()) return status::workspace_too_small;
  op::for_each<find, space> const look{
      n, {at, n_kept(), faults_, slot_mapping, found, limits_.max_draft, position}};
  op::for_each<take, space> const give{
      n, {at, shape_.rows, found, position, faults_, shared_.generation}};
  return run(*ctx_, op::make_chain<space>(b.n, 1, at.each_entry(), look, give), w);
}

template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::choose(batch_ref<space> const& b, plan_type& out) noexcept {
  if (!limits_.engine_commits || !detail::cuts_while_decoding(decode_.score))
    return status::unsupported;
  if (b.n < 1 || b.n > limits_.max_batch) return status::bad_argument;
  KVKEEP_TRY(join());
  workspace w = scratch();
  KVKEEP_TRY(choose_layers(b, w));
  out = plan_.chosen(b.n, n_layers());
  return status::ok;
}

/// Scores and selection of all layers, for the sequences as they are.
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::choose_layers(batch_ref<space> const& b, workspace& w) noexcept {
  using find = detail::find_unready<space>;
  using stamp = detail::stamp_plan<space>;
  runner const by{*ctx_, w};
  index_t const heads = shape_.cache.n_kv_heads, n_ids = shape_.n_sequences;
  auto const at = every(b);
  auto* const found = w.take<index_t>(product(b.n, at.each_entry()));
  auto const keep = row_major<space>(w.take<index_t>(product(n_ids, heads)), n_ids, heads);
  auto const scores = take_scores(b.n, w);
  if (!w.measuring() && !w.ok()) return status::workspace_too_small;
  op::for_each<find, space> const look{b.n * at.each_entry(),
                                       {at, n_kept(), shared_.generation, nullptr, found}};
  op::for_each<stamp, space> const note{b.n, {at, found, faults_, shared_.generation, plan_}};
  KVKEEP_TRY(run(*ctx_, op::make_chain<space>(b.n, 1, at.each_entry(), look, note), w));
  batch_ref<space> const chosen{b.n, plan_.row, plan_.id};
  bool const wide = decode_.width() == scope::sequence;
  for (bool const sums : {true, false})
    for (auto& l : layers_) {
      if (sums && !wide) continue;
      workspace::frame const frame(w);
      score_input<space> in;
      KVKEEP_TRY(newest(l, chosen, in, w));
      if (sums || !wide) KVKEEP_TRY(score_tokens(by, in, scores));
      if (sums) {
        KVKEEP_TRY(add_layer(
            by, l, decode_.score.traits().comparable,
            {in.batch, in.layer.slots, scores, false, false, 1, shared_.sequence_scores}));
        continue;
      }
      KVKEEP_TRY(each(b.n * heads, resolving(l, chosen, 0, keep), w));
      KVKEEP_TRY(decode_.select.select(*ctx_, chosen, l.slots,
                                       wide ? shared_.sequence_scores : scores, keep, in.guard,
                                       plan_of(l, b.n), w));
    }
  return status::ok;
}

template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::commit(plan_type const& p) noexcept {
  if (!plan_.is_last(p)) return status::stale_plan;
  KVKEEP_TRY(join());
  workspace w = scratch();
  return commit_layers(p.n, w);
}

/// Applies the plan to the sequences that it was made for and that have not changed since.
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::commit_layers(index_t n, workspace& w) noexcept {
  using find = detail::find_unready<space>;
  using admit = detail::admit_plan<space>;
  batch_ref<space> const b{n, plan_.row, plan_.id};
  index_t const heads = shape_.cache.n_kv_heads, n_ids = shape_.n_sequences;
  bool const moves = decode_.select.traits().moves_tokens;
  auto const at = every(b);
  auto* const found = w.take<index_t>(product(n, at.each_entry()));
  auto* const refused = w.take<index_t>(product(n));
  auto const lengths = row_major<space>(w.take<index_t>(product(n_ids, heads)), n_ids, heads);
  if (!w.measuring() && !w.ok()) return status::workspace_too_small;
  op::for_each<find, space> const look{n * at.each_entry(),
                                       {at, n_kept(), shared_.generation, plan_.generation, found}};
  op::for_each<admit, space> const say{n, {at, found, faults_, shared_.generation, refused}};
  KVKEEP_TRY(run(*ctx_, op::make_chain<space>(n, 1, at.each_entry(), look, say), w));
  for (auto& l : layers_) {
    auto const plan = plan_of(l, n);
    KVKEEP_TRY(each(n * heads,
                    detail::open_commit<space>{holding(l), b, plan.count, refused, lengths}, w));
    detail::record_blocks<space> const record{l, b, plan, plan_, refused};
    if (!moves) KVKEEP_TRY(each(n * heads * record.steps(), record, w));
    auto layer = pool(l, b).layer;
    layer.slots.lengths = lengths;
    op::compact<space> move{b, layer, b, layer, plan};
    move.how = moves ? op::move_kind::fill_holes : op::move_kind::renumber;
    KVKEEP_TRY(run(*ctx_, move, w));
    KVKEEP_TRY(each(n * heads, detail::close_commit<space>{l.slots, b, refused, lengths}, w));
  }
  return status::ok;
}

template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::report(index_t id, report_buffer const& out,
                                         index_t row) noexcept {
  using look = detail::measure_tables<space>;
  using say = detail::write_tables<space>;
  using close = detail::close_report<space>;
  if (!alive(id)) return status::bad_sequence;
  if (row < 0) row = id;
  if (row >= layers_[0].kv.shape.n_seq) return status::bad_argument;
  index_t const heads = n_layers() * shape_.cache.n_kv_heads, n = plan_.n_tables;
  auto const all = detail::list_tables(layers_.data(), n_layers(), nullptr);
  auto const entries = static_cast<std::size_t>(all.entries);
  auto const fits = [](std::span<index_t> s, std::size_t size) {
    return s.empty() || s.size() >= size;
  };
  if (!fits(out.lengths, product(heads)) || !fits(out.freed, entries) ||
      !fits(out.freed_of, product(n)) || !fits(out.tables, entries) ||
      !fits(out.table_sizes, product(n)))
    return status::bad_argument;
  KVKEEP_TRY(join());
  auto const data = [](std::span<index_t> s) { return s.empty() ? nullptr : s.data(); };
  op::for_each<look, space> const count{n, {layer_table_, n_layers(), plan_, id}};
  op::for_each<say, space> const write{
      n,
      {layer_table_, plan_, id, row, data(out.freed), data(out.freed_of), data(out.tables),
       data(out.table_sizes)}};
  op::for_each<close, space> const end{
      heads, {layer_table_, plan_, id, data(out.lengths), faults_, data(out.faults)}};
  workspace w = scratch();
  return run(*ctx_, op::make_chain<space>(1, 1, heads, count, write, end), w);
}

}  // namespace kvkeep
