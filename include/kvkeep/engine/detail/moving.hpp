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
                                         batch_ref<space> const&,
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
      if (from.id0 == 0) {
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

/// Remembers the tables that remain after whole blocks leave.
template <backend Ctx, class P, class D>
void session<Ctx, P, D>::record_blocks(layer_data& l, batch_ref<space> const& b,
                                       keep_plan<space> const& plan) noexcept {
  auto const& pages = l.kv.k.layout.paged;
  index_t const size = pages.block_size, per_table = pages.blocks_per_table;
  for (index_t e = 0; e < b.n; ++e)
    for (index_t h = 0; h < shape_.cache.n_kv_heads; ++h) {
      index_t const id = b.id_of(e), row = b.row_of(e);
      index_t* const kept = plan_.kept.at(l.number, id, h * per_table);
      index_t* const gone = plan_.gone.at(l.number, id, h * per_table);
      index_t n_kept = 0, n_gone = 0, next = 0;
      index_t const blocks = (l.slots.lengths(id, h) + size - 1) / size;
      for (index_t block = 0; block < blocks; ++block) {
        bool const stays = next < plan.count(e, h) && plan.slots(e, h, next) / size == block;
        while (next < plan.count(e, h) && plan.slots(e, h, next) / size == block) ++next;
        (stays ? kept[n_kept++] : gone[n_gone++]) = pages.entry(row, h, block);
      }
      plan_.n_kept(l.number, id, h) = n_kept;
      plan_.n_gone(l.number, id, h) = n_gone;
    }
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
  if (!limits_.engine_commits) return status::unsupported;
  if (!decode_.score.traits().at_decode) return status::unsupported;
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
  plan_.n = n;
  workspace w = scratch();
  KVKEEP_TRY(choose_layers(n, w));
  note_scratch(layers_[0], w);
  out.n = n;
  out.n_layers = static_cast<index_t>(layers_.size());
  out.id = plan_.id;
  out.row = plan_.row;
  out.generation = plan_.generation;
  out.slots = plan_.slots;
  out.count = plan_.count;
  return status::ok;
}

template <backend Ctx, class P, class D>
status session<Ctx, P, D>::choose_layers(index_t n, workspace& w) noexcept {
  index_t const heads = shape_.cache.n_kv_heads, slots = shape_.cache.max_slots;
  bool const wide = decode_.width() == scope::sequence;
  auto const n_layers = static_cast<index_t>(layers_.size());
  auto const scores = row_major<space>(
      w.take<float>(product(n, heads, slots)), n, heads, slots);
  auto const ids = static_cast<std::size_t>(shape_.n_sequences);
  auto keep = row_major<space>(w.take<index_t>(product(ids, heads)), shape_.n_sequences, heads);
  if (!w.measuring() && !w.ok()) return status::workspace_too_small;
  auto const score = [&](layer_data& l, source const& s) {
    return score_tokens(l, s, 0, scores, w);
  };
  for (auto& l : layers_) {
    if (!wide) break;
    source const s = pool(l, plan_.id, plan_.row, n);
    KVKEEP_TRY(score(l, s));
    KVKEEP_TRY(run(*ctx_,
                   op::mean_layers<space>{s.batch, s.layer.slots, scores, l.number == 0,
                                          l.number + 1 == n_layers, n_layers,
                                          shared_.sequence_scores},
                   w));
  }
  for (auto& l : layers_) {
    source const s = pool(l, plan_.id, plan_.row, n);
    if (!wide) KVKEEP_TRY(score(l, s));
    detail::resolve_keep<space> const resolve{
        l.k, s.layer.slots, s.batch.id, s.batch.id, heads, decode_.when.evict_after,
        decode_.when.room, 0, decode_.select.traits().block, 0, keep};
    KVKEEP_TRY(each(n * heads, resolve, w));
    keep_plan<space> const plan{detail::rebase(plan_.slots, l.number * n),
                                detail::rebase(plan_.count, l.number * n)};
    KVKEEP_TRY(decode_.select.select(*ctx_, s.batch, s.layer.slots,
                                     wide ? shared_.sequence_scores : scores, keep,
                                     guard_of(false, 0), plan, w));
  }
  return status::ok;
}

template <backend Ctx, class P, class D>
status session<Ctx, P, D>::commit(plan_type const& p) noexcept {
  if (p.id != plan_.id || p.n != plan_.n || p.n == 0) return status::stale_plan;
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
    if (!moves) record_blocks(l, s.batch, plan);
    op::compact<space> move{s.batch, s.layer, s.batch, s.layer, plan};
    move.how = moves ? op::move_kind::fill_holes : op::move_kind::renumber;
    KVKEEP_TRY(run(*ctx_, move, w));
  }
  for (index_t i = 0; i < p.n; ++i) next_generation(p.id[i]);
  plan_.n = 0;
  return status::ok;
}

