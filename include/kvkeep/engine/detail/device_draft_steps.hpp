// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Per-index steps of a device session with drafts: how many of them stay is known in the backend alone.
#pragma once

#include "device_plan_steps.hpp"

namespace kvkeep::detail {

/// The newest token has had its evidence; index: entry * n_kv_heads + head.
template <class Space>
struct mark_attended {
  layer_state<Space> l;
  batch_ref<Space> batch;
  KVKEEP_HD void operator()(index_t i) const noexcept {
    index_t const heads = l.kv.shape.n_kv_heads, id = batch.id_of(i / heads);
    if (i % heads == 0) l.attended[id] = l.appended[id];
  }
};

/// What is confirmed of each entry's drafts.
struct draft_counts {
  index_t* pending;  ///< [entry, layer] unconfirmed tokens
  index_t* taken;    ///< [entry] those that stay
  index_t* first;    ///< [entry] position of the first of them
};

/// Whether so many tokens can be confirmed. Index: that of every_layer.
template <class Space>
struct count_drafts {
  every_layer<Space> at;
  tensor_ref<index_t, 3, Space> n_kept;  ///< of table_fault
  index_t const* accepted;               ///< [entry]
  draft_counts to;
  index_t* found;  ///< [entry, layer, kv_head]
  KVKEEP_HD void operator()(index_t i) const noexcept {
    layer_state<Space> const& l = at.layer(i);
    index_t const e = at.entry(i), h = at.head(i), id = at.batch.id_of(e);
    index_t const pending = l.appended[id] - l.seen[id], n = accepted[e];
    if (h == 0) to.pending[i / at.n_kv_heads] = pending;
    bool const fine = l.attended[id] == l.appended[id] && n >= 0 && n <= pending;
    found[i] =
        fine ? table_fault(n_kept, l.number, id, h) : static_cast<index_t>(device_fault::bad_order);
  }
};

/// Drops the drafts that are not accepted, newest first. Index: that of every_layer.
template <class Space>
struct drop_drafts {
  every_layer<Space> at;
  index_t const* accepted;  ///< [entry]
  draft_counts to;
  index_t const* found;       ///< of count_drafts
  index_t* faults;            ///< [id]
  std::uint32_t* generation;  ///< [id]
  KVKEEP_HD void operator()(index_t i) const noexcept {
    layer_state<Space> const& l = at.layer(i);
    index_t const e = at.entry(i), h = at.head(i), id = at.batch.id_of(e);
    index_t const fault = at.joined(found, e), n = fault == 0 ? accepted[e] : 0;
    if (i % at.each_entry() == 0) {
      faults[id] |= fault;
      to.taken[e] = n;
      to.first[e] = l.seen[id];
      if (fault == 0) ++generation[id];
    }
    if (fault != 0) return;
    for (index_t t = to.pending[i / at.n_kv_heads]; t-- > n;) drop_token<Space>{l, id, t}(h);
    if (h == 0) l.attended[id] = l.appended[id] = l.seen[id] + n;
  }
};

/// What the ops read that fold the evidence of drafts, one draft after another.
template <class Space>
struct draft_folds {
  /// [draft, layer, id, kv_head]: 0, which ops leave alone, for sequences without this draft
  tensor_ref<index_t, 4, Space> lengths;
  index_t* newest;  ///< [draft, entry] ring row
  index_t* seen;    ///< [draft, id] confirmed tokens, this one among them
};

/// Confirms what stays, and writes what its folds read.
/// Index: (entry * drafts + draft) * each_entry() + layer * n_kv_heads + head.
template <class Space>
struct open_drafts {
  every_layer<Space> at;
  draft_counts of;
  index_t drafts;
  index_t ring;  ///< rows of the ring of weights, at least 1
  draft_folds<Space> to;
  KVKEEP_HD void operator()(index_t i) const noexcept {
    index_t const each = at.each_entry(), e = i / each / drafts, t = i / each % drafts;
    index_t const h = at.head(i), id = at.batch.id_of(e);
    layer_state<Space> const& l = at.layer(i);
    index_t const n = of.taken[e], first = of.first[e];
    to.lengths(t, l.number, id, h) = t < n ? l.slots.lengths(id, h) : 0;
    if (t == 0 && h == 0) l.seen[id] = first + n;
    if (i % each > 0) return;
    to.newest[t * at.batch.n + e] = (first + t) % ring;
    to.seen[t * to.lengths.extent[2] + id] = first + t + 1;
  }
};

}  // namespace kvkeep::detail
