// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// What every policy must keep of a prompt, from the oracle's scores and budgets.
#pragma once

#include <stdexcept>

#include "engine.hpp"
#include "oracle_cake.hpp"
#include "oracle_expected.hpp"

namespace kvkeep::test {

/// The first n rows of every head.
inline oracle::array first_rows(oracle::array const& x, index_t n, index_t from = 0) {
  oracle::array y({x.extent(0), n - from, x.extent(2)});
  for (index_t h = 0; h < x.extent(0); ++h)
    for (index_t i = from; i < n; ++i)
      for (index_t d = 0; d < x.extent(2); ++d) y.at(h, i - from, d) = x.at(h, i, d);
  return y;
}

/// Columns of x {heads, n} widened with zeros or cut to [first, last).
inline oracle::array columns(oracle::array const& x, index_t first, index_t last) {
  oracle::array y({x.extent(0), std::max<index_t>(last - first, 0)});
  for (index_t h = 0; h < x.extent(0); ++h)
    for (index_t j = first; j < last; ++j) y.at(h, j - first) = j < x.extent(1) ? x.at(h, j) : 0;
  return y;
}

inline oracle::reduction to_oracle(reduction r) {
  return r == reduction::sum    ? oracle::reduction::sum
         : r == reduction::mean ? oracle::reduction::mean
                                : oracle::reduction::max;
}

struct prompt_reference {
  std::string name;
  policy_options o;
  scope width = scope::head;
  oracle::guard keep;  ///< that the policy declares
  std::string budget;  ///< uniform, pyramid, dynamic, cake or ada

  prompt_reference(std::string n, policy_options const& x)
      : name(std::move(n)), o(x), width(x.per) {
    if (windowed() || name == "cake" || name == "knorm" || name == "keydiff")
      keep = {o.sinks.value_or(0), window(), 0};
    if (name == "h2o" || name == "morphkv") keep.recent = window();
    if (name == "tova") keep = {o.sinks.value_or(0), window() > 0 ? 1 : 0, 0};
    if (name == "streamingllm" || name == "expected_attention") keep.sinks = o.sinks.value_or(4);
    if (name == "tova" && width == scope::head) width = scope::layer;
    budget = name == "pyramidkv"   ? "pyramid"
             : name == "dynamickv" ? "dynamic"
             : name == "cake"      ? "cake"
             : name == "adakv"     ? "ada"
                                   : "uniform";
    if (!o.budget.empty()) budget = std::string(o.budget);
  }

  index_t window() const { return o.window.value(); }

  /// {Hkv, T}; protected columns of windowed policies are 0.
  oracle::array scores(oracle::tokens const& t, index_t n,
                       oracle::attention_rule const& rule) const {
    auto const q = first_rows(t.q, n), k = first_rows(t.k, n);
    oracle::array s;
    if (name == "h2o") s = oracle::h2o_scores(q, k, 0, to_oracle(o.group), rule);
    if (name == "observed_attention") s = oracle::observed_attention_scores(q, k, rule);
    if (name == "tova") s = oracle::tova_scores(first_rows(t.q, n, n - 1), k, rule);
    if (name == "knorm") s = oracle::knorm_scores(k);
    if (name == "keydiff") s = oracle::keydiff_scores(k);
    if (name == "lagkv")
      s = oracle::lagkv_scores(k, first_rows(t.v, n), o.sinks.value_or(4), o.lag, o.cross_scoring);
    if (name == "expected_attention")
      s = oracle::expected_scores(
          q, k, first_rows(t.v, n),
          {o.rotation.theta, o.rotation.dims, o.rotation.interleaved, o.rotated, o.ahead,
           o.sinks.value_or(4), o.covariance, o.value_norms, o.epsilon},
          rule.scale.value_or(1 / std::sqrt(double(k.extent(2)))));
    if (name == "streamingllm" || name == "fullkv") {
      s = oracle::array({k.extent(0), n});
      for (index_t h = 0; h < k.extent(0); ++h)
        for (index_t j = 0; j < n; ++j) s.at(h, j) = j;
    }
    if (name == "cake") s = oracle::cake_scores(window_of(t, n), k, cake(), rule);
    if (windowed()) {
      oracle::window_rule w;
      w.window = window();
      w.kernel = o.kernel;
      w.pool = o.pooling == op::pooling::average   ? oracle::pooling::avg
               : o.pooling == op::pooling::maximum ? oracle::pooling::max
                                                   : oracle::pooling::none;
      w.group = to_oracle(o.group);
      w.rows = to_oracle(o.rows);
      w.gqa_before_pool = o.group_before_pool;
      s = oracle::window_scores(window_of(t, n), k, w, rule);
    }
    if (s.shape.empty()) throw std::invalid_argument("oracle: no prompt scores of " + name);
    return columns(s, 0, n);
  }

