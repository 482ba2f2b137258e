// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Scorers called alone on a plain layer: what they state, the order of positions, norms, own
// queries.
#include <kvkeep/kvkeep.hpp>

#include "../support/oracle_morph.hpp"
#include "../support/run_op.hpp"

using namespace kvkeep;
using namespace kvkeep::test;

namespace {

static_assert(scorer<window_score, cpu::context>);
static_assert(scorer<heavy_hitter_score, cpu::context>);
static_assert(scorer<last_row_score, cpu::context>);
static_assert(scorer<recent_fused_score, cpu::context>);
static_assert(scorer<key_diff_score, cpu::context>);
static_assert(scorer<lag_score, cpu::context>);
static_assert(scorer<engine_score, cpu::context>);
static_assert(scorer<keep_all_score, cpu::context>);
static_assert(scorer<slot_score<key_norm_fn>, cpu::context>);
static_assert(scorer<slot_score<position_fn>, cpu::context>);

layer_options options(generator& g, int rows = 1) {
  layer_options o;
  o.cache.layout = g.one_of(all_layouts());
  o.cache.type = g.one_of(all_dtypes());
  o.cache.shape = random_shape(g, 40);
  o.cache.seed = g.next();
  o.state_rows = rows;
  o.min_length = 1;
  return o;
}

/// Scores of every slot in use, in exactly the memory that was measured.
template <class S>
void score_layer(S const& s, score_input<> const& in, padded<float, 3>& out) {
  workspace measure;
  REQUIRE(s.score(one_thread(), in, out.ref(), measure) == status::ok);
  aligned_block const block(std::max<std::size_t>(measure.peak(), 64));
  workspace place(block.span());
  REQUIRE(s.score(one_thread(), in, out.ref(), place) == status::ok);
  CHECK(place.peak() == measure.peak());
  CHECK(out.intact());
}

score_input<> input_of(test_layer const& layer, std::vector<index_t> const& seen) {
  score_input<> in;
  in.batch = layer.batch();
  in.layer = layer.ref();
  in.rows = layer.slots().rows;
  in.seen = seen.data();
  return in;
}

}  // namespace

TEST_CASE("positions become floats in their order, up to the largest") {
  position_fn const fn;
  index_t const largest = 2147483647 - (1 << 24);
  slot_values a{}, b{};
  for (index_t const p :
       {0, 1, 2, 1 << 23, (1 << 24) - 1, 1 << 24, (1 << 24) + 1, 1 << 30, largest - 1}) {
    a.position = p;
    b.position = p + 1;
    CHECK(fn(a) < fn(b));
    CHECK(std::isnormal(fn(a)));
  }
}

TEST_CASE("key norms equal the oracle for every layout and type") {
  for_seeds(40, [](generator& g) {
    layer_options const o = options(g);
    test_layer const layer(o);
    std::vector<index_t> const seen(uz(layer.n_ids), 1000);
    padded<float, 3> out({layer.n(), o.cache.shape.n_kv_heads, o.cache.shape.max_slots}, -7);
    score_layer(slot_score<key_norm_fn>{}, input_of(layer, seen), out);
    layer.each_head([&](index_t b, index_t h) {
      auto const keys = layer.keys(b);
      for (index_t t = 0; t < layer.length(b, h); ++t)
        CHECK(near(static_cast<double>(out(b, h, t)), -oracle::norm(keys.row(h, t))));
      for (index_t t = layer.length(b, h); t < o.cache.shape.max_slots; ++t)
        CHECK(out(b, h, t) == -7);
    });
  });
}

TEST_CASE("KeyDiff equals the oracle whatever the order of the slots") {
  for_seeds(40, [](generator& g) {
    layer_options o = options(g);
    // In one dimension the mean direction may vanish, and a rounding error decides its sign.
    o.cache.shape.dim_k = std::max(o.cache.shape.dim_k, 4);
    test_layer const layer(o);
    std::vector<index_t> const seen(uz(layer.n_ids), 1000);
    padded<float, 3> out({layer.n(), o.cache.shape.n_kv_heads, o.cache.shape.max_slots});
    score_layer(key_diff_score{}, input_of(layer, seen), out);
    layer.each_head([&](index_t b, index_t h) {
      auto const want =
          oracle::keydiff_scores(layer.keys(b), h, oracle::iota_positions(layer.length(b, h)));
      for (index_t t = 0; t < layer.length(b, h); ++t)
        CHECK(near(static_cast<double>(out(b, h, t)), want[uz(t)], 1e-4, 2e-6));
    });
  });
}

