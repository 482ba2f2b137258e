// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Naive reference: CAKE's scores, preferences of layers and budgets.
#pragma once

#include "oracle.hpp"
#include "oracle_budget.hpp"

namespace kvkeep::oracle {

struct cake_rule {
  index_t window = 8;  ///< 2 or more
  index_t kernel = 5;
  double gamma = 200;
  double tau1 = 1;
  double tau2 = 1;
};

/// f(head, column, weights of the window's rows), columns older than the window. Rows before the first token are none.
template <class F>
void each_window_column(array const& q, array const& k, cake_rule const& c,
                        attention_rule const& rule, F const& f) {
  array const a = causal_probs(q, k, rule);
  for (index_t h = 0; h < a.extent(0); ++h)
    for (index_t j = 0; j < k.extent(1) - c.window; ++j) {
      std::vector<double> column;
      for (index_t r = 0; r < a.extent(1); ++r) column.push_back(a.at(h, r, j));
      f(h, j, column);
    }
}

/// Unbiased.
inline double variance(std::vector<double> const& x) {
  double mean = 0, sum = 0;
  for (double e : x) mean += e / static_cast<double>(x.size());
  for (double e : x) sum += (e - mean) * (e - mean);
  return sum / static_cast<double>(x.size() - 1);
}

/// q {Hq, W, D}, the window's queries -> {Hkv, max(T - W, 0)}
inline array cake_scores(array const& q, array const& k, cake_rule const& c,
                         attention_rule const& rule = {}) {
  array s({q.extent(0), std::max<index_t>(k.extent(1) - c.window, 0)});
  each_window_column(q, k, c, rule, [&](index_t h, index_t j, std::vector<double> const& x) {
    s.at(h, j) = std::accumulate(x.begin(), x.end(), 0.0) / c.window + c.gamma * variance(x);
  });
  return group_reduce(pool_rows(s, c.kernel, pooling::avg), k.extent(0), reduction::mean);
}

/// How much of the total a layer is to have, up to a factor.
inline double cake_preference(array const& q, array const& k, cake_rule const& c,
                              attention_rule const& rule = {}) {
  double entropy = 0, shift = 0;
  each_window_column(q, k, c, rule, [&](index_t, index_t, std::vector<double> const& x) {
    for (double p : x) entropy -= p * std::log(p + 1e-10);
    shift += variance(x);
  });
  return entropy > 0 ? std::pow(entropy, 1 / c.tau1) * std::pow(shift, 1 / c.tau2) : 0;
}

/// Canonical budgets (window excluded) of the layers seen, after every checkpoint.
inline std::vector<counts> cake_canonical(std::vector<double> const& preferences, index_t base,
                                          index_t candidates, index_t every) {
  index_t const n_layers = count(preferences);
  std::int64_t const all = static_cast<std::int64_t>(base) * n_layers;
  std::vector<counts> history;
  counts held;
  for (index_t l = 0; l < n_layers; ++l) {
    held.push_back(static_cast<index_t>(std::min<std::int64_t>(all, candidates)));
    if ((l + 1) % every != 0 && l + 1 != n_layers) continue;
    double top = 0;
    for (index_t i = 0; i <= l; ++i) top = std::max(top, preferences[uz(i)]);
    counts weights;
    for (index_t i = 0; i <= l; ++i)
      weights.push_back(
          top > 0 ? static_cast<index_t>(std::lround(preferences[uz(i)] / top * (1 << 20))) : 1);
    held = apportion(all, weights, held);
    history.push_back(held);
  }
  return history;
}

/// The repository's `adjust_budgets` on shares, which it truncates.
inline counts cake_official(std::vector<double> const& shares, index_t total_budget, index_t cap) {
  counts b;
  for (double s : shares) b.push_back(static_cast<index_t>(s));
  auto const spread = [&b](index_t amount, auto const& open, index_t sign) {
    std::vector<std::size_t> who;
    for (std::size_t i = 0; i < b.size(); ++i)
      if (open(b[i])) who.push_back(i);
    for (std::size_t i = 0; i < who.size(); ++i) {
      index_t const n = count(who);
      b[who[i]] += sign * (amount / n + (static_cast<index_t>(i) < amount % n ? 1 : 0));
    }
  };
  auto const below = [cap](index_t x) { return x < cap; };
  index_t excess = 0;
  for (index_t& x : b) {
    excess += std::max(x - cap, 0);
    x = std::min(x, cap);
  }
  spread(excess, below, 1);
  auto const missing = total_budget - static_cast<index_t>(total(b));
  if (missing > 0) spread(missing, below, 1);
  if (missing < 0)
    spread(
        -missing, [](index_t x) { return x > 1; }, -1);
  return b;
}

}  // namespace kvkeep::oracle
