// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// What a budget is: how many tokens every layer and KV head keeps, decided at the end of the prompt.
#pragma once

#include <concepts>

#include "../op/backend.hpp"
#include "../op/common.hpp"
#include "../score/scorer.hpp"

namespace kvkeep {

struct budget_traits {
  char const* name = "";
  bool varies_over_layers = false;
  bool varies_over_heads = false;
  bool needs_scores = false;    ///< reads the prompt's scores
  bool inherits = false;        ///< decode only: keeps what the prompt's policy left
  bool fixed = false;           ///< does not depend on the prompt
  bool couples_layers = false;  ///< a layer's budget may shrink when later layers are known
  bool needs_spread = false;    ///< reads how widely attention spreads, which not all scorers say

  /// Whether `allocate` waits for the prompt's scorer.
  bool after_scores() const noexcept { return needs_scores || needs_spread; }
};

/// Layers [first, last).
struct layer_range {
  index_t first = 0;
  index_t last = 0;
  bool empty() const noexcept { return first >= last; }
};

/// One sequence at the end of its prompt. Arrays are in the backend's space.
template <class Space = host_space>
struct budget_input {
  index_t n_layers = 0;  ///< managed layers of the model
  index_t layer = 0;     ///< the layer whose prompt just ended
  index_t n_kv_heads = 0;
  index_t tokens = 0;  ///< T, slots in use at the end of the prompt
  index_t sinks = 0;   ///< protected at the front
  index_t recent = 0;  ///< protected at the end (W)
  /// [layer, 1, kv_head, slot] scores of layers 0..layer in slot order, where `needs_scores`
  tensor_ref<float const, 4, Space> scores{};
  tensor_ref<index_t, 2, Space> k{};  ///< [layer, kv_head] tokens to keep, protected ones included
  /// [layer, kv_head, 2] of layers 0..layer, as score_input::spread has it, where `needs_spread`
  tensor_ref<float const, 3, Space> spread{};

  KVKEEP_HD index_t protect() const noexcept { return sinks + recent; }
  /// Unprotected tokens, T'.
  KVKEEP_HD index_t candidates() const noexcept {
    return tokens > protect() ? tokens - protect() : 0;
  }
};

/// A budget rule. `allocate` writes `k` for layer `in.layer`; where layers are coupled also, at a
/// checkpoint, smaller `k` of earlier layers. `due(layer, n)` names the layers to be cut after `layer`.
/// `most` bounds what any head keeps, of prompts of up to `tokens` tokens and while decoding: never
/// less than the capacity, which prompts shorter than that leave.
template <class B, class Ctx>
concept budget_rule = requires(B const& b, Ctx& c, budget_input<space_of<Ctx>> const& in,
                               cache_shape const& shape, guard_ref<space_of<Ctx>> const& g,
                               index_t i, workspace& w) {
  { b.traits() } -> std::same_as<budget_traits>;
  { b.key() } -> std::same_as<std::uint64_t>;
  { b.capacity() } -> std::same_as<index_t>;            // mean tokens kept per layer and head
  { b.most(i, shape, i, i) } -> std::same_as<index_t>;  // (n_layers, shape, protect, tokens)
  { b.due(i, i) } -> std::same_as<layer_range>;
  b.check(i, shape, i);  // (n_layers, shape, protect)
  { b.allocate(c, in, w) } -> std::same_as<status>;
};

namespace detail {

/// `most` of one layer, where a budget knows that.
template <class B>
index_t most_in(B const& b, index_t layer, index_t n_layers, cache_shape const& shape,
                index_t protect, index_t tokens) {
  if constexpr (requires { b.most_in(layer, n_layers, shape, protect, tokens); })
    return b.most_in(layer, n_layers, shape, protect, tokens);
  else
    return b.most(n_layers, shape, protect, tokens);
}

template <class Space>
struct fill_budget {
  tensor_ref<index_t, 2, Space> k{};
  index_t layer;
  index_t value;
  KVKEEP_HD void operator()(index_t head) const noexcept { k(layer, head) = value; }
};

/// Every head of a layer keeps `value` tokens.
template <class Ctx>
status fill_layer(Ctx& ctx, budget_input<space_of<Ctx>> const& in, index_t layer, index_t value,
                  workspace& ws) {
  if (ws.measuring()) return status::ok;
  using fn = fill_budget<space_of<Ctx>>;
  return run_each(ctx, in.n_kv_heads, fn{in.k, layer, value}, ws);
}

}  // namespace detail
using detail::fill_layer;
}  // namespace kvkeep
