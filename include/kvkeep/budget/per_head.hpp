// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// A budget per layer and KV head, given by the caller, and HeadKV's from how important heads are.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <string>
#include <vector>

#include "apportion.hpp"
#include "budget.hpp"

namespace kvkeep {

/// Lengths differ among the heads of a layer: use a ragged view or block tables per KV head (a strided view
/// works too, with room for the longest head).
struct per_head {
  std::vector<index_t> tokens;  ///< [layer][kv_head] protected tokens included

  budget_traits traits() const {
    budget_traits t{"per_head"};
    t.varies_over_layers = t.varies_over_heads = t.fixed = true;
    return t;
  }
  std::uint64_t key() const {
    std::uint64_t h = config_key(tokens.size());
    for (index_t const n : tokens) h = config_key(h, n);
    return h;
  }
  index_t capacity() const {
    offset_t sum = 0;
    for (index_t const n : tokens) sum += n;
    return tokens.empty() ? 0 : static_cast<index_t>(sum / static_cast<offset_t>(tokens.size()));
  }
  index_t most(index_t, cache_shape const&, index_t, index_t) const {
    index_t m = 0;
    for (index_t const n : tokens) m = std::max(m, n);
    return m;
  }
  index_t most_in(index_t layer, index_t, cache_shape const& s, index_t, index_t) const {
    index_t m = 0;
    for (index_t h = 0; h < s.n_kv_heads; ++h) m = std::max(m, at(layer, s.n_kv_heads, h));
    return m;
  }
  layer_range due(index_t layer, index_t) const { return {layer, layer + 1}; }
  void check(index_t n_layers, cache_shape const& s, index_t protect) const {
    offset_t const all = static_cast<offset_t>(n_layers) * s.n_kv_heads;
    KVKEEP_EXPECTS(static_cast<offset_t>(tokens.size()) == all, "per_head.tokens.size",
                   tokens.size(), std::to_string(all) + " (layers * KV heads)");
    for (index_t const n : tokens)
      KVKEEP_EXPECTS(n >= protect && n <= most_tokens, "per_head.tokens", n,
                     ">= sinks + window = " + std::to_string(protect) +
                         " and <= " + std::to_string(most_tokens));
  }
  template <class Ctx>
  status allocate(Ctx& ctx, budget_input<space_of<Ctx>> const& in, workspace& ws) const {
    if (ws.measuring()) return status::ok;
    using fn = give<space_of<Ctx>>;
    for (index_t h = 0; h < in.n_kv_heads; h += 4) {
      auto const of = [&](index_t i) {
        return h + i < in.n_kv_heads ? at(in.layer, in.n_kv_heads, h + i) : 0;
      };
      fn const step{in.k, in.layer, h, of(0), of(1), of(2), of(3)};
      index_t const n = std::min(index_t{4}, in.n_kv_heads - h);
      KVKEEP_TRY(run(ctx, op::for_each<fn, space_of<Ctx>>{n, step}, ws));
    }
    return status::ok;
  }

  /// Of capacities per query head, as published tables have them: a group's mean, halves to even.
  /// @param of  [layer][query head] tokens, without the protected ones
  /// @throws std::invalid_argument for capacities that do not fill KV heads
  static per_head of_query_heads(std::span<index_t const> of, index_t group, index_t protect) {
    KVKEEP_EXPECTS(group >= 1, "group", group, ">= 1");
    auto const each = static_cast<std::size_t>(group);
    KVKEEP_EXPECTS(of.size() % each == 0, "capacities.size", of.size(),
                   "a multiple of group = " + std::to_string(group));
    per_head r;
    for (std::size_t i = 0; i < of.size(); i += each) {
      offset_t sum = 0;
      for (index_t const n : of.subspan(i, each)) sum += n;
      offset_t const floor = sum / group, twice = 2 * (sum % group);
      bool const up = twice > group || (twice == group && floor % 2 != 0);
      r.tokens.push_back(static_cast<index_t>(floor) + (up ? 1 : 0) + protect);
    }
    return r;
  }