  /// Tokens to keep, protected ones included: {layer}{head}. @param preferences of layers, for CAKE
  std::vector<oracle::counts> budgets(std::vector<oracle::array> const& s, index_t n,
                                      std::vector<double> const& preferences) const {
    index_t const layers = oracle::count(s), heads = s[0].extent(0), c = o.capacity;
    index_t const protect = keep.sinks + keep.recent, base = c - protect;
    std::vector<oracle::counts> out(uz(layers), oracle::counts(uz(heads), c));
    if (n < c) return std::vector<oracle::counts>(uz(layers), oracle::counts(uz(heads), n));
    if (budget == "pyramid") {
      auto const l = oracle::pyramid_lengths(layers, c, o.beta, protect, n, o.exact_total);
      for (index_t i = 0; i < layers; ++i) out[uz(i)].assign(uz(heads), l[uz(i)]);
    }
    if (budget == "dynamic") {
      index_t const open = n - protect;
      oracle::array all({layers, heads, open});
      for (index_t l = 0; l < layers; ++l)
        for (index_t h = 0; h < heads; ++h)
          for (index_t j = 0; j < open; ++j) all.at(l, h, j) = s[uz(l)].at(h, j + keep.sinks);
      auto const b =
          oracle::dynamickv_canonical(all, base, o.r_max, o.r_min, o.every.value_or(4)).back();
      for (index_t i = 0; i < layers; ++i) out[uz(i)].assign(uz(heads), b[uz(i)] + protect);
    }
    if (budget == "cake") {
      auto const b =
          oracle::cake_canonical(preferences, base, n - protect, o.every.value_or(1)).back();
      for (index_t i = 0; i < layers; ++i) out[uz(i)].assign(uz(heads), b[uz(i)] + protect);
    }
    for (index_t l = 0; l < layers && budget == "ada"; ++l) out[uz(l)] = ada(s[uz(l)], n);
    return out;
  }

  /// Of layers, for CAKE.
  std::vector<double> preferences(text const& t, index_t n,
                                  oracle::attention_rule const& rule) const {
    std::vector<double> p;
    for (std::size_t l = 0; name == "cake" && l < t.layer.size(); ++l)
      p.push_back(oracle::cake_preference(window_of(t.layer[l], n), first_rows(t.layer[l].k, n),
                                          cake(), rule));
    return p;
  }

  /// Kept positions {layer}{head}, and the scores that decided.
  std::vector<oracle::kept_sets> kept(text const& t, index_t n, oracle::attention_rule const& rule,
                                      std::vector<oracle::array>* decided = nullptr) const {
    std::vector<oracle::array> s;
    for (auto const& l : t.layer) s.push_back(scores(l, n, rule));
    for (auto& x : s)  // budgets, too, look at the scores that the heads share
      if (width == scope::layer) x = spread(oracle::layer_scores(x), x.extent(0));
    if (width == scope::sequence) {
      oracle::array all({oracle::count(s), s[0].extent(0), n});
      for (std::size_t i = 0; i < all.data.size(); ++i)
        all.data[i] = s[i / s[0].data.size()].data[i % s[0].data.size()];
      for (auto& x : s) x = spread(oracle::sequence_scores(all), x.extent(0));
    }
    auto const k = budgets(s, n, preferences(t, n, rule));
    bool const cut = cuts(n);
    std::vector<oracle::kept_sets> out;
    for (std::size_t l = 0; l < s.size(); ++l)
      out.push_back(cut ? oracle::keep_top(s[l], k[l], keep)
                        : oracle::kept_sets(uz(s[l].extent(0)), oracle::iota_positions(n)));
    if (decided) *decided = std::move(s);
    return out;
  }

 private:
  /// Whether SnapKV's scores decide.
  bool windowed() const {
    return name == "snapkv" || name == "pyramidkv" || name == "dynamickv" || name == "adakv";
  }
  oracle::array window_of(oracle::tokens const& t, index_t n) const {
    return first_rows(t.q, n, std::max<index_t>(n - window(), 0));
  }
  oracle::cake_rule cake() const { return {window(), o.kernel, o.gamma, o.tau1, o.tau2}; }
  bool cuts(index_t n) const {
    if (name == "fullkv") return false;
    return name != "lagkv" || oracle::lagkv_applies(n, o.sinks.value_or(4), o.lag);
  }
  oracle::counts ada(oracle::array const& s, index_t n) const {
    index_t const protect = keep.sinks + keep.recent, base = o.capacity - protect;
    index_t const open = n - protect;
    auto const x = columns(s, keep.sinks, n - keep.recent);
    oracle::counts b;
    if (o.form == ada_form::safeguard) {
      auto const safe = std::max<index_t>(static_cast<index_t>(o.capacity * o.alpha) - protect, 0);
      for (auto const& set : oracle::adakv_safeguard(x, base, safe))
        b.push_back(oracle::count(set));
    } else {
      auto const raw = oracle::ada_counts(x, base, o.normalize);
      b = o.form == ada_form::exact ? oracle::adakv_exact(raw, base, o.alpha, open)
                                    : oracle::adakv_official(raw, base, o.alpha);
    }
    for (index_t& e : b) e = std::min(e, open) + protect;
    return b;
  }
  static oracle::array spread(std::vector<double> const& row, index_t heads) {
    oracle::array x({heads, oracle::count(row)});
    for (index_t h = 0; h < heads; ++h)
      for (std::size_t j = 0; j < row.size(); ++j) x.at(h, j) = row[j];
    return x;
  }
};

/// Sets are equal, or differ by tokens whose scores {Hkv, T} are within 1e-5 of each other.
inline bool same_sets(oracle::kept_sets const& got, oracle::kept_sets const& want,
                      oracle::array const& scores, index_t& near_ties) {
  if (got == want) return true;
  for (std::size_t h = 0; h < got.size(); ++h) {
    if (got[h].size() != want[h].size()) return false;
    double low = oracle::infinity, high = -oracle::infinity;
    for (index_t p = 0; p < scores.extent(1); ++p) {
      bool const a = std::binary_search(got[h].begin(), got[h].end(), p);
      bool const b = std::binary_search(want[h].begin(), want[h].end(), p);
      if (a == b) continue;
      low = std::min(low, scores.at(h, p));
      high = std::max(high, scores.at(h, p));
    }
    if (got[h] != want[h] && !(high - low <= 1e-5 * std::max(std::abs(high), 1e-9))) return false;
  }
  ++near_ties;
  return true;
}

}  // namespace kvkeep::test
