// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CAKE: layers share one total in proportion to how widely their attention spreads, over slots and over time.
#pragma once

#include <cmath>
#include <string>

#include "apportion.hpp"
#include "budget.hpp"

namespace kvkeep {

/// The published integer arithmetic of antgroup/cakekv utils.py (spec 5.5), window excluded: no layer above `cap`, what
/// is too much or missing spread evenly, once.
/// @param[in,out] budget [n] in: shares, truncated; out: budgets, which may still miss the total
KVKEEP_HD inline void published_cake_budgets(offset_t* budget, index_t n, offset_t total,
                                             offset_t cap) noexcept {
  // Adds `amount` (or takes it away) evenly where `open`, the remainder from the first ones.
  auto const spread = [&](offset_t amount, offset_t sign, auto const& open) {
    offset_t count = 0, nth = 0;
    for (index_t i = 0; i < n; ++i) count += open(budget[i]) ? 1 : 0;
    for (index_t i = 0; i < n && amount > 0; ++i) {
      if (!open(budget[i])) continue;
      budget[i] += sign * (amount / count + (nth++ < amount % count ? 1 : 0));
    }
  };
  auto const below = [cap](offset_t b) { return b < cap; };
  offset_t excess = 0, sum = 0;
  for (index_t i = 0; i < n; ++i) {
    if (budget[i] <= cap) continue;
    excess += budget[i] - cap;
    budget[i] = cap;
  }
  spread(excess, 1, below);
  for (index_t i = 0; i < n; ++i) sum += budget[i];
  if (total >= sum) return spread(total - sum, 1, below);
  spread(sum - total, -1, [](offset_t b) { return b > 1; });
}

/// Spec 5.5; arXiv 2503.12491, antgroup/cakekv cake_cache.py. A layer's preference is H^(1/tau1) * V^(1/tau2), H and V
/// the entropies and variances of its attention (score_input::spread), summed over KV heads. At a checkpoint the layers
/// so far share `n_layers * (C - W)`, so that memory stays bounded while the prompt runs ("cascading").
/// Deviations (canonical): integers only, exact total, a budget never grows again; at most C tokens are left of a
/// prompt, as by all policies (spec 3), while the published code leaves prompts of up to C + W whole.
/// `published = true` does so too, and takes the reference's integer arithmetic, never above what a layer still holds.
/// State: 8 bytes per layer and KV head, and a slot row for the scores.
struct cake_layers {
  index_t tokens = 1024;  ///< C, the mean over layers, protected tokens included
  double tau1 = 1;        ///< 0.05..20
  double tau2 = 1;        ///< 0.05..20
  index_t every = 1;      ///< layers between checkpoints, of which the last layer is always one
  bool published = false;

  budget_traits traits() const {
    budget_traits t{"cake_layers"};
    t.varies_over_layers = t.needs_spread = t.couples_layers = true;
    return t;
  }
  std::uint64_t key() const { return config_key(tokens, tau1, tau2, every, published); }
  index_t capacity() const { return tokens; }
  index_t most(index_t n_layers, cache_shape const&, index_t protect, index_t prompt) const {
    if (prompt < tokens) return tokens;
    index_t const whole = longest_whole(protect);
    if (prompt <= whole) return prompt;
    index_t const cut = most_of(n_layers, tokens - protect, prompt - protect) + protect;
    return cut < whole ? whole : cut;
  }
  layer_range due(index_t layer, index_t n_layers) const {
    return {checkpoint(layer, n_layers) ? 0 : layer, layer + 1};
  }
  void check(index_t, cache_shape const&, index_t protect) const {
    KVKEEP_EXPECTS(tokens > protect, "capacity", tokens,
                   "> sinks + window = " + std::to_string(protect));
    KVKEEP_EXPECTS(tau1 >= 0.05 && tau1 <= 20, "tau1", tau1, "0.05..20");
    KVKEEP_EXPECTS(tau2 >= 0.05 && tau2 <= 20, "tau2", tau2, "0.05..20");
    KVKEEP_EXPECTS(every >= 1, "every", every, ">= 1");
  }

