// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Attention weights folded into per-slot sums, against the formula in double.
#include <kvkeep/backend/cpu/accumulate.hpp>

#include "../support/run_op.hpp"

namespace {

using namespace kvkeep;
using test::generator;
using test::near;
using test::padded;
using test::uz;

}  // namespace

TEST_CASE("accumulate adds normalised weights of the token's ring row") {
  test::for_seeds(40, [](generator& g) {
    test::layer_options o;
    o.cache.shape = test::random_shape(g, 40, 6);
    o.n_batch = g.integer(1, o.cache.shape.n_seq);
    o.cache.seed = g.next();
    test::test_layer const l(o);
    index_t const group = l.shape().group(), ring = g.integer(1, 4), heads = l.shape().n_kv_heads;
    padded<float, 4> weights({l.n_ids, heads, ring * group, l.shape().max_slots});
    padded<float, 4> sum({l.n_ids, heads, group, ring});
    padded<index_t, 2> fresh({l.n_ids, heads});
    weights.each([&](float& w) { w = g.uniform(); });
    sum.each([&](float& s) { s = g.uniform(0.5F, 20); });
    bool const by_id = g.chance(0.5F), per_head = g.chance(0.4F), use_fresh = g.chance(0.5F);
    for (index_t b = 0; b < l.n(); ++b)
      for (index_t h = 0; h < heads; ++h) fresh(l.id[uz(b)], h) = g.integer(-1, l.length(b, h));
    padded<float, 4> out(
        {by_id ? l.n_ids : l.n(), heads, per_head ? group : 1, l.shape().max_slots});
    out.each([&](float& x) { x = g.normal(); });
    // What an evicted token left in the slot must not matter, NaN included.
    l.each_head([&](index_t b, index_t h) {
      index_t const t = fresh(l.id[uz(b)], h);
      if (use_fresh && t >= 0 && t < l.length(b, h))
        out(by_id ? l.id[uz(b)] : b, h, 0, t) = std::numeric_limits<float>::quiet_NaN();
    });
    std::vector<float> const before = out.data();
    std::vector<index_t> rows;
    for (index_t b = 0; b < l.n(); ++b) rows.push_back(g.integer(0, ring - 1));

    op::accumulate<> a;
    a.batch = l.batch();
    a.slots = l.slots();
    a.weights = weights.cref();
    a.weights.extent[2] = group;
    a.weight_sum = sum.cref();
    a.ring_row = ring > 1 || g.chance(0.5F) ? rows.data() : nullptr;
    a.ring_stride = group * a.weights.stride[2];
    a.fold.scale = g.uniform(0.1F, 2);
    a.fold.per_query_head = per_head;
    a.fold.clear = g.chance(0.3F);
    if (use_fresh) a.fold.fresh_slot = fresh.cref();
    a.fold.out = out.ref();
    a.fold.out_by_id = by_id;
    test::run_op(a, out);

    bool right = true;
    l.each_head([&](index_t b, index_t h) {
      index_t const id = l.id[uz(b)], row = rows[uz(b)], at = by_id ? id : b;
      for (index_t r = 0; r < (per_head ? group : 1); ++r)
        for (index_t t = 0; t < l.length(b, h); ++t) {
          double x = static_cast<double>(before[uz(out.ref().offset(at, h, r, t))]);
          if (a.fold.clear || (use_fresh && fresh(id, h) == t)) x = 0;
          double add = 0;
          for (index_t q = per_head ? r : 0; q < (per_head ? r + 1 : group); ++q)
            add += static_cast<double>(weights(id, h, row * group + q, t)) /
                   static_cast<double>(sum(id, h, q, row));
          right = right && near(static_cast<double>(out(at, h, r, t)),
                                x + static_cast<double>(a.fold.scale) * add);
        }
    });
    CHECK(right);
  });
}

TEST_CASE("a row without mass adds nothing") {
  test::layer_options o;
  o.cache.shape = {1, 2, 1, 4, 4, 11};
  o.min_length = 11;
  test::test_layer const l(o);
  padded<float, 4> weights({l.n_ids, 1, 2, 11}, 1), sum({l.n_ids, 1, 2, 1}, 0);
  padded<float, 4> out({1, 1, 1, 11}, 3);
  sum(l.id[0], 0, 1, 0) = 2;
  op::accumulate<> a;
  a.batch = l.batch();
  a.slots = l.slots();
  a.weights = weights.cref();
  a.weight_sum = sum.cref();
  a.fold.out = out.ref();
  test::run_op(a, out);
  for (index_t t = 0; t < 11; ++t) CHECK(out(0, 0, 0, t) == 3.5F);
}
