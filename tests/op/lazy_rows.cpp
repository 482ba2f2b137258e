// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// MorphKV's lazy victims against the direct form, step by step: one token takes the victim's slot each time.
#include <kvkeep/backend/cpu/lazy_victim.hpp>

#include "../support/run_op.hpp"

namespace {

using namespace kvkeep;
using test::generator;
using test::padded;
using test::uz;

/// What surrounds the two ops runs on the CPU, whichever backend they run on.
template <class Op>
void on_cpu(Op const& o) {
  cpu::context ctx{};
  workspace measure;
  REQUIRE(enqueue(ctx, o, measure) == status::ok);
  test::aligned_block const block(measure.peak());
  workspace place(block.span());
  REQUIRE(enqueue(ctx, o, place) == status::ok);
}

/// A full cache of one layer and everything that the two ops need.
struct lazy_steps {
  test::test_layer& l;
  generator& g;
  lazy_shape shape;
  index_t newest;  ///< position, the same in all heads
  padded<float, 4> ring_q, rows, weights, weight_max;
  padded<float, 3> head, q, scores;
  padded<index_t, 2> victim;
  std::vector<index_t> seen, from;
  op::lazy_enter<> enter;
  op::lazy_victim<> leave;

  lazy_steps(test::test_layer& layer, generator& random, lazy_shape const& s, reduction fuse)
      : l(layer),
        g(random),
        shape(s),
        newest(l.shape().max_slots - 1),
        ring_q({l.n_ids, l.shape().n_q_heads, s.n_rows + 1, l.shape().dim_k}),
        // Kernels write whole vectors of words. Nobody clears those that have not been written.
        rows({l.n_ids, l.shape().n_kv_heads, s.slot_rows(), (l.shape().max_slots + 7) / 8 * 8},
             bit_copy<float>(0xffffffffU), 0),
        weights({l.n_ids, l.shape().n_kv_heads, s.group, l.shape().max_slots}),
        weight_max({l.n_ids, l.shape().n_kv_heads, s.group, 1}),
        head({l.n_ids, l.shape().n_kv_heads, s.head_floats()}, 0),
        q({l.n(), l.shape().n_q_heads, l.shape().dim_k}, 0, 0),
        scores({l.n(), l.shape().n_kv_heads, l.shape().max_slots}),
        victim({l.n_ids, l.shape().n_kv_heads}, -5),
        seen(uz(l.n_ids), newest + 1),
        from(uz(l.n_ids), 0) {
    ring_q.each([&](float& x) { x = g.normal(); });
    enter.batch = leave.batch = l.batch();
    enter.layer = leave.layer = l.ref();
    enter.state =
        leave.state = {shape, seen.data(), from.data(), ring_q.cref(), rows.ref(), head.ref()};
    enter.weights = weights.cref();
    enter.weight_max = weight_max.cref();
    enter.fuse = leave.fuse = fuse;
    enter.anew = true;
    leave.victim = victim.ref();
  }

  /// The canonical scores, straight from queries and keys.
  void score() {
    padded<float, 4> last({l.n(), l.shape().n_q_heads, shape.n_rows, l.shape().dim_k}, 0, 0);
    padded<index_t, 2> position({l.n(), shape.n_rows}, 0, 0);
    for (index_t b = 0; b < l.n(); ++b)
      for (index_t r = 0; r < shape.n_rows; ++r) {
        index_t const p = newest - shape.n_rows + 1 + r;
        position(b, r) = p >= from[uz(l.id[uz(b)])] ? p : -1;
        for (index_t h = 0; h < l.shape().n_q_heads; ++h)
          for (index_t d = 0; d < l.shape().dim_k; ++d)
            last(b, h, r, d) = ring_q(l.id[uz(b)], h, p % (shape.n_rows + 1), d);
      }
    op::fused_rows<> direct;
    direct.batch = l.batch();
    direct.layer = l.ref();
    direct.rows.q = last.cref();
    direct.rows.position = position.cref();
    direct.recent = shape.window;
    direct.fuse = enter.fuse;
    direct.out = scores.ref();
    on_cpu(direct);
  }

