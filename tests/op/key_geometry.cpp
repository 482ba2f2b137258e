// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// KeyDiff and LagKV against the oracle, over positions in any slot order.
#include <kvkeep/backend/cpu/key_geometry.hpp>

#include "../support/run_op.hpp"

namespace {

using namespace kvkeep;
using test::generator;
using test::near;
using test::padded;
using test::uz;

test::layer_options random_options(generator& g, index_t max_slots) {
  test::layer_options o;
  o.cache.shape = test::random_shape(g, max_slots);
  o.cache.seed = g.next();
  o.cache.layout = g.one_of(test::all_layouts());
  o.cache.type = g.one_of(test::readable_dtypes());
  o.n_batch = g.integer(1, o.cache.shape.n_seq);
  return o;
}

/// Rows of one head in position order: {1, n, dim}.
oracle::array in_order(oracle::array const& x, index_t h, std::vector<index_t> const& slots) {
  oracle::array y({1, oracle::count(slots), x.extent(2)});
  for (std::size_t i = 0; i < slots.size(); ++i)
    for (index_t d = 0; d < x.extent(2); ++d)
      y.at(0, static_cast<index_t>(i), d) = x.at(h, slots[i], d);
  return y;
}

void check_key_diff(test::test_layer const& l, padded<float, 3> const& out) {
  bool right = true;
  for (index_t b = 0; b < l.n(); ++b) {
    auto const keys = l.keys(b);
    for (index_t h = 0; h < l.shape().n_kv_heads; ++h) {
      auto const slots = l.slots_by_position(b, h);
      auto const s = oracle::keydiff_scores(keys, h, slots);
      for (std::size_t i = 0; i < slots.size(); ++i)
        right = right && near(static_cast<double>(out(b, h, slots[i])), s[i], 2e-5, 2e-6);
    }
  }
  CHECK(right);
}

op::key_diff<> make_key_diff(test::test_layer const& l, padded<float, 3> const& out) {
  return {l.batch(), l.ref(), out.ref()};
}

}  // namespace

TEST_CASE("KeyDiff equals the oracle") {
  test::for_seeds(40, [](generator& g) {
    test::layer_options lo = random_options(g, 50);
    // In one dimension unit keys may cancel exactly, and the cosine with their mean is undefined.
    lo.cache.shape.dim_k = std::max(lo.cache.shape.dim_k, 4);
    test::test_layer const l(lo);
    padded<float, 3> out({l.n(), l.shape().n_kv_heads, l.shape().max_slots}, -7);
    auto const o = make_key_diff(l, out);
    test::run_op(o, out);
    check_key_diff(l, out);
    CHECK(l.cache.canaries_intact());
  });
}

TEST_CASE("KeyDiff gives a token the same bits in every layout and slot") {
  for (dtype const type : test::readable_dtypes()) {
    std::vector<float> first;
    for (test::layout_id const layout : test::all_layouts()) {
      INFO(layout << " " << type);
      test::layer_options lo;
      lo.cache = {layout, type, {2, 2, 2, 20, 4, 45}, 8, 5, {}};
      test::test_layer l(lo);
      padded<float, 3> out({2, 2, 45}, -7);
      auto const o = make_key_diff(l, out);
      test::run_op(o, out);
      if (first.empty()) first = out.data();
      CHECK(test::same_bits(first, out.data()));

      // The same tokens with their slots reversed.
      padded<float, 3> reversed({2, 2, 45}, -7);
      l.each_head([&](index_t b, index_t h) {
        index_t const n = l.length(b, h), row = l.row[uz(b)], id = l.id[uz(b)];
        for (index_t t = 0; t < n / 2; ++t) {
          auto const x = l.cache.k().raw(row, h, t);
          l.cache.k().set_raw(row, h, t, l.cache.k().raw(row, h, n - 1 - t));
          l.cache.k().set_raw(row, h, n - 1 - t, x);
          std::swap(l.positions(id, h, t), l.positions(id, h, n - 1 - t));
        }
      });
      auto const again = make_key_diff(l, reversed);
      REQUIRE(test::run_exact(test::one_thread(), again) == status::ok);
      bool same = true;
      l.each_head([&](index_t b, index_t h) {
        index_t const n = l.length(b, h);
        for (index_t t = 0; t < n; ++t) same = same && out(b, h, t) == reversed(b, h, n - 1 - t);
      });
      CHECK(same);
    }
  }
}

