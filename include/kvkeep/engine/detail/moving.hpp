// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Plans that the engine commits, block tables, counters of what moved.
#pragma once

#include <algorithm>

#include "../session.hpp"

namespace kvkeep {

/// The destination has slots and valid table entries for what a plan keeps.
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::room_for_plan(layer_data const& l, keep_plan<space> const& plan,
                                         batch_ref<space> const& to) const noexcept {
  for (index_t h = 0; h < shape_.cache.n_kv_heads; ++h) {
    index_t const n = plan.count(0, h);
    if (n > l.kv.shape.max_slots) return status::capacity_exceeded;
    for (auto const* p : {&l.kv.k, &l.kv.v}) {
      index_t const row = to.row[0];
      if (n > visit_layout(p->layout, [&](auto const& x) { return x.capacity(row, h); }))
        return status::capacity_exceeded;
      if (p->layout.kind != layout_kind::paged) continue;
      auto const& pages = p->layout.paged;
      for (index_t i = 0; i * pages.block_size < n; ++i)
        if (pages.entry(row, h, i) < 0 || pages.entry(row, h, i) >= pages.n_blocks)
          return status::bad_table;
    }
  }
  return status::ok;
}

template <backend Ctx, class P, class D>
void session<Ctx, P, D>::note_cut(layer_data& l, source const& from,
                                  keep_plan<space> const& plan) noexcept {
  index_t const row_bytes = l.kv.k.row_bytes + l.kv.v.row_bytes;
  index_t const block =
      l.kv.k.layout.kind == layout_kind::paged ? l.kv.k.layout.paged.block_size : 1;
  for (index_t i = 0; i < from.batch.n; ++i)
    for (index_t h = 0; h < shape_.cache.n_kv_heads; ++h) {
      index_t const id = from.batch.id[i];
      index_t const n = from.layer.slots.lengths(id, h), kept = plan.count(i, h);
      if (from.layer.slots.lengths.data == l.slots.lengths.data) {  // no transient prompt
        index_t& held = plan_.held(l.number, id, h);
        held = std::max(held, (n + block - 1) / block);
      }
      l.count.evicted += n - kept;
      l.count.freed_bytes += static_cast<std::int64_t>(n - kept) * row_bytes;
      l.count.moved_bytes += static_cast<std::int64_t>(std::min(kept, n - kept)) * row_bytes;
    }
  ++l.count.cuts;
}

template <backend Ctx, class P, class D>
void session<Ctx, P, D>::note_victims(layer_data& l, batch_ref<space> const& b) noexcept {
  for (index_t i = 0; i < b.n; ++i)
    for (index_t h = 0; h < shape_.cache.n_kv_heads; ++h) {
      if (l.victim(b.id[i], h) < 0) continue;
      ++l.count.victims;
      ++l.count.evicted;
      l.count.freed_bytes += l.kv.k.row_bytes + l.kv.v.row_bytes;
    }
}

template <backend Ctx, class P, class D>
status session<Ctx, P, D>::record_blocks(layer_data const& l, batch_ref<space> const& b,
                                         keep_plan<space> const& plan, workspace& w) noexcept {
  detail::record_blocks<space> const record{l, b, plan, plan_};
  return each(b.n * shape_.cache.n_kv_heads * record.steps(), record, w);
}

template <backend Ctx, class P, class D>
bool session<Ctx, P, D>::due(batch const& b) const noexcept {
  if (check_batch(b) != status::ok || !limits_.engine_commits) return false;
  if (!detail::cuts_while_decoding(decode_.score)) return false;
  for (auto const& l : layers_)
    for (index_t const id : b.ids)
      if (l.appended[id] == shared_.confirmed[id] && excess(l, id, 0) > 0) return true;
  return false;
}

template <backend Ctx, class P, class D>
status session<Ctx, P, D>::choose(batch const& b, plan_type& out) noexcept {
  KVKEEP_TRY(check_batch(b));
  if (!limits_.engine_commits || !detail::cuts_while_decoding(decode_.score))
    return status::unsupported;
  auto const n = static_cast<index_t>(b.ids.size());
  for (auto const& l : layers_)
    for (std::size_t i = 0; i < b.ids.size(); ++i) {
      if (l.appended[b.ids[i]] != shared_.confirmed[b.ids[i]]) return status::bad_order;
      KVKEEP_TRY(check_blocks(l, b.rows.empty() ? b.ids[i] : b.rows[i], b.ids[i], 0));
    }
  for (index_t i = 0; i < n; ++i) {
    plan_.id[i] = b.ids[static_cast<std::size_t>(i)];
    plan_.row[i] = b.rows.empty() ? plan_.id[i] : b.rows[static_cast<std::size_t>(i)];
    plan_.generation[i] = shared_.generation[plan_.id[i]];
  }
  workspace w = scratch();
  KVKEEP_TRY(choose_layers(n, w));
  note_scratch(layers_[0], w);
  out = plan_.chosen(n, static_cast<index_t>(layers_.size()));
  return status::ok;
}

template <backend Ctx, class P, class D>
status session<Ctx, P, D>::choose_layers(index_t n, workspace& w) noexcept {
  index_t const heads = shape_.cache.n_kv_heads, slots = shape_.cache.max_slots;
  bool const wide = decode_.width() == scope::sequence;
  auto const own = row_major<space>(w.take<float>(product(n, heads, slots)), n, heads, slots);
  if (!w.measuring() && !w.ok()) return status::workspace_too_small;
  if (wide) KVKEEP_TRY(score_layers({n, plan_.row, plan_.id}, own, w));
  score_map<space> const scores = wide ? shared_.sequence_scores : own;
  for (auto& l : layers_) {
    workspace::frame const frame(w);
    source const s = pool(l, plan_.id, plan_.row, n);
    if (!wide) KVKEEP_TRY(score_tokens(l, s, 0, own, w));
    tensor_ref<index_t, 2, space> keep;
    KVKEEP_TRY(resolve_keep(l, s, 0, keep, w));
    keep_plan<space> const plan{detail::rebase(plan_.slots, l.number * n),
                                detail::rebase(plan_.count, l.number * n)};
    KVKEEP_TRY(decode_.select.select(*ctx_, s.batch, s.layer.slots, scores, keep,
                                     guard_of(false, 0), plan, w));
  }
  return status::ok;
}

template <backend Ctx, class P, class D>
status session<Ctx, P, D>::commit(plan_type const& p) noexcept {
  if (!plan_.is_last(p)) return status::stale_plan;
  for (index_t i = 0; i < p.n; ++i)
    if (!alive(p.id[i]) || shared_.generation[p.id[i]] != p.generation[i])
      return status::stale_plan;
  for (auto const& l : layers_)
    for (index_t i = 0; i < p.n; ++i) {
      if (l.appended[p.id[i]] != shared_.confirmed[p.id[i]]) return status::bad_order;
      KVKEEP_TRY(check_blocks(l, p.row[i], p.id[i], 0));
    }
  workspace w = scratch();
  bool const moves = decode_.select.traits().moves_tokens;
  for (auto& l : layers_) {
    source const s = pool(l, p.id, p.row, p.n);
    keep_plan<space> const plan{detail::rebase(plan_.slots, l.number * p.n),
                                detail::rebase(plan_.count, l.number * p.n)};
    note_cut(l, s, plan);
    if (!moves) KVKEEP_TRY(record_blocks(l, s.batch, plan, w));
    op::compact<space> move{s.batch, s.layer, s.batch, s.layer, plan};
    move.how = moves ? op::move_kind::fill_holes : op::move_kind::renumber;
    KVKEEP_TRY(run(*ctx_, move, w));
  }
  for (index_t i = 0; i < p.n; ++i) next_generation(p.id[i]);
  plan_.n = 0;
  return status::ok;
}

template <backend Ctx, class P, class D>
status session<Ctx, P, D>::report(index_t id, report_buffer const& out, index_t row) noexcept {
  if (!alive(id)) return status::bad_sequence;
  if (row < 0) row = id;
  if (row >= layers_[0].kv.shape.n_seq) return status::bad_argument;
  auto const n_layers = static_cast<index_t>(layers_.size());
  index_t const heads = n_layers * shape_.cache.n_kv_heads;
  // Whole blocks have left: whoever is not told which ones would go on with the old table.
  bool blocks_left = false;
  for (index_t i = 0; i < heads; ++i)
    blocks_left = blocks_left ||
                  plan_.n_kept(i / shape_.cache.n_kv_heads, id, i % shape_.cache.n_kv_heads) >= 0;
  if (blocks_left && out.tables.empty() && out.freed.empty()) return status::bad_argument;
  workspace w = scratch();
  KVKEEP_TRY(
      each(plan_.n_tables, detail::measure_tables<space>{layers_.data(), n_layers, plan_, id}, w));
  // A report that does not fit changes nothing.
  std::size_t n_freed = 0, n_entries = 0, before = 0;
  for (index_t t = 0; t < plan_.n_tables; ++t) {
    auto const& owner = layers_[static_cast<std::size_t>(plan_.owner[t] / shape_.cache.n_kv_heads)];
    n_freed += static_cast<std::size_t>(plan_.freed[t]);
    n_entries = before + static_cast<std::size_t>(plan_.needed[t]);
    before += static_cast<std::size_t>(owner.kv.k.layout.paged.blocks_per_table);
  }
  auto const tables = static_cast<std::size_t>(plan_.n_tables);
  auto const fits = [](std::span<index_t> s, std::size_t n) { return s.empty() || s.size() >= n; };
  if (!fits(out.lengths, static_cast<std::size_t>(heads)) || !fits(out.freed, n_freed) ||
      !fits(out.freed_of, tables) || !fits(out.tables, n_entries) || !fits(out.table_sizes, tables))
    return status::bad_argument;
  auto const data = [](std::span<index_t> s) { return s.empty() ? nullptr : s.data(); };
  KVKEEP_TRY(
      each(plan_.n_tables,
           detail::write_tables<space>{layers_.data(), plan_, id, row, data(out.freed),
                                       data(out.freed_of), data(out.tables), data(out.table_sizes)},
           w));
  return each(heads,
              detail::close_report<space>{layers_.data(), plan_, id, data(out.lengths), nullptr,
                                          data(out.faults)},
              w);
}

}  // namespace kvkeep

#include "inspect.hpp"
