// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The state of one sequence, array by array, for whoever copies or stores it.
#pragma once

#include <algorithm>
#include <cstring>
#include <span>

#include "../../core/config.hpp"
#include "../state.hpp"

namespace kvkeep::detail {

/// Calls f(array, n) for each array of 4-byte numbers with state of sequences in one layer; those of sequence `id`
/// are the `n` from `array + id * n` on. Positions and rows beyond the slots in use are included: a ring of weights
/// may be read there once a slot is reused.
template <class Space, class F>
void each_array(layer_state<Space> const& l, F&& f) {
  auto const numbers = [&](auto* array, offset_t n) {
    static_assert(sizeof *array == 4);
    if (array != nullptr && n > 0) f(array, n);
  };
  auto const tensor = [&](auto const& t) { numbers(t.data, t.stride[0]); };
  tensor(l.slots.lengths);
  tensor(l.slots.positions);
  tensor(l.slots.rows);
  tensor(l.k);
  tensor(l.victim);
  tensor(l.ring_q);
  tensor(l.ring_lse);
  tensor(l.weight_sum);
  tensor(l.weight_max);
  tensor(l.head);
  tensor(l.gathered);
  numbers(l.fresh.data, l.fresh.stride[1]);
  index_t* const lists[] = {l.seen, l.ring_from, l.appended, l.attended};
  for (index_t* const list : lists) numbers(list, 1);
}

/// Calls f(array) for those with a byte of each sequence, which the host alone reads.
template <class Space, class F>
void each_flag(layer_state<Space> const& l, F&& f) {
  f(l.has_lse);
  f(l.prompt_done);
}

/// Whether a prompt of a sequence has ended in some layer, or is open there. @param tokens  of its frozen prefix
template <class Layers>
bool prompt_has_come(Layers const& layers, index_t id, index_t tokens) noexcept {
  return std::any_of(layers.begin(), layers.end(), [&](auto const& l) {
    return l.prompt_done[id] == 1 || (l.prompt_done[id] == 0 && l.appended[id] > tokens);
  });
}
/// Whether a token has come to some layer of a sequence without a prompt.
template <class Layers>
bool token_has_come(Layers const& layers, index_t id) noexcept {
  return std::any_of(layers.begin(), layers.end(),
                     [&](auto const& l) { return l.prompt_done[id] == 2; });
}

/// Whether a slot of a head holds the token whose position is its own number.
template <class Space>
KVKEEP_HD bool holds_own(layer_state<Space> const& l, index_t id, index_t h,
                         index_t slot) noexcept {
  return slot < l.slots.lengths(id, h) && slot != l.victim(id, h) &&
         l.slots.positions(id, h, slot) == slot;
}
/// Whether the first `n` slots of every head hold the tokens 0 .. n - 1, so that a copy may freeze them.
template <class Space>
bool holds_prefix(layer_state<Space> const& l, index_t id, index_t n) noexcept {
  bool holds = true;
  for (index_t h = 0; h < l.kv.shape.n_kv_heads; ++h)
    for (index_t i = 0; i < n && holds; ++i) holds = holds_own(l, id, h, i);
  return holds;
}

/// Calls f(pointer, bytes) for every piece of one sequence's state in one layer.
template <class Space, class F>
void each_piece(layer_state<Space> const& l, index_t id, F&& f) {
  each_array(l, [&](auto* array, offset_t n) {
    f(array + id * n, sizeof *array * static_cast<std::size_t>(n));
  });
  each_flag(l, [&](std::uint8_t* flag) { f(flag + id, sizeof *flag); });
}

/// In front of a saved sequence. Two fit if the state behind them means the same.
struct saved_header {
  std::uint64_t magic = 0x732d7065656b766b;  ///< "kvkeep-s", and which byte comes first
  std::uint64_t version = KVKEEP_VERSION;
  std::uint64_t config = 0;
  std::uint64_t bytes = 0;
  index_t frozen = 0;
  index_t confirmed = 0;  ///< of a session: a device session counts per layer
  index_t faults = 0;     ///< of a device session
  index_t on_device = 0;
  std::uint64_t sum = 0;  ///< checksum of a session's state and of this header, with 0 here
  index_t in_prompt = 0;  ///< a prompt has begun and not ended; of a session
  index_t unused = 0;     ///< instead of padding, which nobody would set

  KVKEEP_HD bool fits(saved_header const& o) const noexcept {
    return magic == o.magic && version == o.version && config == o.config && bytes == o.bytes &&
           on_device == o.on_device;
  }
};

/// FNV-1a by words of 8 bytes: damage is found, not malice.
/// @param h  that of what comes before
inline std::uint64_t checksum(std::span<std::byte const> bytes,
                              std::uint64_t h = 14695981039346656037ULL) noexcept {
  for (std::size_t i = 0; i < bytes.size(); i += 8) {
    std::uint64_t word = 0;
    std::memcpy(&word, bytes.data() + i, bytes.size() - i < 8 ? bytes.size() - i : 8);
    h = (h ^ word) * 1099511628211ULL;
  }
  return h;
}

/// Of a saved sequence.
inline std::uint64_t checksum_of(saved_header h, std::span<std::byte const> state) noexcept {
  h.sum = 0;
  return checksum(state, checksum(std::as_bytes(std::span(&h, 1))));
}

/// Identity of what determines a session's state.
template <class P, class D, class Layers>
std::uint64_t config_of(P const& prompt, D const& decode, limits const& lim,
                        Layers const& layers) noexcept {
  cache_shape const& c = layers[0].kv.shape;
  std::uint64_t h = config_key(prompt.key(), decode.key(), c.n_q_heads, c.n_kv_heads, c.dim_k,
                               lim.max_draft, lim.engine_commits, lim.decode);
  for (auto const& l : layers) h = config_key(h, l.kv.shape.max_slots);
  return h;
}

}  // namespace kvkeep::detail
