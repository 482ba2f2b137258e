// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The same budget for every layer and head.
#pragma once

#include <string>

#include "budget.hpp"

namespace kvkeep {

struct uniform {
  index_t tokens = 1024;  ///< C, protected tokens included

  budget_traits traits() const {
    budget_traits t{"uniform"};
    t.fixed = true;
    return t;
  }
  std::uint64_t key() const { return config_key(tokens); }
  index_t capacity() const { return tokens; }
  index_t most(index_t, cache_shape const&, index_t, index_t) const { return tokens; }
  layer_range due(index_t layer, index_t) const { return {layer, layer + 1}; }
  void check(index_t, cache_shape const&, index_t protect) const {
    KVKEEP_EXPECTS(tokens > protect, "capacity", tokens,
                   "> sinks + window = " + std::to_string(protect));
  }
  template <class Ctx>
  status allocate(Ctx& ctx, budget_input<space_of<Ctx>> const& in, workspace& ws) const {
    return detail::fill_layer(ctx, in, in.layer, tokens, ws);
  }
};

/// A budget per layer, given by the caller.
struct per_layer {
  static constexpr index_t max_layers = 256;
  index_t n = 0;
  index_t tokens[max_layers] = {};  ///< [layer] C_l, protected tokens included

  budget_traits traits() const {
    budget_traits t{"per_layer"};
    t.varies_over_layers = t.fixed = true;
    return t;
  }
  std::uint64_t key() const { return config_key(n, tokens); }
  index_t capacity() const {
    offset_t sum = 0;
    for (index_t l = 0; l < given(); ++l) sum += tokens[l];
    return n > 0 ? static_cast<index_t>(sum / given()) : 0;
  }
  index_t most(index_t, cache_shape const&, index_t, index_t) const {
    index_t m = 0;
    for (index_t l = 0; l < given(); ++l) m = tokens[l] > m ? tokens[l] : m;
    return m;
  }
  index_t most_in(index_t layer, index_t, cache_shape const&, index_t, index_t) const {
    return layer < given() ? tokens[layer] : 0;
  }
  layer_range due(index_t layer, index_t) const { return {layer, layer + 1}; }
  void check(index_t n_layers, cache_shape const&, index_t protect) const {
    KVKEEP_EXPECTS(n == n_layers, "per_layer.n", n, std::to_string(n_layers) + " (layers)");
    KVKEEP_EXPECTS(n <= max_layers, "per_layer.n", n, "<= " + std::to_string(max_layers));
    for (index_t l = 0; l < n; ++l)
      KVKEEP_EXPECTS(tokens[l] >= protect && tokens[l] <= most_tokens, "per_layer.tokens",
                     tokens[l],
                     ">= sinks + window = " + std::to_string(protect) +
                         " and <= " + std::to_string(most_tokens));
  }
  template <class Ctx>
  status allocate(Ctx& ctx, budget_input<space_of<Ctx>> const& in, workspace& ws) const {
    return detail::fill_layer(ctx, in, in.layer, tokens[in.layer], ws);
  }

 private:
  /// Entries that there are: `n` is asked for before it has been checked.
  index_t given() const { return n < max_layers ? n : max_layers; }
};

}  // namespace kvkeep
