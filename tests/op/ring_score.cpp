// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Weights of query rows kept in a ring, and MorphKV's scores from them against the direct form.
#include <kvkeep/backend/cpu/accumulate.hpp>
#include <kvkeep/backend/cpu/attend.hpp>

#include "../support/test_rows.hpp"
#include "layers.hpp"

namespace {

using namespace kvkeep;
using test::generator;
using test::near;
using test::padded;
using test::test_rows;
using test::uz;

/// Runs row_weights on the backend under test, or on the CPU's where that has none: what is in the ring
/// does not depend on who filled it.
template <class Op, class... Out>
void write_rows(Op const& op, Out&... outputs) {
  using space = space_of<test::op_context>;
  if constexpr (runs<test::op_context, op::row_weights<space>>) {
    test::run_op(op, outputs...);
  } else {
    cpu::context one;
    workspace measure;
    REQUIRE(enqueue(one, op, measure) == status::ok);
    test::aligned_block const block(measure.peak());
    workspace place(block.span());
    REQUIRE(enqueue(one, op, place) == status::ok);
  }
}

/// A ring of queries and of their weights, filled by row_weights.
struct ring_run {
  padded<float, 4> q;           // [id, q_head, ring row, dim_k]
  padded<float, 4> weights;     // [id, kv_head, ring * group, slot]
  padded<float, 4> weight_sum;  // [id, kv_head, g, ring row]
  padded<float, 3> scores, direct;
  op::row_weights<> write;
  op::ring_score<> score;
  op::fused_rows<> fused;

  ring_run(test::test_layer const& l, test_rows const& rows, index_t ring, index_t recent,
           reduction fuse)
      : q({l.n_ids, l.shape().n_q_heads, ring, l.shape().dim_k}, -7),
        weights({l.n_ids, l.shape().n_kv_heads, ring * l.shape().group(), l.shape().max_slots}, -7),
        weight_sum({l.n_ids, l.shape().n_kv_heads, l.shape().group(), ring}, -7),
        scores({l.n(), l.shape().n_kv_heads, l.shape().max_slots}, -7),
        direct({l.n(), l.shape().n_kv_heads, l.shape().max_slots}, -7) {
    for (index_t b = 0; b < l.n(); ++b)
      for (index_t r = 0; r < rows.n_rows; ++r) {
        index_t const p = rows.position_of(l, b, r);
        for (index_t h = 0; h < l.shape().n_q_heads && p >= 0; ++h)
          for (index_t d = 0; d < l.shape().dim_k; ++d)
            q(l.id[uz(b)], h, p % ring, d) = rows.q(rows.source(l, b), h, r, d);
      }
    write.batch = score.batch = fused.batch = l.batch();
    write.layer = score.layer = fused.layer = l.ref();
    write.rows = fused.rows = rows.ref();
    write.weights = weights.ref();
    write.weights.extent[2] = l.shape().group();
    write.weight_sum = weight_sum.ref();
    write.ring_stride = score.ring_stride = l.shape().group() * write.weights.stride[2];
    write.ring = score.ring = ring;
    score.positions = rows.position.cref();
    score.q = q.cref();
    score.weights = write.weights;
    score.recent = fused.recent = recent;
    score.fuse = fused.fuse = fuse;
    score.out = scores.ref();
    fused.out = direct.ref();
  }
  void run() {
    write_rows(write, weights, weight_sum);
    test::run_op(score, scores);
    test::run_op(fused, direct);
  }
};

/// The cached form agrees with the direct one, and so does the victim unless scores nearly tie.
void check_scores(test::test_layer const& l, ring_run const& x, double tolerance = 1e-5) {
  bool close = true, same_victim = true;
  l.each_head([&](index_t b, index_t c) {
    index_t const n = l.length(b, c);
    index_t least_a = 0, least_b = 0;
    for (index_t t = 0; t < n; ++t) {
      double const a = static_cast<double>(x.scores(b, c, t));
      double const d = static_cast<double>(x.direct(b, c, t));
      close = close && near(a, d, tolerance, 1e-7);
      if (x.scores(b, c, t) < x.scores(b, c, least_a)) least_a = t;
      if (x.direct(b, c, t) < x.direct(b, c, least_b)) least_b = t;
    }
    if (n > 0 && least_a != least_b)
      same_victim = same_victim && near(static_cast<double>(x.direct(b, c, least_a)),
                                        static_cast<double>(x.direct(b, c, least_b)), 1e-5, 0);
  });
  CHECK(close);
  CHECK(same_victim);
}

}  // namespace

