// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Naive reference: ExpectedAttention, by whole matrices and one position after the other.
#pragma once

#include "oracle_core.hpp"

namespace kvkeep::oracle {

struct expected_rule {
  double theta = 10000;
  index_t dims = 0;  ///< 0: all
  bool interleaved = false;
  bool rotated = true;
  index_t ahead = 512;
  index_t sinks = 4;
  bool covariance = true;
  bool value_norms = true;
  double epsilon = 0;
};

/// x turned to `position` (backwards if negative).
inline std::vector<double> turned(std::vector<double> x, expected_rule const& r, double position) {
  index_t const dims = r.dims > 0 ? r.dims : count(x);
  for (index_t i = 0; i < dims / 2; ++i) {
    index_t const a = r.interleaved ? 2 * i : i, b = r.interleaved ? 2 * i + 1 : i + dims / 2;
    double const angle = position * std::pow(r.theta, -2.0 * i / dims);
    double const p = x[uz(a)], q = x[uz(b)];
    x[uz(a)] = p * std::cos(angle) - q * std::sin(angle);
    x[uz(b)] = q * std::cos(angle) + p * std::sin(angle);
  }
  return x;
}

/// The mean rotation over the positions from `seen` on, as a matrix.
inline array mean_rotation(index_t dim, expected_rule const& r, index_t seen) {
  array m({dim, dim});
  for (index_t c = 0; c < dim; ++c)
    for (index_t f = 0; f < r.ahead; ++f) {
      std::vector<double> unit(uz(dim));
      unit[uz(c)] = 1;
      auto const y = turned(unit, r, seen + f);
      for (index_t d = 0; d < dim; ++d) m.at(d, c) += y[uz(d)] / r.ahead;
    }
  return m;
}

/// {Hkv, T}, infinity for sinks. q {Hq, T, D}, k {Hkv, T, D}, v {Hkv, T, Dv}; rows of queries one after the other, each
/// against each key.
inline array expected_scores(array const& q, array const& k, array const& v, expected_rule const& r,
                             double scale) {
  index_t const n = k.extent(1), dim = k.extent(2), heads = k.extent(0);
  index_t const group = q.extent(0) / heads;
  array const rotation = mean_rotation(dim, r, n);
  array share({heads, n});
  for (index_t h = 0; h < q.extent(0); ++h) {
    std::vector<std::vector<double>> rows;
    for (index_t i = r.sinks; i < n; ++i)
      rows.push_back(r.rotated ? turned(q.row(h, i), r, -i) : q.row(h, i));
    std::vector<double> mean(uz(dim)), ahead(uz(dim));
    for (auto const& x : rows)
      for (std::size_t d = 0; d < x.size(); ++d) mean[d] += x[d] / static_cast<double>(rows.size());
    for (index_t d = 0; d < dim; ++d)
      for (index_t e = 0; e < dim; ++e) ahead[uz(d)] += rotation.at(d, e) * mean[uz(e)];
    std::vector<double> logits;
    for (index_t j = r.sinks; j < n; ++j) {
      auto const key = k.row(h / group, j);
      std::vector<double> back(uz(dim));  // the key seen from where the queries are
      for (index_t d = 0; d < dim; ++d)
        for (index_t e = 0; e < dim; ++e) back[uz(e)] += rotation.at(d, e) * key[uz(d)];
      double linear = 0, square = 0;
      for (index_t d = 0; d < dim; ++d) linear += ahead[uz(d)] * key[uz(d)];
      for (auto const& x : rows) {
        double along = 0;
        for (std::size_t d = 0; d < x.size(); ++d) along += (x[d] - mean[d]) * back[d];
        square += along * along / static_cast<double>(rows.size());
      }
      logits.push_back(scale * linear + (r.covariance ? scale * scale * square / 2 : 0));
    }
    auto const p = softmax(logits);
    for (std::size_t j = 0; j < p.size(); ++j)
      share.at(h / group, r.sinks + static_cast<index_t>(j)) += p[j] / group;
  }
  for (index_t h = 0; h < heads; ++h)
    for (index_t j = 0; j < n; ++j) {
      double norm = 0;
      for (double x : v.row(h, j)) norm += x * x;
      if (j < r.sinks)
        share.at(h, j) = infinity;
      else if (r.value_norms)
        share.at(h, j) = (share.at(h, j) + r.epsilon) * std::sqrt(norm);
    }
  return share;
}

}  // namespace kvkeep::oracle