  /// One decision. @return whether every victim has the lowest score, nearly
  bool step() {
    test::run_op(enter, rows, head);
    test::run_op(leave, victim, head);
    score();
    bool right = true;
    l.each_head([&](index_t b, index_t h) {
      index_t const v = victim(l.id[uz(b)], h);
      float least = std::numeric_limits<float>::infinity();
      for (index_t t = 0; t < l.length(b, h); ++t) least = std::min(least, scores(b, h, t));
      right = right && v >= 0 && scores(b, h, v) <= least * (1 + 1e-5F);
    });
    return right;
  }

  /// The next token takes the victims' slots and attends.
  void next() {
    auto const random = [&] { return g.normals(uz(l.shape().dim_k)); };
    next(random, random);
  }
  /// The same with queries and keys from `query()` and `key()`.
  template <class Query, class Key>
  void next(Query const& query, Key const& key) {
    ++newest;
    for (index_t b = 0; b < l.n(); ++b)
      for (index_t h = 0; h < l.shape().n_q_heads; ++h) {
        auto const x = query();
        for (index_t d = 0; d < l.shape().dim_k; ++d) q(b, h, d) = x[uz(d)];
      }
    l.each_head([&](index_t b, index_t h) {
      index_t const id = l.id[uz(b)], slot = victim(id, h);
      l.positions(id, h, slot) = newest;
      l.cache.set_k(l.row[uz(b)], h, slot, key());
    });
    for (index_t b = 0; b < l.n(); ++b) {
      seen[uz(l.id[uz(b)])] = newest + 1;
      for (index_t h = 0; h < l.shape().n_q_heads; ++h)
        for (index_t d = 0; d < l.shape().dim_k; ++d)
          ring_q(l.id[uz(b)], h, newest % (shape.n_rows + 1), d) = q(b, h, d);
    }
    op::attend<> a;
    a.batch = l.batch();
    a.layer = l.ref();
    a.q = q.cref();
    a.weights = weights.ref();
    a.weight_max = weight_max.ref();
    on_cpu(a);
    enter.anew = false;
  }

  /// Heads in which the direct form decides.
  index_t at_rest() const {
    index_t n = 0;
    l.each_head([&](index_t b, index_t h) {
      n += cpu::lazy_head(shape, head.ref().at(l.id[uz(b)], h, 0)).rest() > 0 ? 1 : 0;
    });
    return n;
  }
};

test::layer_options full_layer(generator& g, index_t slots) {
  test::layer_options o;
  o.cache.shape = test::random_shape(g, slots, 3);
  o.cache.shape.max_slots = slots;
  o.cache.seed = g.next();
  o.min_length = slots;
  o.dense = true;
  return o;
}

}  // namespace

TEST_CASE("each lazy victim has the lowest direct score, and few slots are in doubt") {
  test::for_seeds(10, [](generator& g) {
    index_t const window = g.integer(8, 20);
    test::layer_options o = full_layer(g, window + g.integer(1, 150));
    o.cache.layout = g.one_of(test::all_layouts());
    o.cache.type = g.one_of(test::readable_dtypes());
    INFO(o.cache.layout << " " << o.cache.type << " W " << window << " slots "
                        << o.cache.shape.max_slots);
    test::test_layer l(o);
    lazy_shape const s{l.shape().group(), g.integer(1, window), window};
    lazy_steps x(l, g, s, g.chance(0.5F) ? reduction::sum : reduction::max);
    bool const all = g.chance(0.5F);  // else the prompt has shown few rows
    if (!all) std::fill(x.from.begin(), x.from.end(), x.newest - g.integer(0, s.n_rows - 1));
    for (int i = 0; i < 24; ++i) {
      INFO("step " << i);
      REQUIRE(x.step());
      REQUIRE(x.at_rest() == 0);  // bounds have decided, not the direct form
      x.next();
    }
  });
}

