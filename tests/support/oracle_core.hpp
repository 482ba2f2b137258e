// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Naive reference, part 1: dense array, logit and softmax rules, attention, selection, pooling.
/// Plain loops in double precision that share no code with the library.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <initializer_list>
#include <limits>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include <kvkeep/core/types.hpp>

namespace kvkeep::oracle {

inline constexpr double infinity = std::numeric_limits<double>::infinity();
inline constexpr double largest = static_cast<double>(std::numeric_limits<float>::max());

inline std::size_t uz(index_t i) { return static_cast<std::size_t>(i); }
template <class C>
index_t count(C const& c) {
  return static_cast<index_t>(c.size());
}

/// Dense C-order array with bounds-checked access.
struct array {
  std::vector<index_t> shape;
  std::vector<double> data;

  array() = default;
  explicit array(std::vector<index_t> s, double fill = 0) : shape(std::move(s)) {
    data.assign(volume(), fill);
  }
  template <class T>
  array(std::vector<index_t> s, std::vector<T> const& values)
      : shape(std::move(s)), data(values.begin(), values.end()) {
    if (data.size() != volume())
      throw std::invalid_argument("oracle::array: size and shape differ");
  }

  bool empty() const { return data.empty(); }
  index_t extent(std::size_t axis) const { return shape.at(axis); }
  template <class... I>
  double& at(I... i) {
    return data[offset({static_cast<index_t>(i)...})];
  }
  template <class... I>
  double at(I... i) const {
    return data[offset({static_cast<index_t>(i)...})];
  }
  /// Row `i...` over the last axis.
  template <class... I>
  std::vector<double> row(I... i) const {
    std::vector<double> r(uz(shape.back()));
    for (index_t d = 0; d < shape.back(); ++d) r[uz(d)] = at(i..., d);
    return r;
  }
  /// Element `i` along the first axis, with that axis removed.
  array slice(index_t i) const {
    array s(std::vector<index_t>(shape.begin() + 1, shape.end()));
    if (i < 0 || i >= shape[0]) throw std::out_of_range("oracle::array::slice");
    for (std::size_t j = 0; j < s.data.size(); ++j) s.data[j] = data[uz(i) * s.data.size() + j];
    return s;
  }

 private:
  std::size_t volume() const {
    std::size_t n = 1;
    for (index_t e : shape) n *= uz(e);
    return n;
  }
  std::size_t offset(std::initializer_list<index_t> at_index) const {
    if (at_index.size() != shape.size()) throw std::out_of_range("oracle::array: rank");
    std::size_t o = 0, axis = 0;
    for (index_t i : at_index) {
      if (i < 0 || i >= shape[axis]) throw std::out_of_range("oracle::array: index");
      o = o * uz(shape[axis++]) + uz(i);
    }
    return o;
  }
};

using kept_set = std::vector<index_t>;    ///< positions, ascending
using kept_sets = std::vector<kept_set>;  ///< one set per KV head

inline kept_set iota_positions(index_t n, index_t first = 0) {
  kept_set p(uz(std::max<index_t>(n, 0)));
  std::iota(p.begin(), p.end(), first);
  return p;
}

enum class pooling { none, avg, max };
enum class reduction { mean, max, sum };

/// How logits are made. No scale means 1 / sqrt(D); `sinks` holds one sink logit per query head or
/// nothing.
struct attention_rule {
  std::optional<double> scale;
  double softcap = 0;
  std::vector<double> sinks;

