// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Joint top-k counts over maps and heads against the naive ranking.
#include <kvkeep/backend/cpu/layer_counts.hpp>

#include "../support/oracle_budget.hpp"
#include "../support/run_op.hpp"

namespace {

using namespace kvkeep;
using test::generator;
using test::padded;
using test::uz;

struct counts_run {
  std::vector<index_t> rows;
  padded<float, 4> scores;  // [map, entry, kv_head, slot]
  padded<index_t, 2> candidates;
  padded<index_t, 3> out;
  op::layer_counts<> op;

  counts_run(generator& g, index_t maps, index_t entries, index_t heads, index_t slots, int kind)
      : scores({maps, entries, heads, slots}),
        candidates({entries, heads}),
        out({maps, entries, heads}, -7) {
    float const inf = std::numeric_limits<float>::infinity();
    std::array<float, 6> const special{inf,  -inf,  std::numeric_limits<float>::quiet_NaN(),
                                       0.0F, -0.0F, 2.0F};
    scores.each([&](float& x) {
      x = kind == 0   ? g.uniform()
          : kind == 1 ? static_cast<float>(g.integer(0, 3))
                      : g.one_of(special);
    });
    candidates.each([&](index_t& x) { x = g.chance(0.1F) ? 0 : g.integer(0, slots); });
    op.batch.n = entries;
    op.n_maps = maps;
    op.scores = scores.cref();
    op.candidates = candidates.cref();
    op.out = out.ref();
  }
  index_t heads() const { return candidates.ref().extent[1]; }

  /// Scores that compete, per map and head of an entry.
  std::vector<std::vector<double>> parts(index_t entry) const {
    std::vector<std::vector<double>> p;
    for (index_t m = 0; m < op.n_maps; ++m)
      for (index_t h = 0; h < heads(); ++h) {
        p.emplace_back();
        for (index_t t = op.skip; t < candidates(entry, h); ++t)
          p.back().push_back(static_cast<double>(scores(m, entry, h, t)));
      }
    return p;
  }
  std::vector<index_t> result(index_t entry) const {
    std::vector<index_t> r;
    for (index_t m = 0; m < op.n_maps; ++m)
      for (index_t h = 0; h < heads(); ++h) r.push_back(out(m, entry, h));
    return r;
  }
  std::int64_t total() const { return std::int64_t{op.best_per_head} * op.n_maps * heads(); }
};

}  // namespace

TEST_CASE("counts of the joint best, ties by map, head and position") {
  test::for_seeds(150, [](generator& g) {
    counts_run c(g, g.integer(1, 5), g.integer(1, 3), g.integer(1, 4), g.integer(1, 40),
                 g.integer(0, 2));
    c.op.skip = g.chance(0.5F) ? 0 : g.integer(0, 5);
    c.op.best_per_head = g.integer(0, 45);
    test::run_op(c.op, c.out);
    for (index_t e = 0; e < c.op.batch.n; ++e)
      REQUIRE(c.result(e) == oracle::joint_counts(c.parts(e), c.total()));
  });
}

TEST_CASE("each head's best safe candidates count first") {
  test::for_seeds(150, [](generator& g) {
    counts_run c(g, g.integer(1, 3), g.integer(1, 2), g.integer(1, 4), g.integer(1, 40),
                 g.integer(0, 1));
    c.op.skip = g.chance(0.5F) ? 0 : g.integer(0, 5);
    c.op.best_per_head = g.integer(0, 45);
    c.op.safe = g.integer(0, c.op.best_per_head);
    test::run_op(c.op, c.out);
    for (index_t e = 0; e < c.op.batch.n; ++e) {
      auto parts = c.parts(e);
      for (auto& part : parts) {
        auto const n = oracle::count(part);
        for (index_t i : oracle::top_positions(part, oracle::iota_positions(n), c.op.safe))
          part[uz(i)] = oracle::infinity;
      }
      REQUIRE(c.result(e) == oracle::joint_counts(parts, c.total()));
    }
  });
}

TEST_CASE("counts over long rows, some of them short or empty") {
  test::for_seeds(4, [](generator& g) {
    counts_run c(g, 2, 2, 2, 40000, g.integer(0, 2));
    c.candidates.each([&](index_t& x) { x = g.chance(0.3F) ? g.integer(0, 20000) : 40000; });
    c.op.skip = g.integer(0, 5);
    c.op.best_per_head = g.integer(1, 40000);
    test::run_op(c.op, c.out);
    for (index_t e = 0; e < c.op.batch.n; ++e)
      REQUIRE(c.result(e) == oracle::joint_counts(c.parts(e), c.total()));
  });
}

TEST_CASE("normalised counts scale a head by the share of its best") {
  test::for_seeds(100, [](generator& g) {
    counts_run c(g, 1, g.integer(1, 3), g.integer(1, 5), g.integer(2, 60), 0);
    // Whole sixteenths and equal sums: the shares are exact in float and in double.
    index_t const slots = c.scores.ref().extent[3];
    c.scores.each([&](float& x) { x = static_cast<float>(g.integer(1, 64)) / 16; });
    c.candidates.each([&](index_t& x) { x = slots; });
    c.op.best_per_head = g.integer(1, slots);
    c.op.normalize = true;
    test::run_op(c.op, c.out);
    for (index_t e = 0; e < c.op.batch.n; ++e) {
      oracle::array s({c.heads(), slots});
      for (index_t h = 0; h < c.heads(); ++h)
        for (index_t t = 0; t < slots; ++t) s.at(h, t) = static_cast<double>(c.scores(0, e, h, t));
      auto const expected = oracle::ada_counts(s, c.op.best_per_head, true);
      auto const result = c.result(e);
      // Products that are equal in double may differ in float: one entry per pair of heads at most.
      index_t off = 0;
      for (std::size_t h = 0; h < expected.size(); ++h) off += std::abs(expected[h] - result[h]);
      CHECK(off <= 2);
      CHECK(oracle::total(result) == oracle::total(expected));
    }
  });
}

TEST_CASE("a head without scores, or with zeros only, takes part in the normalised counts") {
  generator g(1);
  counts_run c(g, 1, 1, 3, 8, 0);
  c.candidates.each([](index_t& x) { x = 8; });
  c.candidates(0, 0) = 0;
  for (index_t t = 0; t < 8; ++t) c.scores(0, 0, 1, t) = 0;
  c.op.best_per_head = 2;
  c.op.normalize = true;
  test::run_op(c.op, c.out);
  CHECK(c.result(0) == std::vector<index_t>{0, 0, 6});
}

TEST_CASE("several maps cannot be normalised") {
  generator g(1);
  counts_run c(g, 2, 1, 3, 8, 0);
  c.op.normalize = true;
  workspace ws;
  CHECK(test::call(test::one_thread(), c.op, ws) == status::bad_argument);
}