TEST_CASE("heads of many tiles, and a state that every other step the CPU has left") {
  for (reduction const fuse : {reduction::sum, reduction::max}) {
    INFO(to_string(fuse));
    generator g(7);
    test::layer_options o;
    o.cache.shape = {1, 8, 2, 32, 8, 1300};
    o.cache.type = dtype::bf16;
    o.min_length = 1300;
    o.dense = true;
    test::test_layer l(o);
    lazy_steps x(l, g, {4, 31, 32}, fuse);
    for (int i = 0; i < 5; ++i) {
      INFO("step " << i);
      REQUIRE(x.step());
      REQUIRE(x.at_rest() == 0);
      x.next();
      on_cpu(x.enter);
      on_cpu(x.leave);
      x.next();
    }
  }
}

TEST_CASE("the direct form decides where bounds cannot, and the state survives it") {
  generator g(3);
  test::layer_options o = full_layer(g, 120);
  test::test_layer l(o);
  lazy_shape const s{l.shape().group(), 7, 8};
  lazy_steps x(l, g, s, reduction::sum);
  // All old keys alike: every slot scores the same, the highest position leaves.
  std::vector<float> const key = g.normals(uz(l.shape().dim_k));
  l.each_head([&](index_t b, index_t h) {
    for (index_t t = 0; t < 120; ++t) l.cache.set_k(l.row[uz(b)], h, t, key);
  });
  for (int i = 0; i < 40; ++i) {
    INFO("step " << i);
    REQUIRE(x.step());
    if (i == 0) {
      CHECK(x.at_rest() > 0);
      l.each_head([&](index_t b, index_t h) {
        index_t const id = l.id[uz(b)];
        CHECK(l.positions(id, h, x.victim(id, h)) == 119 - 8);
      });
    }
    x.next();
  }
}

TEST_CASE("the direct form decides where weights have saturated") {
  for (float const top : {60.0F, 86.0F, 95.0F, 100.0F}) {
    INFO("one token's logit is " << top << " above the old ones, another's " << top - 15);
    generator g(3);
    test::layer_options o;
    o.cache.shape = {1, 1, 1, 2, 2, 400};
    o.min_length = 400;
    o.dense = true;
    test::test_layer l(o);
    // Queries ask for one feature, whose product with a key is the logit.
    auto const key = [](float first, float second) {
      return std::vector<float>{first * std::sqrt(2.0F), second * std::sqrt(2.0F)};
    };
    auto const dull = [&] { return key(0.01F * g.normal(), 5 + 0.1F * g.normal()); };
    for (index_t t = 0; t < 400; ++t) l.cache.set_k(l.row[0], 0, t, dull());
    lazy_steps x(l, g, {1, 7, 8}, reduction::sum);
    x.ring_q.each([i = 0](float& e) mutable { e = i++ % 2 == 0 ? 0.0F : 1.0F; });
    for (int i = 0; i < 30; ++i) {
      INFO("step " << i);
      REQUIRE(x.step());
      x.next(
          [&] {
            return i == 11 ? std::vector<float>{1, 0} : std::vector<float>{0, 1};
          },
          [&] { return i == 5   ? key(top, 5)
                       : i == 6 ? key(top - 15, -10)
                                : dull(); });
    }
  }
}

