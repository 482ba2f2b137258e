// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Memory of plans, and what becomes of block tables: which entries stay, which blocks are free.
#pragma once

#include <algorithm>
#include <vector>

#include "../plan.hpp"
#include "../state.hpp"

namespace kvkeep::detail {

/// Memory of the current plan, and what reports say of block tables. A table is one distinct block table of a sequence.
template <class Space>
struct plan_memory {
  index_t n = 0;             ///< entries of the plan; 0: there is none
  std::uint64_t number = 0;  ///< plans that were chosen
  index_t* id = nullptr;
  index_t* row = nullptr;
  std::uint32_t* generation = nullptr;
  tensor_ref<index_t, 3, Space> slots{};
  tensor_ref<index_t, 2, Space> count{};
  /// Blocks in use at the last report, `[layer, id, kv_head]`.
  tensor_ref<index_t, 3, Space> held{};
  /// Tables after whole blocks left, until the report: `[layer, id, kv_head * blocks_per_table + i]`.
  tensor_ref<index_t, 3, Space> kept{};
  tensor_ref<index_t, 3, Space> gone{};    ///< [layer, id, kv_head * blocks_per_table + i]
  tensor_ref<index_t, 3, Space> n_kept{};  ///< [layer, id, kv_head], or one of table_state
  tensor_ref<index_t, 3, Space> n_gone{};  ///< [layer, id, kv_head]
  index_t n_tables = 0;
  index_t* owner = nullptr;   ///< [table] layer * n_kv_heads + head of its first appearance
  index_t* needed = nullptr;  ///< [table] entries in use, while a report is written
  index_t* freed = nullptr;   ///< [table] blocks that leave, while a report is written