/// Calls f(layer, head, first_of_table) for every layer and head, `first_of_table` where a distinct block
/// table appears for the first time.
template <backend Ctx, class P, class D>
template <class F>
void session<Ctx, P, D>::each_table(index_t, F&& f) const {
  for (auto const& l : layers_) {
    auto const& a = l.kv.k.layout;
    for (index_t h = 0; h < shape_.cache.n_kv_heads; ++h) {
      bool first = a.kind == layout_kind::paged && (h == 0 || a.paged.table_head_stride != 0);
      for (index_t j = 0; j < l.number && first; ++j) {
        auto const& b = layers_[static_cast<std::size_t>(j)].kv.k.layout;
        first = b.kind != layout_kind::paged || b.paged.table != a.paged.table;
      }
      f(l, h, first);
    }
  }
}

template <backend Ctx, class P, class D>
status session<Ctx, P, D>::report(index_t id, report_buffer const& out, index_t row) noexcept {
  if (!alive(id)) return status::bad_sequence;
  if (row < 0) row = id;
  if (row >= layers_[0].kv.shape.n_seq) return status::bad_argument;
  index_t const heads = shape_.cache.n_kv_heads;
  std::size_t const all = layers_.size() * static_cast<std::size_t>(heads);
  if (!out.lengths.empty() && out.lengths.size() < all) return status::bad_argument;
  std::size_t n_tables = 0, n_freed = 0, table_entries = 0;
  for (bool const writing : {false, true}) {  // sizes first: a report that does not fit changes nothing
    n_tables = n_freed = table_entries = 0;
    each_table(id, [&](layer_data const& l, index_t h, bool first) {
      index_t const at = l.number * heads + h;
      if (writing && !out.lengths.empty())
        out.lengths[static_cast<std::size_t>(at)] = l.slots.lengths(id, h);
      if (!first) return;
      auto const& pages = l.kv.k.layout.paged;
      index_t needed = 0, held = 0;
      for (auto const& o : layers_)  // everything that shares this table
        for (index_t g = 0; g < heads; ++g) {
          bool const same = o.kv.k.layout.kind == layout_kind::paged &&
                            o.kv.k.layout.paged.table == pages.table &&
                            (g == h || pages.table_head_stride == 0);
          if (!same) continue;
          index_t const n = o.slots.lengths(id, g);
          needed = std::max(needed, (n + pages.block_size - 1) / pages.block_size);
          held = std::max(held, plan_.held(o.number, id, g));
        }
      bool const whole = plan_.n_kept(l.number, id, h) >= 0;
      index_t const* kept = whole ? plan_.kept.at(l.number, id, h * pages.blocks_per_table) : nullptr;
      index_t const* gone = whole ? plan_.gone.at(l.number, id, h * pages.blocks_per_table) : nullptr;
      index_t const n_gone = whole ? plan_.n_gone(l.number, id, h) : std::max(0, held - needed);
      for (index_t i = 0; i < n_gone; ++i, ++n_freed)
        if (n_freed < out.freed.size() && writing)
          out.freed[n_freed] = whole ? gone[i] : pages.entry(row, h, needed + i);
      if (writing && n_tables < out.freed_of.size()) out.freed_of[n_tables] = n_gone;
      if (writing && n_tables < out.table_sizes.size()) out.table_sizes[n_tables] = needed;
      std::size_t const from = n_tables * static_cast<std::size_t>(pages.blocks_per_table);
      for (index_t i = 0; i < needed && writing; ++i)
        if (from + static_cast<std::size_t>(i) < out.tables.size())
          out.tables[from + static_cast<std::size_t>(i)] = whole ? kept[i] : pages.entry(row, h, i);
      table_entries = from + static_cast<std::size_t>(needed);
      ++n_tables;
    });
    bool const fits = (out.freed.empty() || out.freed.size() >= n_freed) &&
                      (out.freed_of.empty() || out.freed_of.size() >= n_tables) &&
                      (out.tables.empty() || out.tables.size() >= table_entries) &&
                      (out.table_sizes.empty() || out.table_sizes.size() >= n_tables);
    if (!fits) return status::bad_argument;
  }
  for (auto const& l : layers_)
    for (index_t h = 0; h < heads; ++h) {
      plan_.n_kept(l.number, id, h) = -1;
      plan_.n_gone(l.number, id, h) = 0;
      plan_.held(l.number, id, h) = 0;
    }
  return status::ok;
}

}  // namespace kvkeep

#include "inspect.hpp"