  template <class Ctx>
  status allocate(Ctx& ctx, budget_input<space_of<Ctx>> const& in, workspace& ws) const {
    using space = space_of<Ctx>;
    index_t const base = tokens - in.protect(), n = in.layer + 1;
    bool const whole = in.tokens <= longest_whole(in.protect());
    index_t const most = most_of(in.n_layers, base, in.candidates()) + in.protect();
    KVKEEP_TRY(detail::fill_layer(ctx, in, in.layer, whole ? in.tokens : most, ws));
    auto* const preferences = ws.take<double>(static_cast<std::size_t>(n));
    auto* const scratch = ws.take<offset_t>(product(n, 3));
    if (ws.measuring()) return status::ok;
    if (!ws.ok()) return status::workspace_too_small;
    if (whole || !checkpoint(in.layer, in.n_layers)) return status::ok;
    using split = split_layers<cake_layers, space>;
    return detail::run_each(ctx, 1, split{*this, in, preferences, scratch}, ws);
  }

 private:
  bool checkpoint(index_t layer, index_t n_layers) const {
    return (layer + 1) % every == 0 || layer + 1 == n_layers;
  }
  /// Prompts of up to so many tokens are not cut.
  index_t longest_whole(index_t protect) const { return published ? tokens + protect : tokens - 1; }
  /// What a layer has at most, protected tokens excluded: the total of all layers.
  KVKEEP_HD static index_t most_of(index_t n_layers, index_t base, index_t candidates) noexcept {
    offset_t const all = static_cast<offset_t>(base) * n_layers;
    return all < candidates ? static_cast<index_t>(all) : candidates;
  }

 public:
  // A step that a backend runs; public, because nvcc makes no kernel of a private type.
  template <class Rule, class Space>
  struct split_layers {
    static constexpr index_t finest = 1 << 20;  ///< weight of the most preferred layer

    Rule rule;
    budget_input<Space> in;
    double* preferences;  ///< [layers so far]
    offset_t* scratch;    ///< [3 * layers so far]

    KVKEEP_HD void operator()(index_t) const noexcept {
      index_t const n = in.layer + 1;
      double sum = 0, top = 0;
      offset_t held = 0;
      for (index_t i = 0; i < n; ++i) {
        double const p = preferences[i] = preference(i);
        sum += p;
        top = p > top ? p : top;
        held += room(i);
      }
      offset_t const all = static_cast<offset_t>(rule.tokens - in.protect()) * in.n_layers;
      if (rule.published) return published_split(sum, all);
      auto* const weight = reinterpret_cast<index_t*>(scratch + n);
      index_t *const cap = weight + n, *const part = cap + n;
      for (index_t i = 0; i < n; ++i) {
        weight[i] = top > 0 ? static_cast<index_t>(preferences[i] / top * finest + 0.5) : 1;
        cap[i] = room(i);
      }
      apportion(all < held ? all : held, weight, cap, n, part, scratch);
      for (index_t i = 0; i < n; ++i) set(i, part[i]);
    }

   private:
    KVKEEP_HD double preference(index_t layer) const noexcept {
      double entropy = 0, variance = 0;
      for (index_t h = 0; h < in.n_kv_heads; ++h) {
        entropy += static_cast<double>(in.spread(layer, h, 0));
        variance += static_cast<double>(in.spread(layer, h, 1));
      }
      if (!(entropy > 0) || !(variance > 0)) return 0;
      return std::pow(entropy, 1 / rule.tau1) * std::pow(variance, 1 / rule.tau2);
    }
    KVKEEP_HD index_t room(index_t layer) const noexcept { return in.k(layer, 0) - in.protect(); }
    KVKEEP_HD void published_split(double sum, offset_t all) const noexcept {
      index_t const n = in.layer + 1;
      for (index_t i = 0; i < n; ++i) {
        double const share = sum > 0 ? preferences[i] / sum : 1.0 / n;
        scratch[i] = static_cast<offset_t>(share * static_cast<double>(all));
      }
      published_cake_budgets(scratch, n, all, in.candidates());
      for (index_t i = 0; i < n; ++i) {
        offset_t const most = room(i);
        set(i, static_cast<index_t>(scratch[i] < most ? scratch[i] : most));
      }
    }
    KVKEEP_HD void set(index_t layer, index_t b) const noexcept {
      for (index_t h = 0; h < in.n_kv_heads; ++h) in.k(layer, h) = b + in.protect();
    }
  };
};

}  // namespace kvkeep
