// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// verify, fork, save and load.
#pragma once

#include <algorithm>
#include <cstring>

#include "../session.hpp"

namespace kvkeep {

namespace detail {

/// Calls f(pointer, bytes) for every piece of one sequence's state in one layer. Positions and rows beyond
/// the slots in use are included: a ring of weights may be read there once a slot is reused.
template <class Space, class F>
void each_piece(layer_state<Space> const& l, index_t id, F&& f) {
  auto const tensor = [&](auto const& t, index_t row) {
    std::size_t bytes = sizeof(*t.data);
    for (int a = 1; a < static_cast<int>(std::extent_v<decltype(t.extent)>); ++a)
      bytes *= static_cast<std::size_t>(t.extent[a]);
    if (bytes > 0 && t.data != nullptr) f(t.data + row * t.stride[0], bytes);
  };
  tensor(l.slots.lengths, id);
  tensor(l.slots.positions, id);
  tensor(l.slots.rows, id);
  tensor(l.k, id);
  tensor(l.victim, id);
  tensor(l.ring_q, id);
  tensor(l.ring_lse, id);
  tensor(l.weight_sum, id);
  for (index_t draft = 0; draft < l.fresh.extent[0]; ++draft)
    f(l.fresh.at(draft, id), sizeof(index_t) * static_cast<std::size_t>(l.fresh.extent[2]));
  for (index_t* p : {l.seen, l.ring_from, l.appended, l.attended}) f(p + id, sizeof(index_t));
  f(l.has_lse + id, sizeof(std::uint8_t));
  f(l.prompt_done + id, sizeof(std::uint8_t));
}

/// each_piece of two sequences side by side: f(piece of `to`, piece of `from`, bytes).
template <class Space, class F>
void each_piece_pair(layer_state<Space> const& l, index_t from, index_t to, F&& f) {
  constexpr int most = 64;
  void* src[most];
  int n = 0, i = 0;
  each_piece(l, from, [&](auto* p, std::size_t) {
    if (n < most) src[n++] = p;
  });
  each_piece(l, to, [&](auto* p, std::size_t bytes) {
    if (i < n) f(static_cast<void*>(p), src[i++], bytes);
  });
}

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
      plan_.n_kept(l.number, id, head) = -1;
  }
  shared_.frozen[id] = h.frozen;
  shared_.confirmed[id] = h.confirmed;
  ++shared_.generation[id];
  return status::ok;
}

template <backend Ctx, class P, class D>
status session<Ctx, P, D>::fork(index_t from, index_t& id, sequence_options const& o) noexcept {
  if (!alive(from)) return status::bad_sequence;
  if (o.frozen < 0) return status::bad_argument;
  for (auto const& l : layers_)
    if (l.appended[from] != l.attended[from] && limits_.decode != decode_offer::nothing)
      return status::bad_order;
  index_t to = -1;
  KVKEEP_TRY(begin(to, {o.id, 0}));
  for (auto const& l : layers_) {
    // Both sequences walk the same list of pieces; the pieces of one layer have equal sizes.
    detail::each_piece_pair(l, from, to, [](auto* dst, auto* src, std::size_t bytes) {
      std::memcpy(dst, src, bytes);
    });
    for (index_t h = 0; h < shape_.cache.n_kv_heads; ++h)
      plan_.held(l.number, to, h) = plan_.held(l.number, from, h);
  }
  shared_.frozen[to] = std::max(o.frozen, shared_.frozen[from]);
  shared_.confirmed[to] = shared_.confirmed[from];
  id = to;
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
  index_t const pending = tokens - shared_.confirmed[id];
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
  bool const whole = decode_.score.least_tokens() == std::numeric_limits<index_t>::max();
  if (!decode_.score.traits().at_decode || whole || limits_.engine_commits) return status::ok;
  if (decode_.score.least_tokens() > live) return status::ok;
  bool const special = decode_.when.before_attention || decode_.when.per_head_mask;
  // Before its first decision a special policy still holds the whole prompt.
  if (special && l.attended[id] == shared_.confirmed[id] && l.seen[id] == live) return status::ok;
  index_t const pending = l.appended[id] - shared_.confirmed[id];
  index_t const k = l.k(id, h);
  index_t const most = std::max(detail::trigger(k, decode_.when.evict_after) - 1, 0) + pending +
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
