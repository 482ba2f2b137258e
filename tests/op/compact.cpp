// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Survivors move bytewise, with their positions and rows, in place and between caches.
#include <kvkeep/backend/cpu/compact.hpp>

#include <sys/mman.h>

#include "../support/run_op.hpp"

namespace {

using namespace kvkeep;
using op::move_kind;
using test::generator;
using test::layout_id;
using test::padded;
using test::test_layer;
using test::uz;

using slot_bytes = std::vector<std::byte>;

/// Everything that belongs to one token.
struct token {
  slot_bytes kv;
  std::vector<float> rows;
  bool operator==(token const&) const = default;
};

token token_at(test_layer const& l, index_t seq, index_t id, index_t h, index_t slot) {
  token t{l.cache.raw(seq, h, slot), {}};
  for (index_t r = 0; r < l.slots().rows.extent[2]; ++r) t.rows.push_back(l.rows(id, h, r, slot));
  return t;
}

/// A random ascending plan: any count from none to all, for every head.
struct random_plan {
  padded<index_t, 3> slots;
  padded<index_t, 2> count;

  random_plan(test_layer const& l, generator& g, index_t most)
      : slots({l.n(), l.shape().n_kv_heads, l.shape().max_slots}, -7),
        count({l.n(), l.shape().n_kv_heads}, 0) {
    l.each_head([&](index_t b, index_t h) {
      index_t const n = l.length(b, h);
      index_t const k = g.chance(0.1F) ? n : g.chance(0.1F) ? 0 : g.integer(0, n);
      auto kept = g.choose(std::min(k, most), n);
      std::sort(kept.begin(), kept.end());
      count(b, h) = oracle::count(kept);
      std::copy(kept.begin(), kept.end(), slots.ref().at(b, h, 0));
    });
  }
  keep_plan<> ref() const { return {slots.ref(), count.ref()}; }
};

test::layer_options options(generator& g, layout_id layout, dtype type) {
  test::layer_options o;
  o.cache.layout = layout;
  o.cache.type = type;
  o.cache.shape = test::random_shape(g, 40);
  o.cache.seed = g.next();
  o.n_batch = g.integer(1, o.cache.shape.n_seq);
  o.state_rows = g.integer(0, 3);
  return o;
}

/// The tokens of one head in slot order.
std::vector<token> tokens_of(test_layer const& l, index_t seq, index_t id, index_t h) {
  std::vector<token> all;
  for (index_t t = 0; t < l.lengths(id, h); ++t) all.push_back(token_at(l, seq, id, h, t));
  return all;
}

std::size_t check_workspace(op::compact<> const& o) {
  workspace measure;
  REQUIRE(test::call(test::one_thread(), o, measure) == status::ok);
  if (measure.peak() > 0) {
    test::aligned_block const block(measure.peak());
    workspace small(block.span(1));
    CHECK(test::call(test::one_thread(), o, small) == status::workspace_too_small);
  }
  return measure.peak();
}

}  // namespace

TEST_CASE("compacting in place keeps bytes, positions and rows together") {
  for (layout_id const layout : test::all_layouts())
    for (dtype const type : test::all_dtypes())
      test::for_seeds(6, [&](generator& g) {
        INFO(layout << " " << type);
        test_layer l(options(g, layout, type));
        random_plan const plan(l, g, l.shape().max_slots);
        op::compact<> o;
        o.batch = o.to_batch = l.batch();
        o.from = o.to = l.ref();
        o.plan = plan.ref();
        o.how = g.chance(0.5F) ? move_kind::pack : move_kind::fill_holes;
        bool const holes = o.how == move_kind::fill_holes;

        std::vector<std::vector<token>> before;
        std::vector<std::vector<index_t>> positions;
        l.each_head([&](index_t b, index_t h) {
          before.push_back(tokens_of(l, l.row[uz(b)], l.id[uz(b)], h));
          positions.push_back(l.positions_of(b, h));
        });
        check_workspace(o);
        REQUIRE(test::run_exact(g.chance(0.5F) ? test::one_thread() : test::two_threads(), o) ==
                status::ok);

        std::size_t head = 0;
        bool right = true;
        l.each_head([&](index_t b, index_t h) {
          auto const& old = before[head];
          auto const& old_position = positions[head++];
          index_t const n = plan.count(b, h);
          REQUIRE(l.length(b, h) == n);
          // Where each slot's token comes from: pack keeps the order, fill_holes the slots below n.
          std::vector<index_t> source(uz(n), -1);
          std::vector<index_t> tail;
          for (index_t i = 0; i < n; ++i) {
            index_t const from = plan.slots(b, h, i);
            if (!holes)
              source[uz(i)] = from;
            else if (from < n)
              source[uz(from)] = from;
            else
              tail.push_back(from);
          }
          std::size_t next = 0;
          for (index_t& s : source)
            if (s < 0) s = tail[next++];
          for (index_t t = 0; t < n; ++t) {
            index_t const from = source[uz(t)];
            right = right && l.position(b, h, t) == old_position[uz(from)];
            right = right && token_at(l, l.row[uz(b)], l.id[uz(b)], h, t) == old[uz(from)];
          }
        });
        CHECK(right);
        CHECK(l.cache.canaries_intact());
        CHECK(l.positions.intact());
        CHECK(l.lengths.intact());
        CHECK(l.rows.intact());
      });
}

