// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Naive reference, part 2: prompt scores of every policy. q {Hq, n_q, D} holds the queries of the
/// last n_q of the T tokens of k {Hkv, T, D}; scores are {Hkv, candidates} in position order,
/// higher is kept.
#pragma once

#include "oracle_core.hpp"

namespace kvkeep::oracle {

/// SnapKV family. `rows` reduces the window's query rows; candidates are the T - window oldest
/// tokens.
struct window_rule {
  index_t window = 8;
  index_t kernel = 5;
  pooling pool = pooling::avg;
  reduction group = reduction::mean;
  bool gqa_before_pool = true;
  reduction rows = reduction::sum;  ///< sum or mean
};

/// Column sums over the query rows of causal probabilities a {Hq, n_q, T} -> {Hq, columns}.
inline array column_sums(array const& a, index_t columns) {
  array s({a.extent(0), columns});
  for (index_t h = 0; h < a.extent(0); ++h)
    for (index_t r = 0; r < a.extent(1); ++r)
      for (index_t j = 0; j < columns; ++j) s.at(h, j) += a.at(h, r, j);
  return s;
}

/// Pools every row of s {heads, n}.
inline array pool_rows(array s, index_t kernel, pooling kind) {
  for (index_t h = 0; h < s.extent(0); ++h) {
    auto const y = pool1d(s.row(h), kernel, kind);
    for (index_t j = 0; j < s.extent(1); ++j) s.at(h, j) = y[uz(j)];
  }
  return s;
}

/// {Hkv, max(T - window, 0)}. The normaliser includes the window columns. Fewer than `window` rows
/// are legal. O(Hq * n_q * T * D).
inline array window_scores(array const& q, array const& k, window_rule const& w,
                           attention_rule const& rule = {}) {
  index_t const n = std::max<index_t>(k.extent(1) - w.window, 0), hkv = k.extent(0);
  array s = column_sums(causal_probs(q, k, rule), n);
  if (w.rows == reduction::mean && q.extent(1) > 0)
    for (double& x : s.data) x /= q.extent(1);
  if (w.gqa_before_pool) return pool_rows(group_reduce(s, hkv, w.group), w.kernel, w.pool);
  return group_reduce(pool_rows(s, w.kernel, w.pool), hkv, w.group);
}

/// H2O over the rows given (all prompt queries): {Hkv, max(T - window, 0)}. Rows inside the window
/// count.
inline array h2o_scores(array const& q, array const& k, index_t window, reduction group,
                        attention_rule const& rule = {}) {
  index_t const n = std::max<index_t>(k.extent(1) - window, 0);
  return group_reduce(column_sums(causal_probs(q, k, rule), n), k.extent(0), group);
}

/// Observed attention: column sums of all T queries divided by the T - j rows that see column j.
/// {Hkv, T}
inline array observed_attention_scores(array const& q, array const& k,
                                       attention_rule const& rule = {}) {
  index_t const n = k.extent(1);
  array s = group_reduce(column_sums(causal_probs(q, k, rule), n), k.extent(0), reduction::mean);
  for (index_t c = 0; c < s.extent(0); ++c)
    for (index_t j = 0; j < n; ++j) s.at(c, j) /= n - j;
  return s;
}

/// TOVA: row of the last query, mean over all query heads, the same for each KV head. {Hkv, T}
inline array tova_scores(array const& q, array const& k, attention_rule const& rule = {}) {
  array const a = causal_probs(q, k, rule);
  array s({k.extent(0), k.extent(1)});
  for (index_t c = 0; c < s.extent(0); ++c)
    for (index_t j = 0; j < s.extent(1); ++j) {
      for (index_t h = 0; h < a.extent(0); ++h) s.at(c, j) += a.at(h, a.extent(1) - 1, j);
      s.at(c, j) /= a.extent(0);
    }
  return s;
}

inline double norm(std::vector<double> const& x) {
  double sum = 0;
  for (double e : x) sum += e * e;
  return std::sqrt(sum);
}

/// Minus the key norm. {Hkv, T}
inline array knorm_scores(array const& k) {
  array s({k.extent(0), k.extent(1)});
  for (index_t c = 0; c < k.extent(0); ++c)
    for (index_t j = 0; j < k.extent(1); ++j) s.at(c, j) = -norm(k.row(c, j));
  return s;
}

/// Minus the cosine between each key of head c among `live` and the mean unit key of them.
/// A key whose squares exceed fp32 has no part in that mean, and scores NaN.
inline std::vector<double> keydiff_scores(array const& k, index_t c, kept_set const& live) {
  auto const enters = [](std::vector<double> const& key) {
    return norm(key) <= std::sqrt(largest);
  };
  std::vector<double> anchor(uz(k.extent(2)));
  for (index_t j : live) {
    auto const key = k.row(c, j);
    if (!enters(key)) continue;
    double const length = std::max(norm(key), 1e-12);
    for (std::size_t d = 0; d < key.size(); ++d) anchor[d] += key[d] / length;
  }
  for (double& a : anchor) a /= static_cast<double>(live.size());
  std::vector<double> s;
  for (index_t j : live) {
    auto const key = k.row(c, j);
    double dot = 0;
    for (std::size_t d = 0; d < key.size(); ++d) dot += key[d] * anchor[d];
    double const lengths = std::max(norm(key) * norm(anchor), 1e-8);
    s.push_back(enters(key) ? -dot / lengths : std::numeric_limits<double>::quiet_NaN());
  }
  return s;
}

/// {Hkv, T}
inline array keydiff_scores(array const& k) {
  array s({k.extent(0), k.extent(1)});
  for (index_t c = 0; c < k.extent(0); ++c) {
    auto const row = keydiff_scores(k, c, iota_positions(k.extent(1)));
    for (index_t j = 0; j < k.extent(1); ++j) s.at(c, j) = row[uz(j)];
  }
  return s;
}

/// Whether LagKV compresses a prompt of T tokens at all.
inline bool lagkv_applies(index_t n_tokens, index_t sinks, index_t lag) {
  return n_tokens >= sinks + 2 * lag;
}

/// Softmax over one partition of the deviation of its rows, scaled by the range of the next
/// partition's finite values. A row whose deviation is not a number deviates least.
inline std::vector<double> lag_deviation(array const& x, index_t c, index_t first, index_t lag) {
  index_t const dim = x.extent(2);
  std::vector<double> deviation;
  for (index_t j = first; j < first + lag; ++j) {
    std::vector<double> y;
    for (index_t d = 0; d < dim; ++d) {
      double lo = infinity, hi = -infinity;
      for (index_t i = first + lag; i < first + 2 * lag; ++i) {
        double const e = x.at(c, i, d);
        if (std::abs(e) <= largest) lo = std::min(lo, e), hi = std::max(hi, e);
      }
      y.push_back(hi > lo ? (x.at(c, j, d) - lo) / (hi - lo) : 0);
    }
    double mean = 0, square = 0;
    for (double e : y) mean += e / dim;
    for (double e : y) square += (e - mean) * (e - mean);
    deviation.push_back(dim > 1 ? sanitised(std::sqrt(square / (dim - 1))) : 0);
  }
  return softmax(deviation);
}

/// LagKV {Hkv, T}: 1 for sinks, the last full partition and the tail. Not crossed: the rank inside
/// the partition divided by lag, equal scores ranked by position.
inline array lagkv_scores(array const& k, array const& v, index_t sinks, index_t lag, bool cross) {
  index_t const n = k.extent(1), parts = n > sinks ? (n - sinks) / lag : 0;
  array s({k.extent(0), n}, 1);
  for (index_t c = 0; c < k.extent(0); ++c)
    for (index_t m = 0; m + 1 < parts; ++m) {
      index_t const first = sinks + m * lag;
      auto const key = lag_deviation(k, c, first, lag), value = lag_deviation(v, c, first, lag);
      std::vector<double> mixed;
      for (std::size_t i = 0; i < key.size(); ++i) mixed.push_back((key[i] + value[i]) / 2);
      for (index_t i = 0; i < lag; ++i) {
        index_t rank = 0;
        for (index_t o = 0; o < lag; ++o)
          rank += mixed[uz(o)] < mixed[uz(i)] || (mixed[uz(o)] == mixed[uz(i)] && o < i);
        s.at(c, first + i) = cross ? mixed[uz(i)] : static_cast<double>(rank) / lag;
      }
    }
  return s;
}

/// One set per KV head: k[c] positions of 0..n-1 by scores {Hkv, n}.
inline kept_sets keep_top(array const& scores, std::vector<index_t> const& k,
                          guard const& keep = {}) {
  kept_sets sets;
  for (index_t c = 0; c < scores.extent(0); ++c)
    sets.push_back(select(scores.row(c), iota_positions(scores.extent(1)), k.at(uz(c)), keep));
  return sets;
}

inline kept_sets keep_top(array const& scores, index_t k, guard const& keep = {}) {
  return keep_top(scores, std::vector<index_t>(uz(scores.extent(0)), k), keep);
}

/// One set per KV head: the best k[c] candidates (scores {Hkv, candidates}) and every later token
/// of the n_tokens, which are the window.
inline kept_sets keep_with_window(array const& scores, std::vector<index_t> const& k,
                                  index_t n_tokens) {
  kept_sets sets = keep_top(scores, k);
  for (kept_set& s : sets)
    for (index_t p = scores.extent(1); p < n_tokens; ++p) s.push_back(p);
  return sets;
}

inline kept_sets keep_with_window(array const& scores, index_t k, index_t n_tokens) {
  return keep_with_window(scores, std::vector<index_t>(uz(scores.extent(0)), k), n_tokens);
}

}  // namespace kvkeep::oracle
