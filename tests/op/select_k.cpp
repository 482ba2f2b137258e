// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Selection of slots, whole blocks and victims against the naive order.
#include <kvkeep/backend/cpu/select_k.hpp>

#include "../support/run_op.hpp"

namespace {

using namespace kvkeep;
using test::generator;
using test::padded;
using test::uz;

constexpr float inf = std::numeric_limits<float>::infinity();
constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();

/// A score of one of several kinds: distinct, many ties, signed zeros, special values.
float random_score(generator& g, int kind) {
  switch (kind) {
    case 0:
      return g.normal();
    case 1:
      return static_cast<float>(g.integer(0, 3));
    case 2:
      return g.chance(0.5F) ? 0.0F : -0.0F;
    case 3:
      return g.one_of(
          std::array<float, 8>{not_a_number, -not_a_number, inf, -inf, 0.0F, -0.0F, 1.0F, 1e-45F});
    case 4:
      return g.uniform(-1e-38F, 1e-38F);
    default:
      return -1.5F;
  }
}

/// Lengths, positions, scores, guard and results of one call.
struct selection {
  test::test_layer layer;
  padded<float, 3> scores;
  padded<index_t, 2> k;
  std::vector<index_t> frozen;
  guard_ref<> guard;
  padded<index_t, 3> slots;
  padded<index_t, 2> count;
  padded<index_t, 2> victim;

  selection(generator& g, index_t max_slots, test::layer_options o = {})
      : layer(options(g, max_slots, o)),
        scores({layer.n(), layer.shape().n_kv_heads, max_slots}),
        k({layer.n_ids, layer.shape().n_kv_heads}, 0),
        guard{},
        slots({layer.n(), layer.shape().n_kv_heads, max_slots}, -7),
        count({layer.n(), layer.shape().n_kv_heads}, -7),
        victim({layer.n_ids, layer.shape().n_kv_heads}, -7) {
    int const kind = g.integer(0, 5);
    scores.each([&](float& x) { x = random_score(g, kind); });
    k.each([&](index_t& x) { x = g.chance(0.1F) ? -1 : g.integer(0, max_slots + 3); });
    guard.sinks = g.chance(0.5F) ? 0 : g.integer(0, max_slots / 2);
    guard.recent = g.chance(0.5F) ? 0 : g.integer(0, max_slots / 2);
    for (index_t i = 0; i < layer.n_ids; ++i) frozen.push_back(g.integer(0, max_slots));
    if (g.chance(0.3F)) guard.frozen = frozen.data();
  }

  static test::layer_options options(generator& g, index_t max_slots, test::layer_options o) {
    o.cache.shape = {g.integer(1, 3), 3, 3, 1, 1, max_slots};
    o.cache.seed = g.next();
    o.n_batch = g.integer(1, o.cache.shape.n_seq);
    return o;
  }
  oracle::guard guard_of(index_t b) const {
    return {guard.sinks, guard.recent, guard.frozen ? frozen[uz(layer.id[uz(b)])] : 0};
  }
  std::vector<double> scores_of(index_t b, index_t h) const {
    std::vector<double> s;
    for (index_t t = 0; t < layer.length(b, h); ++t)
      s.push_back(static_cast<double>(scores(b, h, t)));
    return s;
  }
  /// The plan's slots are ascending; returned are their positions, ascending.
  std::vector<index_t> plan_positions(index_t b, index_t h) const {
    std::vector<index_t> p;
    for (index_t i = 0; i < count(b, h); ++i) {
      if (i > 0) REQUIRE(slots(b, h, i) > slots(b, h, i - 1));
      p.push_back(layer.position(b, h, slots(b, h, i)));
    }
    std::sort(p.begin(), p.end());
    return p;
  }
  template <class Op>
  Op make() const {
    Op o;
    o.batch = layer.batch();
    o.slots = layer.slots();
    o.scores = scores.cref();
    o.guard = guard;
    return o;
  }
  keep_plan<> plan() const { return {slots.ref(), count.ref()}; }
};

/// Whole blocks by definition. Positions ascend inside a block, blocks lie in any order.
std::vector<index_t> blocks_by_hand(selection const& s, index_t b, index_t h, index_t block,
                                    bool use_maximum) {
  struct one {
    double score;
    index_t first, slot;
    bool safe;
  };
  std::vector<one> blocks;
  auto const positions = s.layer.positions_of(b, h);
  index_t const n = s.layer.length(b, h), whole = n / block;
  index_t safe_blocks = 0;
  std::vector<index_t> kept;
  for (index_t i = 0; i < whole; ++i) {
    one x{0, positions[uz(i * block)], i * block, false};
    float sum = 0, best = -inf;
    for (index_t t = i * block; t < (i + 1) * block; ++t) {
      sum += s.scores(b, h, t);
      if (s.scores(b, h, t) > best) best = s.scores(b, h, t);
      x.safe = x.safe || oracle::is_protected(s.guard_of(b), positions, positions[uz(t)]);
    }
    x.score = static_cast<double>(use_maximum ? best : sum);
    safe_blocks += x.safe;
    blocks.push_back(x);
  }
  std::sort(blocks.begin(), blocks.end(), [](one const& x, one const& y) {
    return oracle::ranks_before(x.score, x.first, y.score, y.first);
  });
  index_t left = std::max(s.k(s.layer.id[uz(b)], h), 0) / block - safe_blocks;
  for (one const& x : blocks)
    if (x.safe || left-- > 0)
      for (index_t t = x.slot; t < x.slot + block; ++t) kept.push_back(t);
  for (index_t t = whole * block; t < n; ++t) kept.push_back(t);
  std::sort(kept.begin(), kept.end());
  return kept;
}

}  // namespace