TEST_CASE("renumber moves the state and leaves K and V where they are") {
  test::for_seeds(20, [](generator& g) {
    test_layer l(options(g, g.one_of(test::all_layouts()), g.one_of(test::all_dtypes())));
    random_plan const plan(l, g, l.shape().max_slots);
    op::compact<> o;
    o.batch = o.to_batch = l.batch();
    o.from = o.to = l.ref();
    o.plan = plan.ref();
    o.how = move_kind::renumber;
    auto const k = l.cache.k().bytes(), v = l.cache.v().bytes();
    std::vector<std::vector<index_t>> positions;
    std::vector<std::vector<token>> before;
    l.each_head([&](index_t b, index_t h) {
      positions.push_back(l.positions_of(b, h));
      before.push_back(tokens_of(l, l.row[uz(b)], l.id[uz(b)], h));
    });
    REQUIRE(test::run_exact(test::two_threads(), o) == status::ok);
    CHECK(l.cache.k().bytes() == k);
    CHECK(l.cache.v().bytes() == v);
    std::size_t head = 0;
    l.each_head([&](index_t b, index_t h) {
      REQUIRE(l.length(b, h) == plan.count(b, h));
      for (index_t t = 0; t < plan.count(b, h); ++t) {
        index_t const from = plan.slots(b, h, t);
        REQUIRE(l.position(b, h, t) == positions[head][uz(from)]);
        REQUIRE(token_at(l, l.row[uz(b)], l.id[uz(b)], h, t).rows == before[head][uz(from)].rows);
      }
      ++head;
    });
  });
}

TEST_CASE("out of place from any layout into a smaller pool of any other") {
  for (layout_id const from : test::all_layouts())
    for (layout_id const to : test::all_layouts())
      test::for_seeds(2, [&](generator& g) {
        dtype const type = g.one_of(test::all_dtypes());
        INFO(from << " to " << to << " " << type);
        test::layer_options const prompt = options(g, from, type);
        test_layer const l(prompt);
        test::layer_options pool = prompt;
        pool.cache.layout = to;
        pool.cache.seed = g.next();
        pool.cache.shape.n_seq = l.n() + 2;
        pool.cache.shape.max_slots = g.integer(1, l.shape().max_slots);
        pool.n_batch = l.n();
        test_layer p(pool);
        random_plan const plan(l, g, pool.cache.shape.max_slots);
        op::compact<> o;
        o.batch = l.batch();
        o.from = l.ref();
        o.to_batch = p.batch();
        o.to = p.ref();
        o.plan = plan.ref();
        auto const k = l.cache.k().bytes(), v = l.cache.v().bytes();
        REQUIRE(test::run_exact(test::two_threads(), o) == status::ok);
        bool right = true;
        l.each_head([&](index_t b, index_t h) {
          right = right && p.length(b, h) == plan.count(b, h);
          for (index_t t = 0; t < plan.count(b, h); ++t) {
            index_t const s = plan.slots(b, h, t);
            right = right && p.position(b, h, t) == l.position(b, h, s);
            right = right && token_at(p, p.row[uz(b)], p.id[uz(b)], h, t) ==
                                 token_at(l, l.row[uz(b)], l.id[uz(b)], h, s);
          }
        });
        CHECK(right);
        CHECK((l.cache.k().bytes() == k && l.cache.v().bytes() == v));
        CHECK(p.cache.canaries_intact());
        CHECK((p.positions.intact() && p.lengths.intact() && p.rows.intact()));
      });
}

