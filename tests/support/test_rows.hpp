// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Query rows for the tests of scoring ops.
#pragma once

#include "test_layer.hpp"

namespace kvkeep::test {

/// Query rows `[entry or id, q_head, row, dim_k]` with ascending positions. Absent rows come first.
struct test_rows {
  padded<float, 4> q;
  padded<index_t, 2> position;
  padded<float, 3> lse;
  bool by_id;
  index_t n_rows;

  /// Positions end at or before the newest of the entry. `absent` is the chance of a missing row.
  test_rows(test_layer const& l, generator& g, index_t rows, bool rows_by_id, float absent = 0,
            float q_scale = 1)
      : q({rows_by_id ? l.n_ids : l.n(), l.shape().n_q_heads, rows, l.shape().dim_k}, 0, 0),
        position({rows_by_id ? l.n_ids : l.n(), rows}, -1),
        lse({rows_by_id ? l.n_ids : l.n(), l.shape().n_q_heads, rows}, 0),
        by_id(rows_by_id),
        n_rows(rows) {
    q.each([&](float& x) { x = q_scale * g.normal(); });
    for (index_t b = 0; b < l.n(); ++b) {
      index_t const last = l.newest(b) + g.integer(-2, 0);
      index_t const missing =
          absent > 0 ? g.integer(0, static_cast<index_t>(absent * static_cast<float>(rows))) : 0;
      for (index_t r = missing; r < rows; ++r)
        position(source(l, b), r) = std::max(last - rows + 1 + r, -1);
    }
  }

  index_t source(test_layer const& l, index_t b) const { return by_id ? l.id[uz(b)] : b; }
  index_t position_of(test_layer const& l, index_t b, index_t r) const {
    return position(source(l, b), r);
  }
  query_rows<> ref() const {
    query_rows<> x;
    x.q = q.cref();
    x.position = position.cref();
    x.by_id = by_id;
    return x;
  }
  /// With the exact log-sum-exp over the slots that a row sees (a row that sees none: -infinity).
  query_rows<> with_lse(test_layer const& l, oracle::attention_rule const& rule) {
    for (index_t b = 0; b < l.n(); ++b) {
      oracle::array const k = l.keys(b), rows = queries_of(q.ref(), source(l, b));
      for (index_t h = 0; h < l.shape().n_q_heads; ++h)
        for (index_t r = 0; r < n_rows; ++r) {
          double z = 0;
          auto const seen = visible(l, b, h / l.shape().group(), position_of(l, b, r));
          oracle::row_probs(rows, h, r, k, seen, rule, true, &z);
          lse(source(l, b), h, r) = static_cast<float>(z);
        }
    }
    query_rows<> x = ref();
    x.lse = lse.cref();
    return x;
  }
  /// Rows first .. first + count - 1.
  static query_rows<> part(query_rows<> x, index_t first, index_t count) {
    x.q.data += first * x.q.stride[2];
    x.q.extent[2] = count;
    x.position.data += first * x.position.stride[1];
    x.position.extent[1] = count;
    if (x.lse) x.lse.data += first * x.lse.stride[2];
    x.lse.extent[2] = count;
    return x;
  }
  /// Slots of a head whose position is not above `limit`.
  static std::vector<index_t> visible(test_layer const& l, index_t b, index_t c, index_t limit) {
    std::vector<index_t> seen;
    for (index_t t = 0; t < l.length(b, c); ++t)
      if (l.position(b, c, t) <= limit) seen.push_back(t);
    return seen;
  }
};

/// Slots of a head that are not among its `recent` largest positions, by position.
inline std::vector<index_t> old_slots(test_layer const& l, index_t b, index_t c, index_t recent) {
  std::vector<index_t> s = l.slots_by_position(b, c);
  s.resize(uz(std::max(0, l.length(b, c) - recent)));
  return s;
}

/// Rounds every `step`-th row to numbers that both 16-bit types hold.
inline void round_rows(test_rows& rows, index_t step) {
  for (index_t b = 0; b < rows.q.ref().extent[0]; ++b)
    for (index_t h = 0; h < rows.q.ref().extent[1]; ++h)
      for (index_t r = 0; r < rows.n_rows; r += step)
        for (index_t d = 0; d < rows.q.ref().extent[3]; ++d)
          rows.q(b, h, r, d) = std::round(rows.q(b, h, r, d) * 32) / 32;
}

}  // namespace kvkeep::test
