// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// A session while decoding: slots for new tokens, drafts, confirmation.
#pragma once

#include <algorithm>

#include "../session.hpp"

namespace kvkeep {

// -- slots ------------------------------------------------------------------------------------------

template <backend Ctx, class P, class D>
status session<Ctx, P, D>::check_append(layer_data const& l, batch const& b) const noexcept {
  for (std::size_t i = 0; i < b.ids.size(); ++i) {
    index_t const id = b.ids[i];
    index_t const row = b.rows.empty() ? id : b.rows[i];
    index_t const pending = l.appended[id] - shared_.confirmed[id];
    if (l.prompt_done[id] == 0 && l.appended[id] > shared_.confirmed[id]) return status::bad_order;
    // A prompt ends in all layers before a token comes. Layers of other threads are not looked at.
    if (l.prompt_done[id] == 1 && layers_.back().prompt_done[id] == 0) return status::bad_order;
    if (l.prompt_done[id] == 0 && !limits_.concurrent_layers &&
        detail::prompt_has_come(layers_, id, shared_.confirmed[id]))
      return status::bad_order;
    if (l.attended[id] != l.appended[id] && limits_.decode != decode_offer::nothing)
      return status::bad_order;
    if (pending >= shape_.drafts) return status::capacity_exceeded;
    KVKEEP_TRY(check_blocks(l, row, id, 1));
  }
  return status::ok;
}

template <backend Ctx, class P, class D>
status session<Ctx, P, D>::take_slots(layer_data& l, batch const& b, index_t* slots,
                                      workspace& w) noexcept {
  auto const n = static_cast<index_t>(b.ids.size());
  workspace::frame const frame(w);
  index_t* ids = w.take<index_t>(b.ids.size());
  index_t* position = w.take<index_t>(b.ids.size());
  index_t* pending = w.take<index_t>(b.ids.size());
  if (!w.ok()) return status::workspace_too_small;
  for (index_t i = 0; i < n; ++i) {
    index_t const id = b.ids[static_cast<std::size_t>(i)];
    ids[i] = id;
    position[i] = l.appended[id];
    pending[i] = l.appended[id] - shared_.confirmed[id];
  }
  index_t const heads = shape_.cache.n_kv_heads;
  KVKEEP_TRY(each(n * heads,
                  detail::append_token<space>{l, shape_.rows, ids, position, pending, heads, slots},
                  w));
  for (index_t i = 0; i < n; ++i) {
    ++l.appended[ids[i]];
    if (l.prompt_done[ids[i]] == 0) l.prompt_done[ids[i]] = 2;  // its time is over
    next_generation(ids[i]);
  }
  l.count.tokens += n;
  return status::ok;
}

template <backend Ctx, class P, class D>
status session<Ctx, P, D>::append(index_t layer, batch const& b, index_t* slots) noexcept {
  index_t const m = managed(layer);
  if (m == -1) return status::ok;
  if (m < 0) return status::bad_argument;
  KVKEEP_TRY(check_batch(b));
  layer_data& l = layers_[static_cast<std::size_t>(m)];
  KVKEEP_TRY(check_append(l, b));
  workspace w = scratch(m);
  return take_slots(l, b, slots, w);
}

/// Whether a token's rows can be written in this layer.
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::check_rows(index_t layer, batch const& b,
                                      token_kv const& kv) const noexcept {
  index_t const m = managed(layer);
  if (m == -1) return status::unsupported;  // nobody would write them
  if (m < 0 || kv.k.data == nullptr || kv.v.data == nullptr) return status::bad_argument;
  layer_data const& l = layers_[static_cast<std::size_t>(m)];
  if (!detail::same_kind(l.kv.k, kv.k) || !detail::same_kind(l.kv.v, kv.v))
    return status::unsupported;
  KVKEEP_TRY(check_batch(b));
  return check_append(l, b);
}

template <backend Ctx, class P, class D>
status session<Ctx, P, D>::append(index_t layer, batch const& b, token_kv const& kv,
                                  index_t* slots) noexcept {
  KVKEEP_TRY(check_rows(layer, b, kv));
  return store_rows(managed(layer), b, kv, slots);
}

/// Slots for the newest tokens of managed layer `m`, and their rows there; checked before.
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::store_rows(index_t m, batch const& b, token_kv const& kv,
                                      index_t* slots) noexcept {
  layer_data& l = layers_[static_cast<std::size_t>(m)];
  index_t const heads = shape_.cache.n_kv_heads;
  workspace w = scratch(m);
  entries const e = list(b, w);
  index_t* const own = w.take<index_t>(product(e.n, heads));
  if (!w.ok()) return status::workspace_too_small;
  if (slots == nullptr) slots = own;
  KVKEEP_TRY(take_slots(l, b, slots, w));
  return each(e.n * heads, detail::write_token_rows{l.kv, {e.n, e.rows, e.ids}, kv, slots}, w);
}

template <backend Ctx, class P, class D>
status session<Ctx, P, D>::decode(index_t layer, batch const& b, token_io const& t) noexcept {
  if (limits_.decode != decode_offer::attend) return status::unsupported;
  KVKEEP_TRY(check_rows(layer, b, t.kv));
  KVKEEP_TRY(detail::check_token_query(t.q));
  if (t.out == nullptr) return status::bad_argument;
  KVKEEP_TRY(store_rows(managed(layer), b, t.kv, nullptr));
  return attend(layer, b, t.q, t.out, t.lse);
}

template <backend Ctx, class P, class D>
status session<Ctx, P, D>::append_at(batch const& b, std::int64_t const* slot_mapping) noexcept {
  KVKEEP_TRY(check_batch(b));
  for (auto const& l : layers_) {
    KVKEEP_TRY(check_append(l, b));
    for (std::size_t i = 0; i < b.ids.size(); ++i) {
      index_t const id = b.ids[i], row = b.rows.empty() ? id : b.rows[i];
      for (index_t h = 0; h < shape_.cache.n_kv_heads; ++h) {
        if (l.victim(id, h) >= 0) return status::bad_order;  // the tail is not the next slot
        auto const& layout = l.kv.k.layout;
        if (slot_mapping == nullptr || layout.kind != layout_kind::paged) continue;
        index_t const slot = l.slots.lengths(id, h), block = layout.paged.block_size;
        std::int64_t const at =
            static_cast<std::int64_t>(layout.paged.entry(row, h, slot / block)) * block +
            slot % block;
        if (at != slot_mapping[i]) return status::bad_argument;
      }
    }
  }
  for (auto& l : layers_) {
    workspace w = scratch(l.number);
    KVKEEP_TRY(take_slots(l, b, nullptr, w));
  }
  return status::ok;
}

// -- drafts -----------------------------------------------------------------------------------------

/// Unconfirmed tokens of a sequence; none while its prompt is open, or while layers have different tokens.
template <backend Ctx, class P, class D>
index_t session<Ctx, P, D>::pending(index_t id) const noexcept {
  index_t const tokens = layers_[0].appended[id];
  for (auto const& l : layers_)
    if (l.prompt_done[id] == 0 || l.appended[id] != tokens) return 0;
  return tokens - shared_.confirmed[id];
}

template <backend Ctx, class P, class D>
status session<Ctx, P, D>::confirm(batch const& b, index_t n) noexcept {
  KVKEEP_TRY(check_batch(b));
  if (n < 1) return status::bad_argument;
  for (auto const& l : layers_)
    for (index_t const id : b.ids) {
      index_t const have =
          limits_.decode == decode_offer::nothing ? l.appended[id] : l.attended[id];
      if (have != l.appended[id] || pending(id) < n) return status::bad_order;
    }
  workspace w = scratch();
  entries const e = list(b, w);
  if (!w.ok()) return status::workspace_too_small;
  if (limits_.max_draft > 0 || limits_.decode == decode_offer::nothing)
    for (auto& l : layers_)
      for (index_t t = 0; t < n; ++t) KVKEEP_TRY(fold(l, e.ids, e.rows, e.n, t, w));
  for (index_t const id : b.ids) shared_.confirmed[id] += n;
  return settle_tokens(e, n, w);
}

template <backend Ctx, class P, class D>
status session<Ctx, P, D>::confirm(batch const& b, std::span<index_t const> accepted) noexcept {
  KVKEEP_TRY(check_batch(b));
  if (limits_.max_draft == 0) return status::unsupported;
  if (accepted.size() != b.ids.size()) return status::bad_argument;
  for (std::size_t i = 0; i < b.ids.size(); ++i) {
    index_t const id = b.ids[i], drafts = pending(id);
    if (accepted[i] < 0) return status::bad_argument;
    if (accepted[i] > drafts) return status::bad_order;
    for (auto const& l : layers_) {
      index_t const have =
          limits_.decode == decode_offer::nothing ? l.appended[id] : l.attended[id];
      if (have != l.appended[id] || l.appended[id] - shared_.confirmed[id] != drafts)
        return status::bad_order;
    }
  }
  workspace w = scratch();
  entries const e = list(b, w);
  {
    workspace::frame const frame(w);
    index_t* const ids = w.take<index_t>(b.ids.size());
    index_t* const rows = w.take<index_t>(b.ids.size());
    if (!w.ok()) return status::workspace_too_small;
    for (std::size_t i = 0; i < b.ids.size(); ++i)
      KVKEEP_TRY(drop(b.ids[i], pending(b.ids[i]) - accepted[i], w));
    for (index_t t = 0; t < limits_.max_draft; ++t) {
      index_t n = 0;  // those with one more
      for (std::size_t i = 0; i < b.ids.size(); ++i)
        if (accepted[i] > t) ids[n] = b.ids[i], rows[n++] = e.rows[i];
      for (auto& l : layers_)
        if (n > 0) KVKEEP_TRY(fold(l, ids, rows, n, t, w));
    }
  }
  for (std::size_t i = 0; i < b.ids.size(); ++i) shared_.confirmed[b.ids[i]] += accepted[i];
  return settle_tokens(e, 0, w);
}

template <backend Ctx, class P, class D>
status session<Ctx, P, D>::rollback(batch const& b, index_t n) noexcept {
  KVKEEP_TRY(check_batch(b));
  if (limits_.max_draft == 0) return status::unsupported;
  if (n < 1) return status::bad_argument;
  for (index_t const id : b.ids)
    if (pending(id) < n) return status::bad_order;
  workspace w = scratch();
  entries const e = list(b, w);
  if (!w.ok()) return status::workspace_too_small;
  for (index_t const id : b.ids) KVKEEP_TRY(drop(id, n, w));
  return settle_tokens(e, 0, w);
}

/// The `n` newest unconfirmed tokens of a sequence leave.
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::drop(index_t id, index_t n, workspace& w) noexcept {
  for (auto& l : layers_)
    for (index_t t = 0; t < n; ++t) {
      index_t const left = --l.appended[id] - shared_.confirmed[id];
      KVKEEP_TRY(each(shape_.cache.n_kv_heads, detail::drop_token<space>{l, id, left}, w));
      l.attended[id] = std::min(l.attended[id], l.appended[id]);
    }
  return status::ok;
}

/// After confirm or rollback: moves leftover drafts to the front of their list, and decides for the
/// sequences without unconfirmed tokens.
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::settle_tokens(entries const& e, index_t confirmed,
                                         workspace& w) noexcept {
  index_t* free_ids = w.take<index_t>(static_cast<std::size_t>(e.n));
  index_t* free_rows = w.take<index_t>(static_cast<std::size_t>(e.n));
  if (!w.ok()) return status::workspace_too_small;
  index_t count = 0;
  for (index_t i = 0; i < e.n; ++i) {
    index_t const id = e.ids[i], pending = layers_[0].appended[id] - shared_.confirmed[id];
    if (pending == 0) {
      free_ids[count] = id;
      free_rows[count++] = e.rows[i];
    } else if (confirmed > 0) {
      for (auto& l : layers_)
        KVKEEP_TRY(each(shape_.cache.n_kv_heads,
                        detail::shift_drafts<space>{l.fresh, id, confirmed, pending}, w));
    }
  }
  if (count == 0 || limits_.engine_commits) return status::ok;
  if (decode_.width() == scope::sequence) return decide_sequences(free_ids, free_rows, count, w);
  if (limits_.max_draft == 0 && limits_.decode != decode_offer::nothing) return status::ok;
  for (auto& l : layers_) KVKEEP_TRY(decide(l, free_ids, free_rows, count, 0, w));
  return status::ok;
}

/// Confirms one token in one layer: `draft` is its index among the unconfirmed ones.
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::fold(layer_data& l, index_t const* ids, index_t const* rows, index_t n,
                                index_t draft, workspace& w) noexcept {
  workspace::frame const frame(w);
  index_t* newest = w.take<index_t>(static_cast<std::size_t>(n));
  if (!w.measuring()) {
    if (!w.ok()) return status::workspace_too_small;
    index_t const ring = std::max(1, shape_.rows.weight_ring);
    for (index_t i = 0; i < n; ++i) newest[i] = l.seen[ids[i]]++ % ring;
  }
  if (!decode_.score.traits().at_decode || attention_folds_) return status::ok;
  auto in = input(l, pool(l, ids, rows, n), false, newest);
  if (w.measuring()) in.newest_row = &n;  // any pointer: the decode form is measured
  if (in.fresh.data != nullptr) in.fresh.data += draft * l.fresh.stride[0];
  return decode_.score.fold(*ctx_, in, w);
}

}  // namespace kvkeep

#include "decode_evidence.hpp"