TEST_CASE("KeyDiff of zero keys, of one key and of none") {
  test::layer_options lo;
  lo.cache.shape = {2, 2, 2, 8, 4, 5};
  lo.min_length = 5;
  test::test_layer l(lo);
  std::vector<float> const zero(8);
  for (index_t t = 0; t < 5; ++t) l.cache.set_k(l.row[0], 0, t, zero);
  l.lengths(l.id[0], 1) = 1;
  l.lengths(l.id[1], 0) = 0;
  padded<float, 3> out({2, 2, 5}, -7);
  auto const o = make_key_diff(l, out);
  test::run_op(o, out);
  check_key_diff(l, out);
  CHECK(out(0, 0, 3) == 0);
  CHECK(out(0, 1, 0) == Approx(-1));
}

TEST_CASE("a key that is not finite spoils its own KeyDiff score alone") {
  float const infinite = std::numeric_limits<float>::infinity();
  for (float const bad :
       {infinite, -infinite, std::nanf(""), 1e30F}) {  // the last one's norm is not
    INFO(bad);
    test::layer_options lo;
    lo.cache.shape = {1, 1, 1, 8, 4, 150};
    lo.min_length = 150;
    test::test_layer l(lo);
    index_t const row = l.row[0], id = l.id[0];
    std::vector<index_t> good;
    for (index_t t = 0; t < 150; ++t)
      if (t != 70) good.push_back(t);
    auto const in_position_order = [&](index_t a, index_t b) {
      return l.positions(id, 0, a) < l.positions(id, 0, b);
    };
    std::sort(good.begin(), good.end(), in_position_order);
    auto const expected = oracle::keydiff_scores(l.keys(0), 0, good);
    l.cache.set_k(row, 0, 70, std::vector<float>{1, 2, bad, 4, 5, 6, 7, 8});
    padded<float, 3> out({1, 1, 150}, -7);
    auto const o = make_key_diff(l, out);
    test::run_op(o, out);
    CHECK(std::isnan(out(0, 0, 70)));
    bool right = true;
    for (std::size_t i = 0; i < good.size(); ++i)
      right = right && near(static_cast<double>(out(0, 0, good[i])), expected[i], 2e-5, 2e-6);
    CHECK(right);
  }
}

TEST_CASE("LagKV equals the oracle") {
  test::for_seeds(60, [](generator& g) {
    test::test_layer const l(random_options(g, 60));
    padded<float, 3> out({l.n(), l.shape().n_kv_heads, l.shape().max_slots}, -7);
    op::lag_score<> o;
    o.batch = l.batch();
    o.layer = l.ref();
    o.sinks = g.integer(0, 5);
    o.lag = g.integer(1, 12);
    o.cross_scoring = g.chance(0.6F);
    o.out = out.ref();
    test::run_op(o, out);
    bool right = true;
    for (index_t b = 0; b < l.n(); ++b) {
      auto const keys = l.keys(b), values = l.values(b);
      for (index_t h = 0; h < l.shape().n_kv_heads; ++h) {
        auto const slots = l.slots_by_position(b, h);
        auto const k = in_order(keys, h, slots), v = in_order(values, h, slots);
        auto const s = oracle::lagkv_scores(k, v, o.sinks, o.lag, o.cross_scoring);
        index_t ranks_off = 0;
        for (index_t i = 0; i < oracle::count(slots); ++i) {
          auto const got = static_cast<double>(out(b, h, slots[uz(i)]));
          if (o.cross_scoring)
            right = right && near(got, s.at(0, i), 5e-5);
          else
            ranks_off += !near(got, s.at(0, i));
        }
        // Two deviations that agree to rounding may change places.
        right = right && ranks_off <= 2;
      }
    }
    CHECK(right);
    CHECK(l.cache.canaries_intact());
  });
}

