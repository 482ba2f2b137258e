// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Means, deviations and entropies of attention weights per column against plain loops in double.
#include <numeric>

#include <kvkeep/backend/cpu/column_moments.hpp>

#include "../support/test_rows.hpp"
#include "layers.hpp"

namespace {

using namespace kvkeep;
using test::generator;
using test::near;
using test::padded;
using test::test_rows;
using test::uz;

constexpr index_t moments = op::column_moments<>::moments;

struct moments_run {
  padded<float, 4> out;
  op::column_moments<> op;

  moments_run(test::test_layer const& l, query_rows<> const& rows)
      : out({l.n(), l.shape().n_kv_heads, moments * l.shape().group(), l.shape().max_slots}, 0.5F),
        op{l.batch(), l.ref(), rows, out.ref()} {}
};

/// The entropies' bound on weights enters by what the oracle adds to them.
void check(test::test_layer const& l, test_rows const& rows, moments_run const& s) {
  auto const rule = test::rule_of(s.op.layer.kv);
  index_t const group = l.shape().group();
  bool right = true;
  auto const same = [&](float got, double want) {
    right = right && near(static_cast<double>(got), want, 2e-5, 2e-5);
  };
  for (index_t b = 0; b < l.n(); ++b) {
    oracle::array const k = l.keys(b), q = test::queries_of(rows.q.ref(), rows.source(l, b));
    for (index_t c = 0; c < l.shape().n_kv_heads; ++c)
      for (index_t g = 0; g < group; ++g) {
        std::vector<oracle::array> a;  // of the rows that are present, by slot
        for (index_t r = 0; r < rows.n_rows; ++r) {
          index_t const p = rows.position_of(l, b, r);
          if (p < 0) continue;
          auto const seen = test_rows::visible(l, b, c, p);
          auto const x = oracle::row_probs(q, c * group + g, r, k, seen, rule);
          a.emplace_back(std::vector<index_t>{l.shape().max_slots});
          for (std::size_t j = 0; j < seen.size(); ++j) a.back().at(seen[j]) = x[j];
        }
        auto const n = static_cast<double>(std::max<std::size_t>(a.size(), 1));
        for (index_t t = 0; t < l.length(b, c); ++t) {
          double mean = 0, spread = 0, entropy = 0;
          for (auto const& x : a) mean += x.at(t) / n;
          for (auto const& x : a) spread += (x.at(t) - mean) * (x.at(t) - mean);
          for (auto const& x : a) entropy -= x.at(t) * std::log(x.at(t) + 1e-10);
          same(s.out(b, c, g, t), mean);
          same(s.out(b, c, group + g, t), spread);
          same(s.out(b, c, 2 * group + g, t), entropy);
        }
      }
  }
  CHECK(right);
}

}  // namespace

TEST_CASE("column moments equal the oracle, with and without log-sum-exp") {
  test::for_layers(24, 60, 5, [](test::test_layer const& l, generator& g) {
    test_rows rows(l, g, g.integer(1, 40), g.chance(0.5F), g.chance(0.3F) ? 1 : 0);
    moments_run s(l, rows.ref());
    test::random_logits const logits(g, s.op.layer.kv);
    if (g.chance(0.5F)) s.op.rows = rows.with_lse(l, test::rule_of(s.op.layer.kv));
    test::run_op(s.op, s.out);
    check(l, rows, s);
  });
}

TEST_CASE("column moments of more packed rows than one block holds") {
  for (dtype const type : {dtype::f32, dtype::bf16}) {
    test::layer_options o;
    o.cache.shape = {1, 12, 2, 8, 4, 40};
    o.cache.type = type;
    test::test_layer const l(o);
    generator g(5);
    test_rows const rows(l, g, 230, false);
    moments_run s(l, rows.ref());
    test::run_op(s.op, s.out);
    check(l, rows, s);
  }
}

TEST_CASE("column moments have the same bits in every layout") {
  test::same_in_every_layout({2, 6, 2, 20, 4, 45}, [](test::test_layer const& l) {
    generator g(9);
    test_rows const rows(l, g, 17, false);
    moments_run s(l, rows.ref());
    test::run_op(s.op, s.out);
    check(l, rows, s);
    return std::vector<std::vector<float>>{s.out.data()};
  });
}

TEST_CASE("weights that are all of a row, and weights of nothing, have no entropy") {
  test::layer_options o;
  o.cache.shape = {1, 2, 1, 8, 4, 30};
  o.dense = true;
  o.min_length = 30;
  test::test_layer const l(o);
  generator g(5);
  test_rows const rows(l, g, 6, false, 0, 1e6F);
  moments_run s(l, rows.ref());
  test::run_op(s.op, s.out);
  check(l, rows, s);
  bool none = true;
  for (index_t g2 = 0; g2 < 2; ++g2)
    for (index_t t = 0; t < 30; ++t) none = none && std::abs(s.out(0, 0, 4 + g2, t)) <= 1e-3F;
  CHECK(none);
}

