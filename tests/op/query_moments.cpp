// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Moments of query rows, and quadratic logits of keys, against plain loops in double.
#include <kvkeep/backend/cpu/query_moments.hpp>

#include "layers.hpp"

namespace {

using namespace kvkeep;
using test::generator;
using test::near;
using test::padded;
using test::uz;

/// Rows for some entries, their turns, and moments of all ids that something has been gathered in.
struct moments_run {
  padded<float, 4> q, turns;
  padded<index_t, 2> position;
  padded<float, 3> to;
  std::vector<index_t> ids;
  op::query_moments<> op;

  moments_run(generator& g, moment_layout const& layout, index_t kv_heads, index_t rows)
      : q({2, kv_heads * layout.group, rows, layout.dim}),
        turns({2, rows, 2, layout.dim / 2}),
        position({2, rows}, -1),
        to({3, kv_heads, layout.floats()}),
        ids{g.integer(0, 2)} {
    ids.push_back((ids[0] + 1) % 3);
    q.each([&](float& x) { x = g.normal() + 2; });
    to.each([&](float& x) { x = g.normal(); });
    op.batch.n = 2;
    op.batch.id = ids.data();
    op.rows.q = q.cref();
    op.rows.position = position.cref();
    op.layout = layout;
    op.to = to.ref();
    if (layout.dim > 1 && g.chance(0.7F)) turn(g);
    op.first = g.integer(0, 9);
    for (index_t b = 0; b < 2; ++b) {
      // An entry goes on behind what others have gathered, or begins; some rows at its end may be absent.
      index_t const from = g.chance(0.5F) ? 0 : g.integer(1, 20);
      index_t const n = g.chance(0.3F) ? g.integer(0, rows) : rows;
      for (index_t r = 0; r < n; ++r) position(b, r) = from + r;
      auto const count = static_cast<float>(g.chance(0.8F) ? from : 0);
      for (index_t h = 0; h < kv_heads; ++h) to(ids[uz(b)], h, 0) = count;
    }
  }
  void turn(generator& g) {
    op.pairs = {2 * g.integer(1, op.layout.dim / 2), g.chance(0.5F)};
    op.turns = turns.cref();
    for (index_t b = 0; b < 2; ++b)
      for (index_t r = 0; r < turns.ref().extent[1]; ++r)
        for (index_t i = 0; i < op.pairs.pairs(); ++i) {
          float const angle = g.uniform(0, 6.28F);
          turns(b, r, 0, i) = std::cos(angle);
          turns(b, r, 1, i) = std::sin(angle);
        }
  }
};

/// Row r of an entry's query head as it was before it was turned.
std::vector<double> turned_back(moments_run const& m, index_t b, index_t head, index_t r) {
  turned_pairs const& pairs = m.op.pairs;
  std::vector<double> x;
  for (index_t d = 0; d < m.op.layout.dim; ++d) {
    double y = static_cast<double>(m.q(b, head, r, d));
    if (m.op.turns && d < pairs.dims) {
      double const c = static_cast<double>(m.turns(b, r, 0, pairs.pair_of(d)));
      double const s = static_cast<double>(m.turns(b, r, 1, pairs.pair_of(d)));
      double const other = static_cast<double>(m.q(b, head, r, pairs.partner(d)));
      y = pairs.first(d) ? y * c + other * s : y * c - other * s;
    }
    x.push_back(y);
  }
  return x;
}

/// @param was  the moments before
void check(moments_run const& m, padded<float, 3> const& was) {
  moment_layout const& l = m.op.layout;
  index_t const kv_heads = m.to.ref().extent[1], rows = m.q.ref().extent[2];
  bool right = true;
  for (index_t b = 0; b < 2; ++b)
    for (index_t head = 0; head < kv_heads * l.group; ++head) {
      index_t const id = m.ids[uz(b)], g = head % l.group;
      float* const old = was.ref().at(id, head / l.group);
      float* const now = m.to.ref().at(id, head / l.group);
      double const before = m.position(b, 0) == 0 ? 0 : static_cast<double>(old[0]);
      std::vector<std::vector<double>> x;
      for (index_t r = 0; r < rows; ++r)
        if (m.position(b, r) >= std::max(m.op.first, 0)) x.push_back(turned_back(m, b, head, r));
      auto const n = static_cast<double>(x.size());
      right = right && static_cast<double>(now[0]) == before + n;
      if (before + n == 0) continue;
      std::vector<double> own(uz(l.dim)), was_mean(uz(l.dim));
      for (index_t d = 0; d < l.dim; ++d) {
        for (auto const& row : x) own[uz(d)] += row[uz(d)] / std::max(n, 1.0);
        was_mean[uz(d)] = before > 0 ? static_cast<double>(l.mean(old, g)[d]) : 0;
        double const mean = (before * was_mean[uz(d)] + n * own[uz(d)]) / (before + n);
        right = right && near(static_cast<double>(l.mean(now, g)[d]), mean, 1e-5, 1e-5);
      }
      for (index_t d = 0; l.spreads && d < l.dim; ++d)
        for (index_t e = 0; e <= d; ++e) {
          double sum = before > 0 ? static_cast<double>(l.spread(old, g, d)[e]) : 0;
          for (auto const& row : x) sum += (row[uz(d)] - own[uz(d)]) * (row[uz(e)] - own[uz(e)]);
          if (n > 0)
            sum += (own[uz(d)] - was_mean[uz(d)]) * (own[uz(e)] - was_mean[uz(e)]) * before * n /
                   (before + n);
          double const scale = 1 + before + n;  // of what is summed up
          right =
              right && std::abs(static_cast<double>(l.spread(now, g, d)[e]) - sum) < 3e-5 * scale;
        }
    }
  CHECK(right);
}

/// Quadratic logits of a layer's slots by forms of which what lies above the diagonal is 0.
struct logits_run {
  padded<float, 4> form;
  padded<float, 3> out;
  op::quadratic_logits<> op;

