// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Saving, loading and verifying sequences.
#pragma once

#include <algorithm>
#include <cstring>

#include "../session.hpp"
#include "pieces.hpp"

namespace kvkeep {

namespace detail {

struct saved_header {
  char magic[8];
  std::uint32_t byte_order;
  std::uint32_t version;
  std::uint64_t config;
  std::uint64_t bytes;
  index_t frozen;
  index_t confirmed;
};

}  // namespace detail

template <backend Ctx, class P, class D>
std::uint64_t session<Ctx, P, D>::config() const noexcept {
  auto const& c = shape_.cache;
  std::uint64_t h = config_key(prompt_.key(), decode_.key(), c.n_q_heads, c.n_kv_heads, c.dim_k,
                               limits_.max_draft);
  for (auto const& l : layers_) h = config_key(h, l.kv.shape.max_slots);
  return h;
}

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
  detail::saved_header h{};
  std::memcpy(h.magic, "kvkeep-s", 8);
  h.byte_order = 0x01020304;
  h.version = KVKEEP_VERSION;
  h.config = config();
  h.bytes = saved_bytes();
  h.frozen = shared_.frozen[id];
  h.confirmed = shared_.confirmed[id];
  std::memcpy(out.data(), &h, sizeof h);
  std::byte* to = out.data() + sizeof h;
  for (auto const& l : layers_)
    detail::each_piece(l, id, [&](auto* from, std::size_t bytes) {
      std::memcpy(to, from, bytes);
      to += bytes;
    });
  return status::ok;
}

template <backend Ctx, class P, class D>
status session<Ctx, P, D>::load(index_t id, std::span<std::byte const> in) noexcept {
  if (!alive(id)) return status::bad_sequence;
  detail::saved_header h{};
  if (in.size() < sizeof h) return status::bad_argument;
  std::memcpy(&h, in.data(), sizeof h);
  if (std::memcmp(h.magic, "kvkeep-s", 8) != 0 || h.byte_order != 0x01020304 ||
      h.version != KVKEEP_VERSION || h.config != config() || h.bytes != saved_bytes() ||
      in.size() < h.bytes)
    return status::bad_argument;
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
  return verify_budget(l, id, h, live);
}

template <backend Ctx, class P, class D>
status session<Ctx, P, D>::verify_budget(layer_data const& l, index_t id, index_t h,
                                         index_t live) const noexcept {
  if (!detail::cuts_while_decoding(decode_.score) || limits_.engine_commits) return status::ok;
  if (decode_.score.least_tokens() > live) return status::ok;
  bool const special = detail::decides_late(decode_.when);
  // Before its first decision a special policy still holds the whole prompt.
  if (special && l.seen[id] == live) return status::ok;
  index_t const pending = l.appended[id] - l.seen[id];
  index_t const k = l.k(id, h);
  // Confirmed drafts stay until no token is left unconfirmed.
  index_t const drafts = pending > 0 ? shape_.drafts : 0;
  index_t const most = std::max(detail::trigger(k, decode_.when.evict_after) - 1, 0) + drafts +
                       (special ? 1 : 0);
  index_t const guarded = std::min(
      live, shared_.frozen[id] + decode_.keep.sinks + decode_.keep.recent + pending);
  return live > std::max(most, guarded) ? status::over_budget : status::ok;
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
