// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Saving, loading and verifying sequences.
#pragma once

#include <algorithm>
#include <cstring>

#include "../session.hpp"
#include "budget_rule.hpp"
#include "pieces.hpp"
#include "prompt_steps.hpp"

namespace kvkeep {

template <backend Ctx, class P, class D>
std::size_t session<Ctx, P, D>::saved_bytes() const noexcept {
  std::size_t n = sizeof(detail::saved_header);
  for (auto const& l : layers_)
    detail::each_piece(l, 0, [&](auto*, std::size_t bytes) { n += bytes; });
  return n;
}

template <backend Ctx, class P, class D>
status session<Ctx, P, D>::save(index_t id, std::span<std::byte> out) const noexcept {
  if (!alive(id)) return status::bad_sequence;
  if (out.size() < saved_bytes()) return status::workspace_too_small;
  // What the sequence waits for in buffers that others use in turn is not saved, nor what a report has to tell.
  detail::saved_header h;
  for (auto const& l : layers_) {
    if (detail::in_prompt(l, id)) h.in_prompt = 1;
    for (index_t head = 0; head < shape_.cache.n_kv_heads; ++head)
      if (plan_.n_kept(l.number, id, head) >= 0) return status::bad_order;
  }
  if (shared_.prompt_owner == id || (h.in_prompt != 0 && limits_.max_prompt > 0))
    return status::bad_order;
  h.config = detail::config_of(prompt_, decode_, limits_, layers_);
  h.bytes = saved_bytes();
  h.frozen = shared_.frozen[id];
  h.confirmed = shared_.confirmed[id];
  std::byte* to = out.data() + sizeof h;
  for (auto const& l : layers_)
    detail::each_piece(l, id, [&](auto* from, std::size_t bytes) {
      std::memcpy(to, from, bytes);
      to += bytes;
    });
  h.sum = detail::checksum_of(h, out.subspan(sizeof h, h.bytes - sizeof h));
  std::memcpy(out.data(), &h, sizeof h);
  return status::ok;
}

template <backend Ctx, class P, class D>
status session<Ctx, P, D>::load(index_t id, std::span<std::byte const> in) noexcept {
  if (!alive(id)) return status::bad_sequence;
  detail::saved_header h, own;
  if (in.size() < saved_bytes()) return status::bad_argument;
  own.config = detail::config_of(prompt_, decode_, limits_, layers_);
  own.bytes = saved_bytes();
  std::memcpy(&h, in.data(), sizeof h);
  if (!h.fits(own) || h.sum != detail::checksum_of(h, in.subspan(sizeof h, h.bytes - sizeof h)))
    return status::bad_argument;
  if (h.in_prompt != 0 && limits_.max_prompt > 0) return status::bad_order;
  std::byte const* from = in.data() + sizeof h;
  for (auto const& l : layers_) {
    detail::each_piece(l, id, [&](auto* to, std::size_t bytes) {
      std::memcpy(to, from, bytes);
      from += bytes;
    });
    for (index_t head = 0; head < shape_.cache.n_kv_heads; ++head)
      plan_.n_kept(l.number, id, head) = detail::settled;
  }
  shared_.frozen[id] = h.frozen;
  shared_.confirmed[id] = h.confirmed;
  if (shared_.prompt_owner == id) shared_.prompt_owner = -1;
  if (shared_.staging_id == id) shared_.staging_id = -1;
  next_generation(id);
  return status::ok;
}

// -- verify -----------------------------------------------------------------------------------------

/// Budgets, protected tokens, positions and state of one head.
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::verify_head(layer_data const& l, index_t id, index_t h,
                                       index_t* sorted) const noexcept {
  index_t const n = l.slots.lengths(id, h);
  index_t const hole = l.victim(id, h);
  index_t const tokens = l.appended[id];
  if (n < 0 || n > l.kv.shape.max_slots || hole >= n || hole < -1) return status::corrupt;
  index_t live = 0;
  for (index_t s = 0; s < n; ++s)
    if (s != hole) sorted[live++] = l.slots.positions(id, h, s);
  std::sort(sorted, sorted + live);
  for (index_t i = 0; i < live; ++i) {
    if (sorted[i] < 0 || sorted[i] >= tokens) return status::corrupt;
    if (i > 0 && sorted[i] == sorted[i - 1]) return status::duplicate_position;
  }
  index_t const frozen = std::min(shared_.frozen[id], tokens);
  for (index_t i = 0; i < frozen; ++i)
    if (i >= live || sorted[i] != i) return status::lost_token;
  if (l.prompt_done[id] == 0) return live == tokens ? status::ok : status::lost_token;
  // Newest tokens stay: those that both guards protect, and all unconfirmed ones.
  index_t const pending = tokens - l.seen[id];
  bool const cuts = decode_.score.traits().at_decode;
  index_t recent = std::min(prompt_.keep.recent, cuts ? decode_.keep.recent : prompt_.keep.recent);
  recent = std::min(tokens, std::max(recent, pending));
  for (index_t i = 0; i < recent; ++i)
    if (i >= live || sorted[live - 1 - i] != tokens - 1 - i) return status::lost_token;
  index_t const sinks = std::min(
      tokens, std::min(prompt_.keep.sinks, cuts ? decode_.keep.sinks : prompt_.keep.sinks));
  for (index_t i = 0; i < sinks; ++i)
    if (i >= live || sorted[i] != i) return status::lost_token;
  // Coupled layers wait for the last one of the prompt, and one set for all heads for all layers.
  bool const wide = decode_.width() == scope::sequence;
  if ((wide || detail::joins_layers(prompt_)) && layers_.back().prompt_done[id] == 0)
    return status::ok;
  auto const rule =
      detail::rule_of(prompt_, decode_, one_policy_, static_cast<index_t>(layers_.size()),
                      shape_.cache, shape_.drafts, limits_.engine_commits);
  index_t const decided = wide ? shared_.confirmed[id] : l.seen[id];
  bool const over = rule.exceeded(l, id, h, live, shared_.frozen[id], decided);
  return over ? status::over_budget : status::ok;
}

template <backend Ctx, class P, class D>
status session<Ctx, P, D>::verify() const noexcept {
  workspace w = scratch();
  index_t* sorted = w.take<index_t>(static_cast<std::size_t>(shape_.cache.max_slots));
  if (!w.ok()) return status::workspace_too_small;
  for (index_t id = 0; id < limits_.max_sequences; ++id) {
    if (shared_.alive[id] == 0) continue;
    for (auto const& l : layers_) {
      bool const in_staging = limits_.max_prompt > 0 && l.prompt_done[id] == 0;
      for (index_t h = 0; h < shape_.cache.n_kv_heads && !in_staging; ++h)
        KVKEEP_TRY(verify_head(l, id, h, sorted));
    }
  }
  return status::ok;
}

}  // namespace kvkeep