  // The step that a backend runs; public, because nvcc makes no kernel of a private type.
  template <class Space>
  struct give {
    tensor_ref<index_t, 2, Space> k{};
    index_t layer;
    index_t first;       ///< KV head
    index_t a, b, c, d;  ///< of four heads; an array would go to local memory on a device
    KVKEEP_HD void operator()(index_t i) const noexcept {
      k(layer, first + i) = i == 0 ? a : i == 1 ? b : i == 2 ? c : d;
    }
  };

 private:
  index_t at(index_t layer, index_t n_heads, index_t head) const {
    offset_t const i = static_cast<offset_t>(layer) * n_heads + head;
    return i < static_cast<offset_t>(tokens.size()) ? tokens[static_cast<std::size_t>(i)] : 0;
  }
};

/// How important the query heads are, measured beforehand.
struct head_importance {
  std::span<double const> of;  ///< [layer][query head] finite, >= 0
  index_t group = 1;           ///< query heads per KV head
};

/// HeadKV's budgets. Spec 5.4; arXiv 2410.19258, KVCache-Factory HeadKVCluster.
/// Of the C - protect tokens of every head, one in `beta` goes to a pool that all heads of all layers share by
/// importance; the others stay with the head.
/// Deviations: a KV head has its group's mean importance; totals are exact (largest remainders; lower layer, then
/// lower head first), where the published program rounds every head.
/// @param capacity  C, the mean over layers and heads, protected tokens included
/// @param protect   sinks + window
/// @throws std::invalid_argument for importances that do not fill KV heads, or are negative or not finite
inline per_head headkv_budget(head_importance const& heads, index_t capacity, index_t protect,
                              double beta = 1.01) {
  KVKEEP_EXPECTS(heads.group >= 1, "group", heads.group, ">= 1");
  auto const group = static_cast<std::size_t>(heads.group);
  KVKEEP_EXPECTS(!heads.of.empty() && heads.of.size() % group == 0, "importance.size",
                 heads.of.size(), "a multiple of group = " + std::to_string(heads.group));
  KVKEEP_EXPECTS(
      protect >= 0 && capacity > protect && capacity <= most_tokens, "capacity", capacity,
      "> sinks + window = " + std::to_string(protect) + " and <= " + std::to_string(most_tokens));
  KVKEEP_EXPECTS(beta >= 1, "beta", beta, ">= 1");
  std::size_t const n = heads.of.size() / group;
  std::vector<double> share(n);
  double sum = 0;
  for (std::size_t i = 0; i < heads.of.size(); ++i) {
    KVKEEP_EXPECTS(std::isfinite(heads.of[i]) && heads.of[i] >= 0, "importance", heads.of[i],
                   "finite, >= 0");
    share[i / group] += heads.of[i];
    sum += heads.of[i];
  }
  // Shares by the 2^24th, so that products of `apportion` stay in 63 bits.
  auto const given = static_cast<index_t>((capacity - protect) / beta);
  offset_t const pool = static_cast<offset_t>(given) * static_cast<offset_t>(n);
  KVKEEP_EXPECTS(pool < offset_t{1} << 38 && std::isfinite(sum), "capacity", capacity,
                 "fewer than 2^38 tokens of all heads, and a finite sum of importances");
  std::vector<index_t> weight(n), most(n, most_tokens - capacity);
  for (std::size_t i = 0; i < n; ++i)
    weight[i] = sum > 0 ? static_cast<index_t>(std::nearbyint(share[i] / sum * (1 << 24))) : 0;
  std::vector<offset_t> remainder(n);
  per_head r{std::vector<index_t>(n)};
  apportion(pool, weight.data(), most.data(), static_cast<index_t>(n), r.tokens.data(),
            remainder.data());
  for (index_t& tokens : r.tokens) tokens += capacity - given;
  return r;
}

}  // namespace kvkeep
