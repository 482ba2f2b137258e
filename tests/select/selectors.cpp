// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Selectors called alone: the best tokens, packed counts, whole blocks, under every kind of guard.
#include <kvkeep/backend/cpu/cpu.hpp>
#include <kvkeep/select/selector.hpp>

#include "../support/oracle_budget.hpp"
#include "../support/run_op.hpp"

using namespace kvkeep;
using namespace kvkeep::test;

namespace {

static_assert(selector<top_k, cpu::context>);
static_assert(selector<whole_blocks, cpu::context>);

struct selection {
  test_layer layer;
  padded<float, 3> scores;
  padded<index_t, 2> k;
  std::vector<index_t> frozen;
  guard_ref<> guard;
  padded<index_t, 3> slots;
  padded<index_t, 2> count;

  static layer_options options(generator& g, bool ordered) {
    layer_options o;
    o.cache.shape = random_shape(g, 48);
    o.cache.seed = g.next();
    o.shuffled = !ordered;
    return o;
  }
  selection(generator& g, bool ordered)
      : layer(options(g, ordered)),
        scores({layer.n(), layer.shape().n_kv_heads, layer.shape().max_slots}),
        k({layer.n_ids, layer.shape().n_kv_heads}),
        frozen(uz(layer.n_ids)),
        slots({layer.n(), layer.shape().n_kv_heads, layer.shape().max_slots}, -3),
        count({layer.n(), layer.shape().n_kv_heads}, -3) {
    bool const ties = g.chance(0.4F);
    scores.each([&](float& x) { x = ties ? static_cast<float>(g.integer(0, 4)) : g.normal(); });
    k.each([&](index_t& x) { x = g.integer(0, layer.shape().max_slots + 3); });
    for (index_t& f : frozen) f = g.chance(0.5F) ? 0 : g.integer(0, 6);
    guard = {g.integer(0, 4), g.integer(0, 5), frozen.data()};
  }
  template <class S>
  void run(S const& s) {
    keep_plan<> const plan{slots.ref(), count.ref()};
    workspace measure;
    REQUIRE(s.select(two_threads(), layer.batch(), layer.slots(), scores.cref(), k.cref(), guard,
                     plan, measure) == status::ok);
    aligned_block const block(std::max<std::size_t>(measure.peak(), 64));
    workspace place(block.span());
    REQUIRE(s.select(two_threads(), layer.batch(), layer.slots(), scores.cref(), k.cref(), guard,
                     plan, place) == status::ok);
    CHECK(slots.intact());
    CHECK(count.intact());
  }
  /// Scores and positions of one head in slot order.
  std::vector<double> scores_of(index_t b, index_t h) const {
    std::vector<double> s;
    for (index_t t = 0; t < layer.length(b, h); ++t)
      s.push_back(static_cast<double>(scores(b, h, t)));
    return s;
  }
  oracle::guard guard_of(index_t b) const {
    return {guard.sinks, guard.recent, frozen[uz(layer.id[uz(b)])]};
  }
  /// Positions that the plan keeps, ascending; its slots must ascend.
  oracle::kept_set kept(index_t b, index_t h) const {
    oracle::kept_set p;
    for (index_t i = 0; i < count(b, h); ++i) {
      if (i > 0) REQUIRE(slots(b, h, i) > slots(b, h, i - 1));
      p.push_back(layer.position(b, h, slots(b, h, i)));
    }
    std::sort(p.begin(), p.end());
    return p;
  }
};

}  // namespace

TEST_CASE("top_k keeps the protected tokens and the best of the others") {
  for_seeds(120, [](generator& g) {
    selection s(g, false);
    s.run(top_k{});
    s.layer.each_head([&](index_t b, index_t h) {
      REQUIRE(s.kept(b, h) == oracle::select(s.scores_of(b, h), s.layer.positions_of(b, h),
                                             s.k(s.layer.id[uz(b)], h), s.guard_of(b)));
    });
  });
}

TEST_CASE("whole_blocks keeps blocks, by sum and by maximum") {
  for_seeds(120, [](generator& g) {
    selection s(g, true);
    index_t const block = g.integer(1, 8);
    bool const maximum = g.chance(0.5F);
    s.run(whole_blocks{block, maximum ? reduction::max : reduction::sum});
    s.layer.each_head([&](index_t b, index_t h) {
      REQUIRE(s.kept(b, h) == oracle::select_blocks(s.scores_of(b, h), s.layer.positions_of(b, h),
                                                    block, s.k(s.layer.id[uz(b)], h), s.guard_of(b),
                                                    maximum));
    });
  });
}

TEST_CASE("selectors say what they do, and refuse what they cannot") {
  CHECK(top_k{}.traits().evicts_one);
  CHECK(top_k{}.traits().moves_tokens);
  CHECK(std::string(top_k{4}.traits().name) == "packed_blocks");
  CHECK_FALSE(top_k{4}.traits().evicts_one);
  CHECK_FALSE(whole_blocks{}.traits().moves_tokens);
  CHECK(top_k{4}.key() != top_k{8}.key());
  CHECK(whole_blocks{4}.key() != top_k{4}.key());
  CHECK(whole_blocks{4}.key() != (whole_blocks{4, reduction::max}).key());
  CHECK_THROWS_AS(top_k{0}.check(), std::invalid_argument);
  CHECK_THROWS_AS(whole_blocks{0}.check(), std::invalid_argument);
  CHECK_THROWS_AS((whole_blocks{4, reduction::mean}).check(), std::invalid_argument);
}
