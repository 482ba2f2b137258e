// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Means over heads and layers: fp32 in order, bit for bit.
#include <kvkeep/backend/cpu/reduce.hpp>

#include "../support/run_op.hpp"

namespace {

using namespace kvkeep;
using test::generator;
using test::padded;
using test::uz;

test::test_layer equal_layer(generator& g) {
  test::layer_options o;
  o.cache.shape = test::random_shape(g, 40);
  o.cache.seed = g.next();
  o.n_batch = g.integer(1, o.cache.shape.n_seq);
  o.equal_heads = true;
  return test::test_layer(o);
}

}  // namespace

TEST_CASE("mean_heads gives every head the fp32 mean, summed in head order") {
  test::for_seeds(60, [](generator& g) {
    auto const l = equal_layer(g);
    index_t const heads = l.shape().n_kv_heads;
    padded<float, 3> scores({l.n(), heads, l.shape().max_slots});
    scores.each([&](float& x) { x = g.normal() * std::exp(8 * g.normal()); });
    std::vector<float> const before = scores.data();
    op::mean_heads<> o;
    o.batch = l.batch();
    o.slots = l.slots();
    o.scores = scores.ref();
    test::run_op(o, scores);
    bool right = true;
    l.each_head([&](index_t b, index_t h) {
      for (index_t t = 0; t < l.length(b, h); ++t) {
        float sum = before[uz(scores.ref().offset(b, 0, t))];
        for (index_t c = 1; c < heads; ++c) sum += before[uz(scores.ref().offset(b, c, t))];
        right = right && scores(b, h, t) == sum / static_cast<float>(heads);
      }
    });
    CHECK(right);
  });
}

TEST_CASE("mean_layers sums layers in order and divides at the last") {
  test::for_seeds(60, [](generator& g) {
    auto const l = equal_layer(g);
    index_t const n_layers = g.integer(1, 5);
    padded<float, 3> sum({l.n(), l.shape().n_kv_heads, l.shape().max_slots}, 99);
    std::vector<padded<float, 3>> layers;
    for (index_t i = 0; i < n_layers; ++i) {
      layers.emplace_back(std::array<index_t, 3>{l.n(), l.shape().n_kv_heads, l.shape().max_slots});
      layers.back().each([&](float& x) { x = g.normal(); });
      op::mean_layers<> o;
      o.batch = l.batch();
      o.slots = l.slots();
      o.scores = layers.back().cref();
      o.first = i == 0;
      o.last = i + 1 == n_layers;
      o.n_layers = n_layers;
      o.sum = sum.ref();
      test::run_op(o, sum);
    }
    bool right = true;
    l.each_head([&](index_t b, index_t h) {
      for (index_t t = 0; t < l.length(b, h); ++t) {
        float x = layers[0](b, h, t);
        for (index_t i = 1; i < n_layers; ++i) x += layers[uz(i)](b, h, t);
        right = right && sum(b, h, t) == x / static_cast<float>(n_layers);
      }
    });
    CHECK(right);
  });
}

TEST_CASE("NaN and infinities pass through the means") {
  test::layer_options o;
  o.cache.shape = {1, 2, 2, 1, 1, 3};
  o.equal_heads = true;
  o.min_length = 3;
  test::test_layer const l(o);
  float const inf = std::numeric_limits<float>::infinity();
  padded<float, 3> s({1, 2, 3}, 1);
  s(0, 0, 0) = inf;
  s(0, 1, 1) = std::numeric_limits<float>::quiet_NaN();
  s(0, 0, 2) = inf;
  s(0, 1, 2) = -inf;
  op::mean_heads<> m;
  m.batch = l.batch();
  m.slots = l.slots();
  m.scores = s.ref();
  test::run_op(m, s);
  CHECK(s(0, 1, 0) == inf);
  CHECK(std::isnan(s(0, 0, 1)));
  CHECK(std::isnan(s(0, 0, 2)));
}