TEST_CASE("select_k keeps what the naive order keeps, guard included") {
  test::for_seeds(300, [](generator& g) {
    selection s(g, g.integer(1, 60));
    auto o = s.make<op::select_k<>>();
    o.k = s.k.cref();
    o.out = s.plan();
    test::run_op(o, s.slots, s.count);
    s.layer.each_head([&](index_t b, index_t h) {
      auto const kept = oracle::select(s.scores_of(b, h), s.layer.positions_of(b, h),
                                       s.k(s.layer.id[uz(b)], h), s.guard_of(b));
      REQUIRE(s.plan_positions(b, h) == kept);
    });
  });
}

namespace {

void check_long_rows(generator& g, index_t slots) {
  selection s(g, slots);
  auto o = s.make<op::select_k<>>();
  o.k = s.k.cref();
  o.out = s.plan();
  REQUIRE(test::run_exact(test::two_threads(), o) == status::ok);
  s.layer.each_head([&](index_t b, index_t h) {
    // The oracle's guard is quadratic: the guard as two thresholds here.
    auto const positions = s.layer.positions_of(b, h);
    auto sorted = positions;
    std::sort(sorted.begin(), sorted.end());
    auto const n = static_cast<index_t>(sorted.size());
    auto const scores = s.scores_of(b, h);
    auto const guard = s.guard_of(b);
    std::vector<index_t> kept, open;
    std::vector<double> open_scores;
    for (std::size_t i = 0; i < positions.size(); ++i) {
      index_t const p = positions[i];
      bool const safe =
          (guard.sinks > 0 && (guard.sinks >= n || p < sorted[uz(guard.sinks)])) ||
          (guard.recent > 0 && (guard.recent >= n || p >= sorted[uz(n - guard.recent)])) ||
          p < guard.frozen;
      (safe ? kept : open).push_back(p);
      if (!safe) open_scores.push_back(scores[i]);
    }
    index_t const left = s.k(s.layer.id[uz(b)], h) - oracle::count(kept);
    for (index_t p : oracle::top_positions(open_scores, open, left)) kept.push_back(p);
    std::sort(kept.begin(), kept.end());
    REQUIRE(s.plan_positions(b, h) == kept);
  });
}

}  // namespace

TEST_CASE("select_k on long rows") {
  test::for_seeds(24, [](generator& g) { check_long_rows(g, g.integer(900, 5000)); });
}

TEST_CASE("select_k on rows whose keys a block cannot hold") {
  test::for_seeds(2, [](generator& g) { check_long_rows(g, g.integer(57000, 60000)); });
}

TEST_CASE("ties go to the lower position, whatever the slot; zeros are equal and NaN loses") {
  generator g(1);
  test::layer_options o;
  o.cache.shape = {1, 1, 1, 1, 1, 8};
  o.min_length = 8;
  test::test_layer l(o);
  index_t const id = l.id[0];
  std::array<index_t, 8> const positions{70, 10, 60, 20, 50, 30, 40, 0};
  std::array<float, 8> const scores{0.0F,  -0.0F, 0.0F, not_a_number,
                                    -0.0F, -inf,  5.0F, not_a_number};
  padded<float, 3> s({1, 1, 8});
  for (index_t t = 0; t < 8; ++t)
    l.positions(id, 0, t) = positions[uz(t)], s(0, 0, t) = scores[uz(t)];
  padded<index_t, 2> k({l.n_ids, 1}), count({1, 1}), victim({l.n_ids, 1}, -7);
  padded<index_t, 3> slots({1, 1, 8}, -7);
  std::vector<std::vector<index_t>> const kept_by_k{{},
                                                    {6},
                                                    {1, 6},
                                                    {1, 4, 6},
                                                    {1, 2, 4, 6},
                                                    {0, 1, 2, 4, 6},
                                                    {0, 1, 2, 4, 5, 6},
                                                    {0, 1, 2, 4, 5, 6, 7},
                                                    {0, 1, 2, 3, 4, 5, 6, 7}};
  op::select_k<> sel;
  sel.batch = l.batch();
  sel.slots = l.slots();
  sel.scores = s.cref();
  sel.k = k.cref();
  sel.out = {slots.ref(), count.ref()};
  for (std::size_t n = 0; n <= 8; ++n) {
    k(id, 0) = static_cast<index_t>(n);
    test::run_op(sel, slots, count);
    REQUIRE(count(0, 0) == static_cast<index_t>(n));
    std::vector<index_t> const kept(slots.data().begin(), slots.data().begin() + count(0, 0));
    CHECK(kept == kept_by_k[n]);
  }
  op::evict_one<> e;
  e.batch = l.batch();
  e.slots = l.slots();
  e.scores = s.cref();
  e.victim = victim.ref();
  test::run_op(e, victim);
  CHECK(victim(id, 0) == 3);
}