TEST_CASE("LagKV of constant channels and of partitions that tie") {
  test::layer_options lo;
  lo.cache.shape = {1, 1, 1, 4, 4, 14};
  lo.min_length = 14;
  lo.shuffled = false;
  test::test_layer l(lo);
  std::vector<float> const same{1, 2, 3, 4};
  for (index_t t = 0; t < 14; ++t) l.cache.set_k(0, 0, t, same), l.cache.set_v(0, 0, t, same);
  padded<float, 3> out({1, 1, 14}, -7);
  op::lag_score<> o;
  o.batch = l.batch();
  o.layer = l.ref();
  o.sinks = 1;
  o.lag = 4;
  o.out = out.ref();
  test::run_op(o, out);
  for (index_t t = 0; t < 14; ++t) {
    float const rank = static_cast<float>((t - 1) % 4) / 4;
    CHECK(out(0, 0, t) == (t >= 1 && t < 9 ? rank : 1));
  }
  o.cross_scoring = true;
  test::run_op(o, out);
  CHECK(out(0, 0, 5) == 0.25F);
}

TEST_CASE("a value that is not finite leaves LagKV's range, and spoils no other score") {
  index_t const lag = 40, n = 1 + 3 * lag, bad_at = 1 + lag + 35;
  test::layer_options lo;
  lo.cache.shape = {1, 1, 1, 8, 4, n};
  lo.min_length = n;
  lo.shuffled = false;
  test::test_layer l(lo);
  padded<float, 3> good({1, 1, n}, -7), out({1, 1, n}, -7);
  op::lag_score<> o;
  o.batch = l.batch();
  o.layer = l.ref();
  o.sinks = 1;
  o.lag = lag;
  o.cross_scoring = true;
  // The range without it: as if it were the number of its neighbour.
  auto const k = l.keys(0);
  std::vector<float> key(8);
  for (index_t d = 0; d < 8; ++d) key[uz(d)] = static_cast<float>(k.at(0, bad_at, d));
  key[3] = static_cast<float>(k.at(0, bad_at - 1, 3));
  l.cache.set_k(l.row[0], 0, bad_at, key);
  o.out = good.ref();
  test::run_op(o, good);
  o.out = out.ref();
  float const infinite = std::numeric_limits<float>::infinity();
  for (float const bad : {infinite, -infinite, std::nanf("")}) {
    INFO(bad);
    key[3] = bad;
    l.cache.set_k(l.row[0], 0, bad_at, key);
    test::run_op(o, out);
    index_t same = 0, finite = 0;
    for (index_t t = 0; t < n; ++t) {
      same += out(0, 0, t) == good(0, 0, t) ? 1 : 0;
      finite += t != bad_at && std::isfinite(out(0, 0, t)) ? 1 : 0;
    }
    CHECK(same >= 1 + 2 * lag);  // all but its own partition
    CHECK(finite == n - 1);
  }
}

TEST_CASE("LagKV refuses empty partitions and negative sinks") {
  test::layer_options lo;
  lo.cache.shape = {1, 1, 1, 4, 4, 5};
  test::test_layer const l(lo);
  padded<float, 3> out({1, 1, 5});
  op::lag_score<> o;
  o.batch = l.batch();
  o.layer = l.ref();
  o.out = out.ref();
  workspace ws;
  o.lag = 0;
  CHECK(test::call(test::one_thread(), o, ws) == status::bad_argument);
  o.lag = 1;
  o.sinks = -1;
  CHECK(test::call(test::one_thread(), o, ws) == status::bad_argument);
}