  double sink(index_t head) const { return sinks.empty() ? -infinity : sinks.at(uz(head)); }
};

/// NaN counts as the lowest finite float; everything else is clamped to the range of float.
inline double sanitised(double z) {
  if (std::isnan(z)) return -largest;
  return std::min(std::max(z, -largest), largest);
}

/// Logit of row i of query head h against row j of KV head c. q {Hq, rows, D}, k {Hkv, rows, D}.
inline double logit(array const& q, index_t h, index_t i, array const& k, index_t c, index_t j,
                    attention_rule const& rule) {
  index_t const dim = k.extent(2);
  double dot = 0;
  for (index_t d = 0; d < dim; ++d) dot += q.at(h, i, d) * k.at(c, j, d);
  double z = dot * rule.scale.value_or(1 / std::sqrt(static_cast<double>(dim)));
  if (rule.softcap > 0) z = rule.softcap * std::tanh(z / rule.softcap);
  return sanitised(z);
}

/// Softmax of the visible logits. The sink takes part in the maximum and in the normaliser only; a
/// sink of -inf means none. `lse`, where given, gets the log of the normaliser (sink included).
inline std::vector<double> softmax(std::vector<double> const& z, double sink = -infinity,
                                   double* lse = nullptr) {
  bool const has_sink = sink != -infinity;
  double m = has_sink ? sanitised(sink) : -infinity;
  for (double x : z) m = std::max(m, x);
  double sum = has_sink ? std::exp(sanitised(sink) - m) : 0;
  std::vector<double> p;
  for (double x : z) p.push_back(std::exp(x - m));
  for (double x : p) sum += x;
  for (double& x : p) x /= sum;
  if (lse) *lse = z.empty() && !has_sink ? -infinity : m + std::log(sum);
  return p;
}

/// Probabilities of query row i of head h over the rows `columns` of its KV head. O(columns * D).
inline std::vector<double> row_probs(array const& q, index_t h, index_t i, array const& k,
                                     kept_set const& columns, attention_rule const& rule,
                                     bool use_sink = true, double* lse = nullptr) {
  index_t const c = h / (q.extent(0) / k.extent(0));
  std::vector<double> z;
  for (index_t j : columns) z.push_back(logit(q, h, i, k, c, j, rule));
  return softmax(z, use_sink ? rule.sink(h) : -infinity, lse);
}

/// Causal probabilities {Hq, n_q, n}: query row r stands at q_positions[r], key row j at
/// k_positions[j] and is visible iff k_positions[j] <= q_positions[r].
inline array causal_probs(array const& q, kept_set const& q_positions, array const& k,
                          kept_set const& k_positions, attention_rule const& rule = {}) {
  array a({q.extent(0), q.extent(1), k.extent(1)});
  for (index_t h = 0; h < q.extent(0); ++h)
    for (index_t r = 0; r < q.extent(1); ++r) {
      kept_set columns;
      for (index_t j = 0; j < k.extent(1); ++j)
        if (k_positions.at(uz(j)) <= q_positions.at(uz(r))) columns.push_back(j);
      auto const p = row_probs(q, h, r, k, columns, rule);
      for (std::size_t j = 0; j < p.size(); ++j) a.at(h, r, columns[j]) = p[j];
    }
  return a;
}

/// The same for keys of positions 0..T-1 and queries of the last n_q of them.
inline array causal_probs(array const& q, array const& k, attention_rule const& rule = {}) {
  index_t const n_q = q.extent(1), n = k.extent(1);
  return causal_probs(q, iota_positions(n_q, n - n_q), k, iota_positions(n), rule);
}

struct attend_result {
  array out;                ///< {Hq, Dv}
  std::vector<double> lse;  ///< {Hq}, natural log, sink included
};

/// Attention of query row i of every head over the rows live[c] of its KV head; nothing live gives
/// 0.
inline attend_result attend(array const& q, index_t i, array const& k, array const& v,
                            kept_sets const& live, attention_rule const& rule = {}) {
  index_t const group = q.extent(0) / k.extent(0), dim = v.extent(2);
  attend_result r{array({q.extent(0), dim}), std::vector<double>(uz(q.extent(0)))};
  for (index_t h = 0; h < q.extent(0); ++h) {
    kept_set const& columns = live.at(uz(h / group));
    auto const p = row_probs(q, h, i, k, columns, rule, true, &r.lse[uz(h)]);
    for (std::size_t j = 0; j < p.size(); ++j)
      for (index_t d = 0; d < dim; ++d) r.out.at(h, d) += p[j] * v.at(h / group, columns[j], d);
  }
  return r;
}

/// Selection order: score descending, -0 equals +0, NaN below everything, then position ascending.
inline bool ranks_before(double score_a, index_t position_a, double score_b, index_t position_b) {
  bool const nan_a = std::isnan(score_a), nan_b = std::isnan(score_b);
  if (nan_a != nan_b) return nan_b;
  if (!nan_a && score_a != score_b) return score_a > score_b;
  return position_a < position_b;
}

/// Positions, best first.
inline kept_set ranked(std::vector<double> const& scores, kept_set const& positions) {
  std::vector<std::size_t> order(positions.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return ranks_before(scores.at(a), positions[a], scores.at(b), positions[b]);
  });
  kept_set out;
  for (std::size_t i : order) out.push_back(positions[i]);
  return out;
}