#if !defined(KVKEEP_TEST_CUDA) || defined(KVKEEP_EMULATION)
TEST_CASE("slots that stay are not written: they may lie in pages that are only read") {
  constexpr index_t slots = 48, dim = 64;  // 16 slots of 256 bytes to a page
  constexpr std::size_t page = 4096, bytes = 3 * page;
  void* const memory =
      mmap(nullptr, 2 * bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  REQUIRE(memory != MAP_FAILED);
  auto* const floats = static_cast<float*>(memory);
  for (index_t i = 0; i < 2 * slots; ++i) floats[i * dim] = static_cast<float>(i);
  test::layer_options lo;
  lo.cache.shape = {1, 1, 1, dim, dim, slots};
  lo.min_length = slots;
  test_layer const l(lo);
  padded<index_t, 3> kept({1, 1, slots}, -7);
  padded<index_t, 2> const count({1, 1}, 30);
  for (index_t i = 0; i < 30; ++i) kept(0, 0, i) = i < 16 ? i : i + 5;
  op::compact<> o;
  o.batch = o.to_batch = l.batch();
  o.from = l.ref();
  strided_layout const rows{slots * dim, slots * dim, dim, slots};
  for (plane_ref<>* const p : {&o.from.kv.k, &o.from.kv.v}) {
    p->data = static_cast<std::byte*>(memory) + (p == &o.from.kv.v ? bytes : 0);
    p->layout = rows;
  }
  o.to = o.from;
  o.plan = {kept.ref(), count.ref()};
  for (std::size_t const at : {std::size_t{0}, bytes})
    REQUIRE(mprotect(static_cast<char*>(memory) + at, page, PROT_READ) == 0);
  CHECK(test::run_exact(test::one_thread(), o) == status::ok);
  bool right = true;
  for (index_t i = 0; i < 30; ++i)
    for (index_t const first : {0, slots})
      right = right && floats[(first + i) * dim] == static_cast<float>(first + kept(0, 0, i));
  CHECK(right);
  munmap(memory, 2 * bytes);
}
#endif

TEST_CASE("heads outside the batch stay as they are") {
  generator g(4);
  test::layer_options lo = options(g, layout_id::ragged, dtype::f16);
  lo.cache.shape.n_seq = 3;
  lo.n_batch = 3;
  lo.min_length = lo.cache.shape.max_slots;
  test_layer l(lo);
  random_plan const plan(l, g, l.shape().max_slots);
  batch_ref<> one = l.batch();
  one.n = 1;
  op::compact<> o;
  o.batch = o.to_batch = one;
  o.from = o.to = l.ref();
  o.plan = plan.ref();
  auto const before = tokens_of(l, l.row[1], l.id[1], 0);
  auto const position = l.positions_of(1, 0);
  REQUIRE(test::run_exact(test::one_thread(), o) == status::ok);
  CHECK(tokens_of(l, l.row[1], l.id[1], 0) == before);
  CHECK(l.positions_of(1, 0) == position);
}

TEST_CASE("moves that cannot be are refused, and nothing has moved") {
  generator g(2);
  test::layer_options lo;
  lo.cache.shape = {2, 2, 2, 8, 4, 12};
  lo.min_length = 12;
  test_layer l(lo);
  test::layer_options other = lo;
  other.cache.type = dtype::f16;
  test_layer half(other);
  other = lo;
  other.cache.shape.max_slots = 3;
  other.min_length = 3;
  test_layer small(other);
  random_plan plan(l, g, 12);
  l.each_head([&](index_t b, index_t h) {  // one more than there is room for
    plan.count(b, h) = 4;
    for (index_t i = 0; i < 4; ++i) plan.slots(b, h, i) = 2 * i;
  });
  op::compact<> o;
  o.batch = o.to_batch = l.batch();
  o.from = o.to = l.ref();
  o.plan = plan.ref();
  op::compact<> bad = o;
  auto const refused = [&](test_layer& to, status expected) {
    auto const k = to.cache.k().bytes(), v = to.cache.v().bytes();
    auto const lengths = to.lengths.data(), positions = to.positions.data();
    // Where counts lie on a device, a head whose plan does not fit just stays as it is.
    bool const seen = test::host_reads_rows || expected != status::capacity_exceeded;
    CHECK(test::run_exact(test::one_thread(), bad) == (seen ? expected : status::ok));
    CHECK((to.cache.k().bytes() == k && to.cache.v().bytes() == v));
    CHECK((to.lengths.data() == lengths && to.positions.data() == positions));
    bad = o;
  };
  bad.to = half.ref();
  refused(half, status::bad_argument);
  bad.to_batch = small.batch();
  bad.to = small.ref();
  refused(small, status::capacity_exceeded);
  bad.to_batch = small.batch();
  bad.to = small.ref();
  bad.how = move_kind::fill_holes;
  refused(small, status::bad_argument);
  bad.to_batch.n = 1;
  refused(l, status::bad_argument);

  // K has room, V has not.
  other = lo;
  other.cache.layout = layout_id::mixed;
  test_layer mixed(other);
  other.cache.layout = layout_id::ragged;
  other.cache.capacities = {3, 3, 3, 3};
  test_layer short_rows(other);
  bad.to = mixed.ref();
  bad.to.kv.v = short_rows.cache.v().ref();
  refused(mixed, status::capacity_exceeded);
  CHECK(short_rows.cache.canaries_intact());
}
