// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Attention weights of query rows against those of decode attention, row by row.
#include <kvkeep/backend/cpu/attend.hpp>

#include "../support/run_op.hpp"
#include "../support/test_rows.hpp"

namespace {

using namespace kvkeep;
using test::generator;
using test::padded;
using test::test_rows;
using test::uz;

/// One query per entry and query head: row r of the rows, or zeros where it is absent.
padded<float, 3> queries_of_row(test::test_layer const& l, test_rows const& rows, index_t r) {
  padded<float, 3> q({l.n(), l.shape().n_q_heads, l.shape().dim_k}, 0, 0);
  for (index_t b = 0; b < l.n(); ++b)
    for (index_t h = 0; h < l.shape().n_q_heads; ++h)
      for (index_t d = 0; d < l.shape().dim_k; ++d) q(b, h, d) = rows.q(rows.source(l, b), h, r, d);
  return q;
}

}  // namespace

TEST_CASE("weights of query rows have the bits of attention's weights, each in its ring row") {
  test::for_seeds(16, [](generator& g) {
    test::layer_options o;
    bool const pieces = g.chance(0.4F);
    o.cache.shape = test::random_shape(g, 60, 9);
    if (pieces) o.cache.shape.dim_k = 64, o.cache.shape.max_slots = 280;
    o.n_batch = g.integer(1, o.cache.shape.n_seq);
    o.cache.seed = g.next();
    o.cache.layout = g.one_of(test::all_layouts());
    o.cache.type = g.one_of(test::readable_dtypes());
    o.cache.aligned = pieces;
    INFO(o.cache.layout << " " << o.cache.type);
    test::test_layer const l(o);
    index_t const group = l.shape().group(), heads = l.shape().n_kv_heads;
    index_t const n_rows = g.integer(1, 5), ring = n_rows + g.integer(0, 3);
    test_rows const rows(l, g, n_rows, g.chance(0.5F), 0.5F);
    std::vector<float> const sinks = g.normals(uz(l.shape().n_q_heads), 2);
    auto const fresh = [&] {
      return padded<float, 4>({l.n_ids, heads, ring * group, l.shape().max_slots}, -7);
    };
    padded<float, 4> weights = fresh(), expected = fresh();
    padded<float, 4> sums({l.n_ids, heads, group, ring}, -7);
    padded<float, 4> expected_sums({l.n_ids, heads, group, ring}, -7);

    op::row_weights<> rows_op;
    rows_op.batch = l.batch();
    rows_op.layer = l.ref();
    rows_op.rows = rows.ref();
    rows_op.weights = weights.ref();
    rows_op.weights.extent[2] = group;
    rows_op.weight_sum = sums.ref();
    rows_op.ring = ring;
    rows_op.ring_stride = group * rows_op.weights.stride[2];
    if (g.chance(0.3F)) rows_op.layer.kv.softcap = g.uniform(0.5F, 5);
    if (g.chance(0.3F)) rows_op.layer.kv.sink_logits = sinks.data();
    test::run_op(rows_op, weights, sums);

    for (index_t r = 0; r < n_rows; ++r)
      for (index_t b = 0; b < l.n(); ++b) {
        index_t const position = rows.position_of(l, b, r);
        if (position < 0) continue;
        padded<float, 3> const q = queries_of_row(l, rows, r);
        std::vector<index_t> const ring_row{position % ring}, row{l.row[uz(b)]}, id{l.id[uz(b)]};
        op::attend<> one;
        one.batch = {1, row.data(), id.data()};
        one.layer = rows_op.layer;
        one.q = q.cref();
        one.q.data = &q(b, 0, 0);
        one.q.extent[0] = 1;
        one.weights = expected.ref();
        one.weights.extent[2] = group;
        one.weight_sum = expected_sums.ref();
        one.weight_row = ring_row.data();
        one.ring_stride = rows_op.ring_stride;
        REQUIRE(test::run_exact(test::one_thread(), one) == status::ok);
      }
    CHECK(test::same_bits(weights.data(), expected.data()));
    CHECK(test::same_bits(sums.data(), expected_sums.data()));
    CHECK(l.cache.canaries_intact());
  });
}