TEST_CASE("row weights over their sum are the probabilities of each row, in its ring row") {
  test::for_layers(16, 50, 5, [](test::test_layer const& l, generator& g) {
    index_t const group = l.shape().group(), n_rows = g.integer(1, 9),
                  ring = n_rows + g.integer(0, 3);
    test_rows const rows(l, g, n_rows, g.chance(0.5F), 0.5F);
    ring_run x(l, rows, ring, 3, reduction::max);
    test::random_logits const logits(g, x.write.layer.kv);
    write_rows(x.write, x.weights, x.weight_sum);
    auto const rule = test::rule_of(x.write.layer.kv);
    bool right = true, absent_kept = true;
    for (index_t b = 0; b < l.n(); ++b) {
      oracle::array const k = l.keys(b), q = test::queries_of(rows.q.ref(), rows.source(l, b));
      index_t const id = l.id[uz(b)];
      std::vector<char> written(uz(ring));
      for (index_t r = 0; r < n_rows; ++r) {
        index_t const p = rows.position_of(l, b, r);
        if (p < 0) continue;
        written[uz(p % ring)] = 1;
        for (index_t h = 0; h < l.shape().n_q_heads; ++h) {
          index_t const c = h / group;
          auto const a =
              oracle::row_probs(q, h, r, k, oracle::iota_positions(l.length(b, c)), rule);
          auto const sum = static_cast<double>(x.weight_sum(id, c, h % group, p % ring));
          for (std::size_t j = 0; j < a.size(); ++j) {
            float const w = x.weights(id, c, p % ring * group + h % group, static_cast<index_t>(j));
            right = right && near(static_cast<double>(w) / sum, a[j]);
          }
        }
      }
      for (index_t r = 0; r < ring; ++r)
        if (!written[uz(r)]) absent_kept = absent_kept && x.weight_sum(id, 0, 0, r) == -7;
    }
    CHECK(right);
    CHECK(absent_kept);
  });
}

TEST_CASE("scores from cached weights equal the direct form") {
  test::for_layers(24, 60, 5, [](test::test_layer const& l, generator& g) {
    index_t const n_rows = g.integer(1, 9);
    test_rows const rows(l, g, n_rows, false, g.chance(0.3F) ? 1 : 0);
    ring_run x(l, rows, n_rows + g.integer(0, 3), g.integer(0, 12),
               g.chance(0.5F) ? reduction::max : reduction::sum);
    x.run();
    check_scores(l, x);
  });
}

TEST_CASE("a window column that dominates by e^200 makes the head take the direct form") {
  test::for_seeds(4, [](generator& g) {
    test::layer_options o;
    o.cache.shape = {2, 4, 2, 8, 4, 40};
    o.cache.seed = g.next();
    o.min_length = 30;
    o.dense = true;
    test::test_layer l(o);
    test_rows const rows(l, g, 5, false);
    // Head 0 of each entry gets a key in its window that some row sees far above the rest.
    for (index_t b = 0; b < l.n(); ++b) {
      std::vector<float> key(8);
      for (index_t d = 0; d < 8; ++d) key[uz(d)] = 2000 * rows.q(b, 0, 2, d);
      l.cache.set_k(l.row[uz(b)], 0, l.slots_by_position(b, 0).back(), key);
    }
    for (reduction const fuse : {reduction::max, reduction::sum}) {
      ring_run x(l, rows, 6, 8, fuse);
      x.run();
      check_scores(l, x);
      bool finite = true;
      x.scores.each([&](float s) { finite = finite && !std::isnan(s); });
      CHECK(finite);
    }
  });
}

TEST_CASE("a dominating column between the extremes of float gives scores near the direct ones") {
  for (float const factor : {5.0F, 20.0F, 60.0F, 80.0F, 95.0F, 120.0F}) {
    INFO("factor " << factor);
    test::layer_options o;
    o.cache.shape = {1, 2, 1, 8, 4, 40};
    o.min_length = 30;
    test::test_layer l(o);
    generator g(3);
    test_rows rows(l, g, 3, false);
    rows.q.each([](float& q) { q = std::abs(q) + 0.1F; });
    std::vector<float> const key(8, factor);
    l.cache.set_k(0, 0, l.slots_by_position(0, 0).back(), key);
    ring_run x(l, rows, 3, 4, reduction::sum);
    x.run();
    check_scores(l, x);
  }
}

TEST_CASE("old columns whose weights vanish beside the window's are told apart") {
  for (reduction const fuse : {reduction::max, reduction::sum}) {
    test::layer_options o;
    o.cache.shape = {1, 2, 1, 1, 1, 30};
    o.min_length = 30;
    o.dense = true;
    o.shuffled = false;
    test::test_layer l(o);
    generator g(3);
    test_rows rows(l, g, 3, false);
    rows.q.each([](float& q) { q = 1; });
    // Logits of the old columns: -94, -92, ... -42; the window's are 0.
    for (index_t t = 0; t < 30; ++t)
      l.cache.set_k(0, 0, t,
                    std::vector<float>{t < 27 ? -94.0F + 2.0F * static_cast<float>(t) : 0.0F});
    ring_run x(l, rows, 3, 3, fuse);
    x.run();
    check_scores(l, x);
    for (index_t t = 1; t < 27; ++t) CHECK(x.scores(0, 0, t) > x.scores(0, 0, t - 1));
  }
}

TEST_CASE("bad arguments of the ring are refused") {
  test::layer_options o;
  o.cache.shape = {1, 1, 1, 4, 4, 5};
  test::test_layer const l(o);
  generator g(1);
  test_rows const rows(l, g, 2, false);
  ring_run x(l, rows, 2, 0, reduction::mean);
  workspace ws;
  CHECK(test::call(test::one_thread(), x.score, ws) == status::bad_argument);
  x.score.fuse = reduction::sum;
  x.score.ring = x.write.ring = 0;
  CHECK(test::call(test::one_thread(), x.score, ws) == status::bad_argument);
  cpu::context one;
  CHECK(enqueue(one, x.write, ws) == status::bad_argument);
}
