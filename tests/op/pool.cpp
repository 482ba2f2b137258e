// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Rows reduced over heads, and pooled over the order of positions.
#include <kvkeep/backend/cpu/pool.hpp>

#include "../support/run_op.hpp"
#include "../support/test_rows.hpp"

namespace {

using namespace kvkeep;
using test::generator;
using test::near;
using test::padded;
using test::uz;

constexpr float inf = std::numeric_limits<float>::infinity();
constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();

oracle::reduction naive(reduction r) {
  return r == reduction::sum    ? oracle::reduction::sum
         : r == reduction::mean ? oracle::reduction::mean
                                : oracle::reduction::max;
}

}  // namespace

TEST_CASE("reduce_rows reduces, scales and divides by age") {
  test::for_seeds(80, [](generator& g) {
    test::layer_options lo;
    lo.cache.shape = test::random_shape(g, 40);
    lo.cache.seed = g.next();
    lo.n_batch = g.integer(1, lo.cache.shape.n_seq);
    test::test_layer const l(lo);
    bool const by_id = g.chance(0.5F);
    index_t const n_rows = g.integer(1, 6), heads = l.shape().n_kv_heads;
    padded<float, 4> in({by_id ? l.n_ids : l.n(), heads, n_rows, l.shape().max_slots});
    in.each([&](float& x) { x = g.normal(); });
    padded<float, 3> out({l.n(), heads, l.shape().max_slots}, -7);
    std::vector<index_t> seen(uz(l.n_ids));
    for (index_t b = 0; b < l.n(); ++b) seen[uz(l.id[uz(b)])] = l.newest(b) + 1 + g.integer(0, 5);
    op::reduce_rows<> o;
    o.batch = l.batch();
    o.slots = l.slots();
    o.in = in.cref();
    o.in_by_id = by_id;
    o.how = g.one_of(std::array<reduction, 3>{reduction::sum, reduction::mean, reduction::max});
    o.scale = g.uniform(0.1F, 3);
    o.by_age = g.chance(0.4F);
    o.seen = seen.data();
    o.out = out.ref();
    test::run_op(o, out);
    bool right = true, rest_kept = true;
    l.each_head([&](index_t b, index_t h) {
      index_t const id = l.id[uz(b)];
      for (index_t t = 0; t < l.shape().max_slots; ++t) {
        if (t >= l.length(b, h)) {
          rest_kept = rest_kept && out(b, h, t) == -7;
          continue;
        }
        oracle::array x({n_rows, 1});
        for (index_t r = 0; r < n_rows; ++r)
          x.at(r, 0) = static_cast<double>(in(by_id ? id : b, h, r, t));
        double y = oracle::group_reduce(x, 1, naive(o.how)).at(0, 0) * static_cast<double>(o.scale);
        if (o.by_age) y /= seen[uz(id)] - l.position(b, h, t);
        right = right && near(static_cast<double>(out(b, h, t)), y);
      }
    });
    CHECK(right);
    CHECK(rest_kept);
  });
}

TEST_CASE("pooling follows positions, not slots; protected slots keep their value") {
  test::for_seeds(120, [](generator& g) {
    test::layer_options lo;
    lo.cache.shape = test::random_shape(g, 40);
    lo.cache.seed = g.next();
    lo.n_batch = g.integer(1, lo.cache.shape.n_seq);
    lo.shuffled = g.chance(0.7F);
    test::test_layer const l(lo);
    index_t const n_rows = g.integer(1, 4);
    padded<float, 4> values({l.n(), l.shape().n_kv_heads, n_rows, l.shape().max_slots});
    bool const special = g.chance(0.3F);
    values.each([&](float& x) {
      x = special && g.chance(0.2F) ? g.one_of(std::array<float, 3>{not_a_number, inf, -inf})
                                    : g.normal();
    });
    auto const before = values.data();
    op::pool_rows<> o;
    o.batch = l.batch();
    o.slots = l.slots();
    o.recent = g.integer(0, 10);
    o.kind = g.one_of(
        std::array<op::pooling, 3>{op::pooling::none, op::pooling::average, op::pooling::maximum});
    o.kernel = 1 + 2 * g.integer(0, 4);
    o.values = values.ref();
    test::run_op(o, values);
    // A kernel of one is no pooling: even NaN stays.
    auto const kind = o.kernel == 1 || o.kind == op::pooling::none ? oracle::pooling::none
                      : o.kind == op::pooling::average             ? oracle::pooling::avg
                                                                   : oracle::pooling::max;
    std::vector<float> expected = before;
    l.each_head([&](index_t b, index_t h) {
      auto const old = test::old_slots(l, b, h, o.recent);
      for (index_t r = 0; r < n_rows; ++r) {
        std::vector<double> x;
        for (index_t t : old)
          x.push_back(static_cast<double>(before[uz(values.ref().offset(b, h, r, t))]));
        auto const y = oracle::pool1d(x, o.kernel, kind);
        for (std::size_t i = 0; i < y.size(); ++i)
          expected[uz(values.ref().offset(b, h, r, old[i]))] = static_cast<float>(y[i]);
      }
    });
    bool right = true;
    for (std::size_t i = 0; i < expected.size(); ++i)
      right =
          right && near(static_cast<double>(values.data()[i]), static_cast<double>(expected[i]));
    CHECK(right);
  });
}

TEST_CASE("a maximum of rows ignores NaN") {
  test::layer_options lo;
  lo.cache.shape = {1, 1, 1, 1, 1, 3};
  lo.min_length = 3;
  lo.dense = true;
  test::test_layer const l(lo);
  float const nan = std::numeric_limits<float>::quiet_NaN();
  std::vector<index_t> const seen(uz(l.n_ids), 5);
  for (index_t const n_rows : {1, 2, 3})
    for (bool const by_age : {false, true}) {
      INFO(n_rows << " rows" << (by_age ? ", by age" : ""));
      padded<float, 4> in({1, 1, n_rows, 3}, nan);
      in(0, 0, n_rows - 1, 0) = 3;
      in(0, 0, 0, 2) = 1;
      padded<float, 3> out({1, 1, 3}, -7);
      op::reduce_rows<> o{l.batch(), l.slots(), in.cref()};
      o.how = reduction::max;
      o.by_age = by_age;
      o.seen = seen.data();
      o.out = out.ref();
      test::run_op(o, out);
      auto const age = [&](index_t t) {
        return by_age ? static_cast<float>(seen[0] - l.position(0, 0, t)) : 1.0F;
      };
      CHECK(out(0, 0, 0) == 3 / age(0));
      CHECK(out(0, 0, 1) == -inf);  // there is nothing else
      CHECK(out(0, 0, 2) == 1 / age(2));
    }
}

TEST_CASE("even kernels, and ages without the tokens seen, are refused") {
  test::layer_options lo;
  lo.cache.shape = {1, 1, 1, 1, 1, 9};
  test::test_layer const l(lo);
  padded<float, 4> values({1, 1, 1, 9});
  padded<float, 3> out({1, 1, 9});
  op::pool_rows<> p;
  p.batch = l.batch();
  p.slots = l.slots();
  p.values = values.ref();
  workspace ws;
  for (index_t const kernel : {4, 0, -1}) {
    p.kernel = kernel;
    CHECK(test::call(test::one_thread(), p, ws) == status::bad_argument);
  }
  op::reduce_rows<> r;
  r.batch = l.batch();
  r.slots = l.slots();
  r.in = values.cref();
  r.out = out.ref();
  r.by_age = true;  // while measuring, the array of tokens seen may not exist yet
  CHECK(test::run_exact(test::one_thread(), r) == status::bad_argument);
}