  /// What has just been chosen for so many entries; only this plan can be committed.
  plan<Space> chosen(index_t entries, index_t n_layers) noexcept {
    n = entries;
    return {n, n_layers, ++number, id, row, generation, slots, count};
  }
  bool is_last(plan<Space> const& p) const noexcept {
    return p.id == id && p.number == number && p.n > 0 && p.n == n;
  }
};

/// What `plan_memory::n_kept` says where it is no count.
enum table_state : index_t {
  settled = -1,     ///< nothing to report
  prompt_open = -2  ///< the layer's prompt has not ended (a device session says so here)
};

/// Entries of a layer's block tables; without pages there are none.
template <class Space>
KVKEEP_HD index_t table_entries(kv_ref<Space> const& kv) noexcept {
  return kv.k.layout.kind == layout_kind::paged ? kv.k.layout.paged.blocks_per_table : 0;
}

/// Whether head `h` of layer `l` reads the block table that head `owner_head` of `owner` reads.
template <class Space>
KVKEEP_HD bool same_table(layer_state<Space> const& owner, index_t owner_head,
                          layer_state<Space> const& l, index_t h) noexcept {
  auto const& a = owner.kv.k.layout;
  auto const& b = l.kv.k.layout;
  return b.kind == layout_kind::paged && b.paged.table == a.paged.table &&
         (h == owner_head || a.paged.table_head_stride == 0);
}

/// Block tables and all their entries.
struct table_count {
  index_t tables = 0;
  offset_t entries = 0;
};

/// Counts the block tables of a sequence, and writes plan_memory::owner unless that is null.
template <class Space>
KVKEEP_HD table_count list_tables(layer_state<Space> const* layers, index_t n_layers,
                                  index_t* owner) noexcept {
  table_count n;
  for (index_t l = 0; l < n_layers; ++l) {
    auto const& a = layers[l].kv.k.layout;
    index_t const heads = layers[l].kv.shape.n_kv_heads;
    bool first = a.kind == layout_kind::paged;
    for (index_t j = 0; j < l && first; ++j) first = !same_table(layers[l], 0, layers[j], 0);
    index_t const own = !first ? 0 : a.paged.table_head_stride != 0 ? heads : 1;
    for (index_t h = 0; h < own; ++h) {
      if (owner != nullptr) owner[n.tables] = l * heads + h;
      ++n.tables;
      n.entries += a.paged.blocks_per_table;
    }
  }
  return n;
}

/// Writes plan_memory::owner; index: 0.
template <class Space>
struct write_owners {
  layer_state<Space> const* layers;
  index_t n_layers;
  index_t* owner;
  KVKEEP_HD void operator()(index_t) const noexcept { (void)list_tables(layers, n_layers, owner); }
};

/// @param entries  of one plan, 0: nobody makes any
/// @param whole    whole blocks leave tables
template <class Space>
void carve_plan(workspace& w, plan_memory<Space>& p, std::vector<layer_state<Space>> const& layers,
                state_shape const& shape, index_t entries, bool whole) {
  auto const n = static_cast<index_t>(layers.size());
  index_t const heads = shape.cache.n_kv_heads, slots = shape.cache.max_slots;
  p.id = w.take<index_t>(product(entries));
  p.row = w.take<index_t>(product(entries));
  p.generation = w.take<std::uint32_t>(product(entries));
  p.slots = row_major<Space>(w.take<index_t>(product(n, entries, heads, slots)), n * entries, heads,
                             slots);
  p.count = row_major<Space>(w.take<index_t>(product(n, entries, heads)), n * entries, heads);
  index_t blocks = 0;
  for (auto const& l : layers)
    if (whole) blocks = std::max(blocks, table_entries(l.kv) * heads);
  auto const lists = [&](index_t extent) {
    index_t const s = shape.n_sequences;
    return row_major<Space>(w.take<index_t>(product(n, s, extent)), n, s, extent);
  };
  p.held = lists(heads);
  p.kept = lists(blocks);
  p.gone = lists(blocks);
  p.n_kept = lists(heads);
  p.n_gone = lists(heads);
  p.n_tables = list_tables(layers.data(), n, nullptr).tables;
  p.owner = w.take<index_t>(product(p.n_tables));
  p.needed = w.take<index_t>(product(p.n_tables));
  p.freed = w.take<index_t>(product(p.n_tables));
}

/// Nothing has been said of a sequence's tables; index: KV head.
template <class Space>
struct open_tables {
  plan_memory<Space> p;
  index_t layer;
  index_t id;
  index_t state;
  KVKEEP_HD void operator()(index_t h) const noexcept {
    p.held(layer, id, h) = p.n_gone(layer, id, h) = 0;
    p.n_kept(layer, id, h) = state;
  }
};

/// Remembers the tables that remain after whole blocks leave, if any do. Of a plan of whole blocks all slots are
/// listed, so the i-th block that stays begins at entry `i * block_size`.
/// Index: (entry * n_kv_heads + head) * steps() + i: the i-th block that stays, and those that leave in front of it.
template <class Space>
struct record_blocks {
  layer_state<Space> l;
  batch_ref<Space> batch;
  keep_plan<Space> plan;
  plan_memory<Space> to;
  index_t const* refused = nullptr;  ///< [entry] 0: the plan counts; null: all do
  KVKEEP_HD index_t steps() const noexcept { return table_entries(l.kv) + 1; }
  KVKEEP_HD void operator()(index_t i) const noexcept {
    auto const& pages = l.kv.k.layout.paged;
    index_t const size = pages.block_size, heads = l.kv.shape.n_kv_heads;
    index_t const at = i % steps(), h = i / steps() % heads, e = i / steps() / heads;
    index_t const n_kept = (plan.count(e, h) + size - 1) / size;
    if (at > n_kept || (refused != nullptr && refused[e] != 0)) return;
    index_t const id = batch.id_of(e), row = batch.row_of(e);
    index_t const blocks = (l.slots.lengths(id, h) + size - 1) / size;
    index_t const first = at == 0 ? 0 : plan.slots(e, h, (at - 1) * size) / size + 1;
    index_t const end = at < n_kept ? plan.slots(e, h, at * size) / size : blocks;
    index_t* const kept = to.kept.at(l.number, id, h * pages.blocks_per_table);
    index_t* const gone = to.gone.at(l.number, id, h * pages.blocks_per_table);
    for (index_t b = first; b < end; ++b) gone[b - at] = pages.entry(row, h, b);
    if (at < n_kept) {
      kept[at] = pages.entry(row, h, end);
    } else {
      to.n_kept(l.number, id, h) = n_kept < blocks ? n_kept : index_t{settled};
      to.n_gone(l.number, id, h) = blocks - n_kept;
    }
  }
};

/// Counts what a report says of each table of a sequence; index: table.
template <class Space>
struct measure_tables {
  layer_state<Space> const* layers;
  index_t n_layers;
  plan_memory<Space> p;
  index_t id;
  KVKEEP_HD void operator()(index_t t) const noexcept {
    index_t const heads = layers[0].kv.shape.n_kv_heads;
    layer_state<Space> const& own = layers[p.owner[t] / heads];
    index_t const head = p.owner[t] % heads, size = own.kv.k.layout.paged.block_size;
    index_t needed = 0, held = 0;
    for (index_t l = 0; l < n_layers; ++l)  // everything that shares this table
      for (index_t h = 0; h < heads; ++h) {
        if (!same_table(own, head, layers[l], h)) continue;
        index_t const blocks = (layers[l].slots.lengths(id, h) + size - 1) / size;
        needed = blocks > needed ? blocks : needed;
        held = p.held(l, id, h) > held ? p.held(l, id, h) : held;
      }
    bool const whole = p.n_kept(own.number, id, head) >= 0;
    p.needed[t] = needed;
    p.freed[t] = whole ? p.n_gone(own.number, id, head) : held > needed ? held - needed : 0;
  }
};

/// Writes a report, but for lengths, as measure_tables has counted it; index: table.
template <class Space>
struct write_tables {
  layer_state<Space> const* layers;
  plan_memory<Space> p;
  index_t id, row;
  index_t* freed;  ///< or null, like the others
  index_t* freed_of;
  index_t* tables;
  index_t* sizes;
  KVKEEP_HD void operator()(index_t t) const noexcept {
    index_t const heads = layers[0].kv.shape.n_kv_heads;
    layer_state<Space> const& own = layers[p.owner[t] / heads];
    index_t const head = p.owner[t] % heads, l = own.number;
    auto const& pages = own.kv.k.layout.paged;
    index_t const needed = p.needed[t], n_gone = p.freed[t];
    bool const whole = p.n_kept(l, id, head) >= 0;
    offset_t at = 0, from = 0;
    for (index_t u = 0; u < t; ++u) {
      at += p.freed[u];
      from += layers[p.owner[u] / heads].kv.k.layout.paged.blocks_per_table;
    }
    index_t const list = head * pages.blocks_per_table;
    for (index_t i = 0; i < n_gone && freed != nullptr; ++i)
      freed[at + i] = whole ? p.gone(l, id, list + i) : pages.entry(row, head, needed + i);
    if (freed_of != nullptr) freed_of[t] = n_gone;
    if (sizes != nullptr) sizes[t] = needed;
    for (index_t i = 0; i < needed && tables != nullptr; ++i)
      tables[from + i] = whole ? p.kept(l, id, list + i) : pages.entry(row, head, i);
  }
};

/// Closes a report: slots in use, and what has been said counts no more. Index: layer * n_kv_heads + head.
template <class Space>
struct close_report {
  layer_state<Space> const* layers;
  plan_memory<Space> p;
  index_t id;
  index_t* lengths;         ///< [layer, kv_head] or null
  index_t const* fault_of;  ///< [id] or null: none has one
  index_t* fault;           ///< [1] or null
  KVKEEP_HD void operator()(index_t i) const noexcept {
    index_t const heads = layers[0].kv.shape.n_kv_heads, l = i / heads, h = i % heads;
    if (i == 0 && fault != nullptr) *fault = fault_of != nullptr ? fault_of[id] : 0;
    if (lengths != nullptr) lengths[i] = layers[l].slots.lengths(id, h);
    p.held(l, id, h) = p.n_gone(l, id, h) = 0;
    if (p.n_kept(l, id, h) != prompt_open) p.n_kept(l, id, h) = settled;
  }
};

}  // namespace kvkeep::detail