/// The k best positions, ascending. k is clamped to [0, n].
inline kept_set top_positions(std::vector<double> const& scores, kept_set const& positions,
                              index_t k) {
  kept_set best = ranked(scores, positions);
  best.resize(uz(std::clamp<index_t>(k, 0, count(best))));
  std::sort(best.begin(), best.end());
  return best;
}

/// Never evicted: the `sinks` smallest and the `recent` largest live positions, and positions <
/// `frozen`.
struct guard {
  index_t sinks = 0, recent = 0, frozen = 0;
};

inline bool is_protected(guard const& keep, kept_set const& positions, index_t position) {
  index_t below = 0, above = 0;
  for (index_t p : positions) below += p<position, above += p> position;
  return below < keep.sinks || above < keep.recent || position < keep.frozen;
}

/// Protected positions plus the best of the rest until k are kept (more when more are protected).
inline kept_set select(std::vector<double> const& scores, kept_set const& positions, index_t k,
                       guard const& keep = {}) {
  kept_set kept, open;
  std::vector<double> open_scores;
  for (std::size_t i = 0; i < positions.size(); ++i) {
    if (is_protected(keep, positions, positions[i])) {
      kept.push_back(positions[i]);
    } else {
      open.push_back(positions[i]);
      open_scores.push_back(scores.at(i));
    }
  }
  for (index_t p : top_positions(open_scores, open, k - count(kept))) kept.push_back(p);
  std::sort(kept.begin(), kept.end());
  return kept;
}

/// Stride 1, same length, odd kernel, over scores in position order. avg counts outside entries as
/// 0 and divides by the kernel; max sees -inf outside and ignores NaN.
inline std::vector<double> pool1d(std::vector<double> const& x, index_t kernel, pooling kind) {
  if (kind == pooling::none) return x;
  if (kernel < 1 || kernel % 2 == 0) throw std::invalid_argument("oracle::pool1d: even kernel");
  std::vector<double> y(x.size());
  for (index_t j = 0; j < count(x); ++j) {
    double sum = 0, best = -infinity;
    for (index_t i = j - kernel / 2; i <= j + kernel / 2; ++i) {
      if (i < 0 || i >= count(x)) continue;
      sum += x[uz(i)];
      if (x[uz(i)] > best) best = x[uz(i)];
    }
    y[uz(j)] = kind == pooling::avg ? sum / kernel : best;
  }
  return y;
}

/// {Hq, rest...} -> {Hkv, rest...}, heads of a group in order. max ignores NaN.
inline array group_reduce(array const& s, index_t n_kv_heads, reduction how) {
  std::vector<index_t> shape = s.shape;
  index_t const group = shape[0] / n_kv_heads;
  shape[0] = n_kv_heads;
  array out(shape);
  std::size_t const rest = out.data.size() / uz(n_kv_heads);
  for (index_t c = 0; c < n_kv_heads; ++c)
    for (std::size_t r = 0; r < rest; ++r) {
      double sum = 0, best = -infinity;
      for (index_t g = 0; g < group; ++g) {
        double const x = s.data[uz(c * group + g) * rest + r];
        sum += x;
        if (x > best) best = x;
      }
      out.data[uz(c) * rest + r] = how == reduction::max    ? best
                                   : how == reduction::mean ? sum / group
                                                            : sum;
    }
  return out;
}

}  // namespace kvkeep::oracle