TEST_CASE("a plan without room for what is kept is refused") {
  generator g(3);
  selection s(g, 20);
  auto o = s.make<op::select_k<>>();
  o.guard = {};
  s.k.each([](index_t& k) { k = 20; });
  s.layer.lengths(s.layer.id[0], 1) = 6;
  o.k = s.k.cref();
  o.out = s.plan();
  o.out.slots.extent[2] = 5;
  CHECK(test::run_exact(test::one_thread(), o) == status::bad_argument);
  for (index_t t = 5; t < 20; ++t) CHECK(s.slots(0, 1, t) == -7);
}

TEST_CASE("evict_one names the slot that ranks last among the open ones") {
  test::for_seeds(300, [](generator& g) {
    selection s(g, g.integer(1, 60));
    auto o = s.make<op::evict_one<>>();
    o.victim = s.victim.ref();
    test::run_op(o, s.victim);
    s.layer.each_head([&](index_t b, index_t h) {
      auto const positions = s.layer.positions_of(b, h);
      auto const scores = s.scores_of(b, h);
      index_t worst = -1;
      for (index_t t = 0; t < s.layer.length(b, h); ++t) {
        if (oracle::is_protected(s.guard_of(b), positions, positions[uz(t)])) continue;
        if (worst < 0 || oracle::ranks_before(scores[uz(worst)], positions[uz(worst)],
                                              scores[uz(t)], positions[uz(t)]))
          worst = t;
      }
      REQUIRE(s.victim(s.layer.id[uz(b)], h) == worst);
    });
    // Rows of ids that are not in the batch stay.
    for (index_t i = 0; i < s.layer.n_ids; ++i)
      if (std::find(s.layer.id.begin(), s.layer.id.end(), i) == s.layer.id.end())
        CHECK(s.victim(i, 0) == -7);
  });
}

TEST_CASE("evicting the victim equals keeping all but one") {
  test::for_seeds(100, [](generator& g) {
    selection s(g, g.integer(2, 40));
    s.layer.each_head(
        [&](index_t b, index_t h) { s.k(s.layer.id[uz(b)], h) = s.layer.length(b, h) - 1; });
    auto keep = s.make<op::select_k<>>();
    keep.k = s.k.cref();
    keep.out = s.plan();
    auto evict = s.make<op::evict_one<>>();
    evict.victim = s.victim.ref();
    REQUIRE(test::run_exact(test::one_thread(), keep) == status::ok);
    REQUIRE(test::run_exact(test::one_thread(), evict) == status::ok);
    s.layer.each_head([&](index_t b, index_t h) {
      std::vector<index_t> all = oracle::iota_positions(s.layer.length(b, h));
      index_t const victim = s.victim(s.layer.id[uz(b)], h);
      if (victim >= 0) all.erase(all.begin() + victim);
      std::vector<index_t> kept;
      for (index_t i = 0; i < s.count(b, h); ++i) kept.push_back(s.slots(b, h, i));
      REQUIRE(kept == all);
    });
  });
}

TEST_CASE("select_blocks keeps whole blocks, the open tail and protected blocks") {
  test::for_seeds(300, [](generator& g) {
    index_t const block = g.integer(1, 9);
    selection s(g, g.integer(1, 60));
    // Blocks in any order, ascending inside, as a pool after whole-block eviction looks.
    s.layer.each_head([&](index_t b, index_t h) {
      index_t const id = s.layer.id[uz(b)], n = s.layer.length(b, h);
      for (index_t first = 0; first < n; first += block) {
        index_t* const p = s.layer.positions.ref().at(id, h, first);
        std::sort(p, p + std::min(block, n - first));
      }
    });
    bool const use_maximum = g.chance(0.5F);
    auto o = s.make<op::select_blocks<>>();
    o.k = s.k.cref();
    o.block = block;
    o.how = use_maximum ? reduction::max : reduction::sum;
    o.out = s.plan();
    test::run_op(o, s.slots, s.count);
    s.layer.each_head([&](index_t b, index_t h) {
      std::vector<index_t> kept;
      for (index_t i = 0; i < s.count(b, h); ++i) kept.push_back(s.slots(b, h, i));
      REQUIRE(kept == blocks_by_hand(s, b, h, block, use_maximum));
    });
  });
}

TEST_CASE("select_blocks refuses a block of no slots and the mean") {
  generator g(3);
  selection s(g, 8);
  auto o = s.make<op::select_blocks<>>();
  o.k = s.k.cref();
  o.out = s.plan();
  workspace ws;
  o.block = 0;
  CHECK(test::call(test::one_thread(), o, ws) == status::bad_argument);
  o.block = 4;
  o.how = reduction::mean;
  CHECK(test::call(test::one_thread(), o, ws) == status::bad_argument);
}