TEST_CASE("one bad key or query row leaves the other moments finite and right") {
  float const nan = std::numeric_limits<float>::quiet_NaN();
  float const inf = std::numeric_limits<float>::infinity();
  for (float const bad : {nan, inf, -inf}) {
    INFO("value " << bad);
    test::layer_options o;
    o.cache.shape = {1, 4, 2, 8, 4, 30};
    o.dense = true;
    o.min_length = 30;
    test::test_layer l(o);
    auto key = l.cache.get_k(0, 1, 7);
    key[2] = bad;
    l.cache.set_k(0, 1, 7, key);
    generator g(5);
    test_rows rows(l, g, 9, false);
    if (std::isnan(bad)) rows.q(0, 0, 4, 1) = bad;
    moments_run s(l, rows.ref());
    test::run_op(s.op, s.out);
    check(l, rows, s);
  }
}

TEST_CASE("without rows, or with absent rows only, all moments are zero") {
  test::layer_options o;
  o.cache.shape = {2, 4, 2, 8, 4, 12};
  test::test_layer const l(o);
  generator g(5);
  test_rows rows(l, g, 4, true);
  rows.position.each([](index_t& p) { p = -1; });
  moments_run s(l, rows.ref());
  test::run_op(s.op, s.out);
  check(l, rows, s);
}

TEST_CASE("variances are right where all rows attend to one slot") {
  for (dtype const type : {dtype::f32, dtype::bf16}) {
    INFO(type);
    test::layer_options o;
    o.cache.shape = {1, 2, 1, 8, 4, 60};
    o.cache.type = type;
    o.dense = true;
    o.min_length = 60;
    o.shuffled = false;
    test::test_layer l(o);
    std::vector<float> sink(8, 0);
    sink[0] = 64;
    l.cache.set_k(0, 0, 0, sink);
    generator g(5);
    test_rows rows(l, g, 32, false, 0, 0.01F);
    for (index_t h = 0; h < 2; ++h)
      for (index_t r = 0; r < 32; ++r)
        rows.q(0, h, r, 0) = 0.4F + 0.001F * static_cast<float>(r % 5);
    moments_run s(l, rows.ref());
    test::run_op(s.op, s.out);
    check(l, rows, s);
    // Relative to themselves, too: squares would leave nothing of them.
    oracle::array const k = l.keys(0), q = test::queries_of(rows.q.ref(), 0);
    auto const rule = test::rule_of(s.op.layer.kv);
    index_t const slot = 0;
    std::vector<double> p;
    for (index_t r = 0; r < 32; ++r) {
      auto const seen = test_rows::visible(l, 0, 0, rows.position_of(l, 0, r));
      auto const x = oracle::row_probs(q, 0, r, k, seen, rule);
      for (std::size_t j = 0; j < seen.size(); ++j)
        if (seen[j] == slot) p.push_back(x[j]);
    }
    double const mean = std::accumulate(p.begin(), p.end(), 0.0) / 32;
    double spread = 0;
    for (double x : p) spread += (x - mean) * (x - mean);
    CHECK(mean > 0.9);
    CHECK(spread < 1e-4);
    CHECK(near(static_cast<double>(s.out(0, 0, 2, slot)), spread, 0, 0.02));
  }
}

TEST_CASE("entropies of columns that no row sees are zero, whatever their keys are") {
  float const nan = std::numeric_limits<float>::quiet_NaN();
  float const inf = std::numeric_limits<float>::infinity();
  for (float const seen : {nan, -inf, -3e38F})
    for (float const hidden : {inf, 3e38F}) {
      INFO("seen " << seen << " hidden " << hidden);
      test::layer_options o;
      o.cache.shape = {1, 1, 1, 8, 4, 10};
      o.dense = true;
      o.min_length = 10;
      test::test_layer l(o);
      auto const at = [&](index_t t) { return l.position(0, 0, t); };
      for (index_t t = 0; t < 10; ++t) {
        std::vector<float> key(8, 0.1F);
        key[0] = at(t) < 5 ? seen : hidden;
        l.cache.set_k(0, 0, t, key);
      }
      generator g(3);
      test_rows rows(l, g, 1, false);
      rows.position(0, 0) = 4;
      rows.q.each([](float& x) { x = 1; });
      moments_run s(l, rows.ref());
      test::run_op(s.op, s.out);
      bool zero = true;
      for (index_t t = 0; t < 10; ++t)
        for (index_t m = 0; m < moments; ++m)
          if (at(t) > 4) zero = zero && s.out(0, 0, m, t) == 0;
      CHECK(zero);
    }
}