TEST_CASE("scorers state their evidence, memory and abilities") {
  cache_shape const s{1, 8, 2, 16, 16, 64};
  CHECK(window_score{}.traits().prompt == evidence::window_queries);
  CHECK_FALSE(window_score{}.traits().at_decode);
  CHECK(window_score{}.state(s).query_ring == 32);
  heavy_hitter_score h;
  CHECK(h.traits().prompt == evidence::all_queries);
  CHECK_FALSE(h.traits().prefix_safe);
  CHECK(h.state(s).slot_rows == 1);
  h.group = reduction::max;
  CHECK(h.state(s).slot_rows == 4);
  CHECK(last_row_score{}.traits().whole_layer);
  CHECK(last_row_score{}.state(s).slot_rows == 1);
  CHECK_FALSE(last_row_score{}.state(s).ring_at_decode);
  recent_fused_score m;
  m.window = 8;
  CHECK(m.row_count() == 7);
  CHECK(m.state(s).weight_ring == 7);
  CHECK(m.state(s).ring_at_decode);
  // More rows than the bounds' rounding allows: the default form, and a wish that cannot be met.
  CHECK(make_morphkv({.window = 32}).score.evaluation == morph_rows::lazy);
  CHECK(make_morphkv({.window = 202}).score.evaluation == morph_rows::cached);
  recent_fused_score wide = m;
  wide.window = 202;
  wide.evaluation = morph_rows::lazy;
  CHECK_THROWS_AS(wide.check(s), std::invalid_argument);
  m.evaluation = morph_rows::direct;
  CHECK(m.state(s).weight_ring == 0);
  m.n_rows = 8;
  CHECK(m.row_count() == 8);
  CHECK(m.state(s).query_ring == 8);
  CHECK_FALSE(engine_score{}.traits().draft_safe);
  CHECK_FALSE(lag_score{}.traits().prefix_safe);
  CHECK(lag_score{}.least_tokens() == 4 + 2 * 128);
  CHECK(slot_score<position_fn>{}.traits().prompt == evidence::none);
  CHECK_FALSE(slot_score<position_fn>{}.traits().comparable);
  CHECK(slot_score<key_norm_fn>{}.traits().prompt == evidence::keys);
  CHECK(slot_score<key_norm_fn>{}.state(s).slot_rows == 1);
}

TEST_CASE("the last queries come oldest first, absent ones marked, from a ring that wraps") {
  for_seeds(30, [](generator& g) {
    layer_options const o = options(g);
    test_layer const layer(o);
    auto const& s = o.cache.shape;
    index_t const ring = g.integer(1, 7), n = g.integer(1, ring);
    padded<float, 4> ring_q({layer.n_ids, s.n_q_heads, ring, s.dim_k}, 0, 0);
    ring_q.each([&](float& x) { x = g.normal(); });
    std::vector<index_t> seen, from;
    for (index_t i = 0; i < layer.n_ids; ++i) {
      seen.push_back(g.integer(0, 30));
      from.push_back(g.integer(0, seen.back()));
    }
    score_input<> in = input_of(layer, seen);
    in.ring_q = ring_q.cref();
    in.ring_from = from.data();
    in.query_ring = ring;
    workspace measure;
    query_rows<> rows;
    REQUIRE(last_queries(one_thread(), in, n, rows, measure) == status::ok);
    aligned_block const block(measure.peak());
    workspace place(block.span());
    REQUIRE(last_queries(one_thread(), in, n, rows, place) == status::ok);
    for (index_t b = 0; b < layer.n(); ++b)
      for (index_t r = 0; r < n; ++r) {
        index_t const id = layer.id[uz(b)], p = seen[uz(id)] - n + r;
        bool const present = p >= 0 && p >= from[uz(id)];
        REQUIRE(rows.position(b, r) == (present ? p : -1));
        for (index_t h = 0; h < s.n_q_heads && present; ++h)
          for (index_t d = 0; d < s.dim_k; ++d)
            REQUIRE(rows.q(b, h, r, d) == ring_q(id, h, p % ring, d));
      }
  });
}
