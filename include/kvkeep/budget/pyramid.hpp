// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// PyramidKV: more tokens in lower layers, along a line.
#pragma once

#include <string>

#include "budget.hpp"

namespace kvkeep {

/// Spec 5.1; arXiv 2406.02069, KVCache-Factory PyramidKVCluster.
/// Deviations: the canonical form sums to n_layers * (C - W) exactly (floors plus largest remainders,
/// lower layer first) and serves one layer; `exact_total = false` reproduces the published integers, whose
/// sum exceeds the total by up to L (L - 1) / 2.
struct pyramid {
  index_t tokens = 1024;  ///< C, the mean over layers, protected tokens included
  index_t beta = 20;      ///< steepness: the last layer's share is (C - W) / beta
  bool exact_total = true;

  budget_traits traits() const {
    budget_traits t{"pyramid"};
    t.varies_over_layers = true;
    return t;
  }
  std::uint64_t key() const { return config_key(tokens, beta, exact_total); }
  index_t capacity() const { return tokens; }
  index_t most(index_t n_layers, cache_shape const&, index_t protect, index_t prompt) const {
    return prompt < tokens ? tokens : length(n_layers, 0, protect, prompt);
  }
  layer_range due(index_t layer, index_t) const { return {layer, layer + 1}; }
  void check(index_t n_layers, cache_shape const&, index_t protect) const {
    KVKEEP_EXPECTS(tokens > protect, "capacity", tokens,
                   "> sinks + window = " + std::to_string(protect));
    KVKEEP_EXPECTS(beta >= 1, "beta", beta, ">= 1");
    KVKEEP_EXPECTS(exact_total || n_layers >= 2, "exact_total", "false",
                   "true for a single layer (the published form divides by n_layers - 1)");
  }
  template <class Ctx>
  status allocate(Ctx& ctx, budget_input<space_of<Ctx>> const& in, workspace& ws) const {
    return detail::fill_layer(ctx, in, in.layer,
                              length(in.n_layers, in.layer, in.protect(), in.tokens), ws);
  }

  /// Tokens that layer `layer` keeps of a prompt of `prompt` tokens, protected ones included; `prompt`
  /// itself when it is shorter than the capacity.
  index_t length(index_t n_layers, index_t layer, index_t protect, index_t prompt) const {
    index_t const base = tokens - protect;
    if (prompt < tokens) return prompt;
    if (prompt < 2 * base || n_layers == 1) return tokens;
    offset_t lo = base / beta;
    offset_t hi = 2 * static_cast<offset_t>(base) - lo;
    if (hi >= prompt - protect) {
      hi = prompt - protect;
      lo = 2 * static_cast<offset_t>(base) - hi;
    }
    offset_t const steps = n_layers - 1;
    if (!exact_total) return static_cast<index_t>(hi - layer * ((hi - lo) / steps)) + protect;
    return static_cast<index_t>(exact_share(hi, lo, steps, layer, base)) + protect;
  }

 private:
  /// Floor of the line at `layer`, plus one if its remainder is among the largest.
  static offset_t exact_share(offset_t hi, offset_t lo, offset_t steps, index_t layer,
                              offset_t base) {
    auto const numerator = [&](offset_t l) { return steps * hi - l * (hi - lo); };
    offset_t missing = (steps + 1) * base;
    offset_t larger = 0;  // remainders that are served before this layer's
    offset_t const mine = numerator(layer) % steps;
    for (offset_t l = 0; l <= steps; ++l) {
      missing -= numerator(l) / steps;
      offset_t const r = numerator(l) % steps;
      if (r > mine || (r == mine && l < layer)) ++larger;
    }
    return numerator(layer) / steps + (larger < missing ? 1 : 0);
  }
};

}  // namespace kvkeep