TEST_CASE("a head that lets nothing go takes no row, and starts anew when it does") {
  generator g(9);
  test::layer_options o = full_layer(g, 90);
  o.cache.shape.n_kv_heads = 2;
  o.cache.shape.n_q_heads = 4;
  test::test_layer l(o);
  lazy_steps x(l, g, {2, 12, 16}, reduction::sum);
  test::run_op(x.enter, x.rows, x.head);
  std::vector<float> const state = x.head.data();
  x.enter.anew = false;
  test::run_op(x.enter, x.rows, x.head);  // the row has entered
  CHECK(test::same_bits(state, x.head.data()));
  REQUIRE(x.step());
  x.next();
  // From now on the second head alone has room.
  padded<index_t, 2> keep({l.n_ids, 2}, 89);
  for (index_t id = 0; id < l.n_ids; ++id) keep(id, 1) = 90;
  x.enter.keep = keep.cref();
  std::vector<float> const before = x.rows.data();
  test::run_op(x.enter, x.rows, x.head);
  for (index_t b = 0; b < l.n(); ++b) {
    index_t const id = l.id[uz(b)];
    CHECK(cpu::lazy_head(x.shape, x.head.ref().at(id, 0, 0)).newest() == x.newest);
    CHECK(cpu::lazy_head(x.shape, x.head.ref().at(id, 1, 0)).newest() == -1);
    for (index_t r = 0; r < x.shape.slot_rows(); ++r) {
      float const* const now = x.rows.ref().at(id, 1, r, 0);
      float const* const then = before.data() + (now - x.rows.data().data());
      CHECK(std::memcmp(then, now, 90 * sizeof(float)) == 0);
    }
  }
  x.enter.keep = {};
  for (int i = 0; i < 10; ++i) {
    REQUIRE(x.step());
    x.next();
  }
}

TEST_CASE("lazy ops refuse shapes that they cannot serve, and heads below their budget keep all") {
  generator g(5);
  test::layer_options o = full_layer(g, 60);
  test::test_layer l(o);
  lazy_steps x(l, g, {l.shape().group(), 8, 8}, reduction::max);
  test::run_op(x.enter, x.rows, x.head);
  padded<index_t, 2> keep({l.n_ids, l.shape().n_kv_heads}, 60);
  x.leave.keep = keep.cref();
  std::vector<float> const before = x.head.data();
  test::run_op(x.leave, x.victim, x.head);
  l.each_head([&](index_t b, index_t h) { CHECK(x.victim(l.id[uz(b)], h) == -1); });
  CHECK(test::same_bits(before, x.head.data()));
  workspace ws;
  auto const refused = [&](lazy_shape const& s) {
    x.enter.state.shape = x.leave.state.shape = s;
    return test::call(test::one_thread(), x.enter, ws) == status::bad_argument &&
           test::call(test::one_thread(), x.leave, ws) == status::bad_argument;
  };
  CHECK(refused({l.shape().group(), 9, 8}));
  CHECK(refused({l.shape().group(), 4, 7}));
  CHECK(refused({l.shape().group() + 1, 8, 8}));
  CHECK(refused({l.shape().group(), 0, 8}));
  CHECK(refused({l.shape().group(), lazy_shape::most_rows + 1, 512}));
}

#if defined(KVKEEP_TEST_CUDA)
TEST_CASE(
    "a decision that needs more shared memory than a block has is refused while it measures") {
  generator g(5);
  test::layer_options o = full_layer(g, 140);
  o.cache.shape.n_kv_heads = 1;
  o.cache.shape.n_q_heads = 71;
  test::test_layer l(o);
  lazy_steps x(l, g, {71, 128, 128}, reduction::max);
  workspace measure;
  long const started = test::started_kernels();
  CHECK(test::call(test::one_thread(), x.leave, measure) == status::unsupported);
  test::aligned_block const block(measure.peak());
  workspace place(block.span());
  CHECK(test::call(test::one_thread(), x.leave, place) == status::unsupported);
  // So does a chain of it.
  auto const chain = op::make_chain<host_space>(l.n(), 1, l.shape().max_slots, x.enter, x.leave);
  workspace both;
  CHECK(test::call(test::one_thread(), chain, both) == status::unsupported);
  CHECK(test::started_kernels() == started);
}
#endif