  logits_run(test::test_layer const& l, generator& g, bool spreads)
      : form({l.n(), l.shape().n_q_heads, l.shape().dim_k, spreads ? 1 + l.shape().dim_k : 1}, 0,
             g.integer(0, 3)),
        out({l.n(), l.shape().n_q_heads, l.shape().max_slots}, -7),
        op{l.batch(), l.ref(), 0, spreads, form.cref(), out.ref()} {
    for (index_t b = 0; b < l.n(); ++b)
      for (index_t h = 0; h < l.shape().n_q_heads; ++h)
        for (index_t d = 0; d < l.shape().dim_k; ++d)
          for (index_t c = 0; c < (spreads ? 2 + d : 1); ++c) form(b, h, d, c) = g.normal();
  }
};

void check(test::test_layer const& l, logits_run const& s) {
  bool right = true;
  for (index_t b = 0; b < l.n(); ++b) {
    oracle::array const k = l.keys(b);
    for (index_t h = 0; h < l.shape().n_q_heads; ++h) {
      index_t const c = h / l.shape().group();
      for (index_t t = 0; t < l.length(b, c); ++t) {
        float const got = s.out(b, h, t);
        if (l.position(b, c, t) < s.op.first) {
          right = right && got == -std::numeric_limits<float>::infinity();
          continue;
        }
        double sum = 0, size = 0;
        for (index_t d = 0; d < l.shape().dim_k; ++d) {
          double row = static_cast<double>(s.form(b, h, d, 0));
          for (index_t e = 0; s.op.spreads && e <= d; ++e)
            row += static_cast<double>(s.form(b, h, d, 1 + e)) * k.at(c, t, e);
          sum += row * k.at(c, t, d);
          size += std::abs(row * k.at(c, t, d));
        }
        right = right && near(static_cast<double>(got), sum, 0, 1e-5 * (1 + size));
      }
      for (index_t t = l.length(b, c); t < l.shape().max_slots; ++t)
        right = right && s.out(b, h, t) == -7;
    }
  }
  CHECK(right);
}

}  // namespace

TEST_CASE("moments of query rows equal plain sums, whatever was gathered before") {
  test::for_seeds(40, [](generator& g) {
    index_t const dims[] = {2, 7, 16, 20, 34};
    moment_layout const layout{g.integer(1, 3), g.one_of(dims), g.chance(0.8F)};
    moments_run m(g, layout, g.integer(1, 2), g.integer(1, 150));
    padded<float, 3> const was = [&] {
      padded<float, 3> copy({3, m.to.ref().extent[1], layout.floats()});
      copy.data() = m.to.data();
      return copy;
    }();
    INFO("dim " << layout.dim << " rows " << m.q.ref().extent[2]);
    test::run_op(m.op, m.to);
    check(m, was);
  });
}

TEST_CASE("moments of wide heads, and of an odd feature alone") {
  generator g(3);
  for (index_t dim : {1, 70, 130}) {
    moments_run m(g, {2, dim, true}, 1, 100);
    padded<float, 3> was({3, 1, m.op.layout.floats()});
    was.data() = m.to.data();
    test::run_op(m.op, m.to);
    check(m, was);
  }
}

TEST_CASE("rows by id and features that lie apart are refused, and nothing changes") {
  generator g(4);
  moments_run m(g, {2, 8, true}, 2, 10);
  auto const before = m.to.data();
  workspace ws;
  auto by_id = m.op;
  by_id.rows.by_id = true;
  CHECK(test::call(test::one_thread(), by_id, ws) == status::bad_argument);
  auto apart = m.op;
  apart.rows.q.stride[3] = 2;
  CHECK(test::call(test::one_thread(), apart, ws) == status::bad_argument);
  CHECK(test::same_bits(before, m.to.data()));
}

TEST_CASE("quadratic logits equal plain sums") {
  test::for_layers(30, 90, 4, [](test::test_layer const& l, generator& g) {
    logits_run s(l, g, g.chance(0.8F));
    s.op.first = g.chance(0.5F) ? g.integer(0, 10) : 0;
    test::run_op(s.op, s.out);
    check(l, s);
  });
}

TEST_CASE("quadratic logits have the same bits in every layout, of wide heads too") {
  for (index_t dim : {20, 100})
    test::same_in_every_layout({2, 4, 2, dim, 4, 45}, [](test::test_layer const& l) {
      generator g(9);
      logits_run s(l, g, true);
      test::run_op(s.op, s.out);
      check(l, s);
      return std::vector<std::vector<float>>{s.out.data()};
    });
}

TEST_CASE("a key that is not a number has the lowest logit, and no other key feels it") {
  test::layer_options o;
  o.cache.shape = {1, 2, 1, 8, 4, 40};
  o.dense = true;
  o.min_length = 40;
  test::test_layer const l(o);
  generator g(5);
  logits_run s(l, g, true);
  test::run_op(s.op, s.out);
  auto const clean = s.out.data();
  float* const bad =
      reinterpret_cast<float*>(l.ref().kv.k.data) + l.ref().kv.k.layout.strided.offset(0, 0, 17);
  bad[3] = std::nanf("");
  test::run_op(s.op, s.out);
  bool right = true;
  for (index_t h = 0; h < 2; ++h)
    for (index_t t = 0; t < 40; ++t)
      right = right && s.out(0, h, t) ==
                           (t == 17 ? -std::numeric_limits<float>::max() : clean[uz(h * 43 + t)]);
  CHECK(right);
}
