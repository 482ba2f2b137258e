// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// MorphKV's direct scores against plain loops in double.
#include <kvkeep/backend/cpu/fused_rows.hpp>

#include "../support/test_rows.hpp"
#include "layers.hpp"

namespace {

using namespace kvkeep;
using test::generator;
using test::near;
using test::padded;
using test::test_rows;
using test::uz;

struct fused_run {
  padded<float, 3> out, out_heads;
  op::fused_rows<> op;

  fused_run(test::test_layer const& l, query_rows<> const& rows, index_t recent, reduction fuse)
      : out({l.n(), l.shape().n_kv_heads, l.shape().max_slots}, -7),
        out_heads({l.n(), l.shape().n_q_heads, l.shape().max_slots}, -7) {
    op.batch = l.batch();
    op.layer = l.ref();
    op.rows = rows;
    op.recent = recent;
    op.fuse = fuse;
    op.out = out.ref();
    op.out_heads = out_heads.ref();
  }
};

/// Scores by query heads [first, last) of KV head c: softmax over old slots, maximum over heads,
/// rows fused.
std::vector<double> expected(test::test_layer const& l, test_rows const& rows, fused_run const& f,
                             index_t b, index_t c, index_t first, index_t last) {
  auto rule = test::rule_of(f.op.layer.kv);
  rule.sinks.clear();  // a sink logit has no part in the choice
  oracle::array const k = l.keys(b), q = test::queries_of(rows.q.ref(), rows.source(l, b));
  auto const old = test::old_slots(l, b, c, f.op.recent);
  std::vector<double> s(uz(l.length(b, c)), oracle::infinity);
  bool any = false;
  for (index_t t : old) s[uz(t)] = 0;
  for (index_t r = 0; r < rows.n_rows; ++r) {
    if (rows.position_of(l, b, r) < 0) continue;
    any = true;
    std::vector<double> best(old.size());
    for (index_t h = first; h < last; ++h) {
      auto const a = oracle::row_probs(q, h, r, k, old, rule, false);
      for (std::size_t j = 0; j < old.size(); ++j) best[j] = std::max(best[j], a[j]);
    }
    for (std::size_t j = 0; j < old.size(); ++j) {
      double& x = s[uz(old[j])];
      x = f.op.fuse == reduction::max ? std::max(x, best[j]) : x + best[j];
    }
  }
  for (index_t t : old)
    if (!any) s[uz(t)] = l.position(b, c, t);
  return s;
}

void check(test::test_layer const& l, test_rows const& rows, fused_run const& f) {
  index_t const group = l.shape().group();
  bool right = true, heads_right = true;
  l.each_head([&](index_t b, index_t c) {
    auto const whole = expected(l, rows, f, b, c, c * group, (c + 1) * group);
    for (index_t t = 0; t < l.length(b, c); ++t)
      right = right && near(static_cast<double>(f.out(b, c, t)), whole[uz(t)]);
    for (index_t h = c * group; h < (c + 1) * group && f.op.out_heads; ++h) {
      auto const own = expected(l, rows, f, b, c, h, h + 1);
      for (index_t t = 0; t < l.length(b, c); ++t)
        heads_right = heads_right && near(static_cast<double>(f.out_heads(b, h, t)), own[uz(t)]);
    }
  });
  CHECK(right);
  CHECK(heads_right);
}

}  // namespace

TEST_CASE("fused rows equal the oracle") {
  test::for_layers(24, 50, 5, [](test::test_layer const& l, generator& g) {
    test_rows const rows(l, g, g.integer(1, 12), g.chance(0.5F), g.chance(0.4F) ? 1 : 0);
    fused_run f(l, rows.ref(), g.integer(0, 12), g.chance(0.5F) ? reduction::max : reduction::sum);
    test::random_logits const logits(g, f.op.layer.kv);
    if (g.chance(0.5F)) f.op.out_heads = {};
    test::run_op(f.op, f.out, f.out_heads);
    check(l, rows, f);
  });
}

TEST_CASE(
    "fused rows of all sizes of a group, over more slots and rows than a block takes at once") {
  struct {
    index_t dim, slots, group, rows;
  } const sizes[] = {{32, 600, 1, 70}, {64, 300, 2, 33}, {72, 70, 3, 40},  {128, 280, 4, 35},
                     {40, 530, 5, 12}, {64, 90, 8, 31},  {200, 150, 7, 9}, {256, 140, 12, 5}};
  for (auto const& size : sizes)
    for (dtype const type : test::readable_dtypes()) {
      test::layer_options o;
      o.cache.shape = {1, size.group, 1, size.dim, 4, size.slots};
      o.cache.type = type;
      o.min_length = size.slots - 5;
      INFO("dim " << size.dim << " group " << size.group << " " << type);
      test::test_layer const l(o);
      generator g(static_cast<std::uint64_t>(size.dim));
      test_rows rows(l, g, size.rows, false, 0.6F);
      test::round_rows(rows, g.integer(1, 3));
      reduction const fuse = size.group % 2 == 0 ? reduction::sum : reduction::max;
      fused_run f(l, rows.ref(), g.integer(10, 40), fuse), aligned(l, rows.ref(), 0, fuse);
      f.op.out_heads = aligned.op.out_heads = {};
      test::run_op(f.op, f.out, f.out_heads);
      check(l, rows, f);
      test::aligned_keys const keys(l);
      aligned.op.recent = f.op.recent;
      aligned.op.layer = keys.ref();
      REQUIRE(test::run_exact(test::one_thread(), aligned.op) == status::ok);
      CHECK(test::same_bits(f.out.data(), aligned.out.data()));
    }
}

#if defined(KVKEEP_TEST_CUDA)
TEST_CASE(
    "rows and slots that are more than a grid has blocks are refused while they are measured") {
  test::layer_options o;
  o.cache.shape = {1, 8, 1, 4, 4, 131072};
  test::test_layer const l(o);
  generator g(7);
  auto const measured = [&](index_t n_rows) {
    test_rows const rows(l, g, n_rows, false);
    fused_run f(l, rows.ref(), 9, reduction::sum);
    long const started = test::started_kernels();
    workspace measure;
    status const result = test::call(test::one_thread(), f.op, measure);
    CHECK(test::started_kernels() == started);
    return result;
  };
  CHECK(measured(508) == status::ok);
  CHECK(measured(511) == status::unsupported);
}

TEST_CASE("a block that takes several strips of slots fuses the same bits") {
  test::layer_options o;
  o.cache.shape = {4, 8, 2, 16, 4, 700};
  o.cache.type = dtype::bf16;
  test::test_layer const l(o);
  generator g(7);
  for (index_t const n : {4, 50}) {  // queries that stay in place, and that do not
    test_rows const rows(l, g, n, false);
    fused_run many(l, rows.ref(), 9, reduction::sum), few(l, rows.ref(), 9, reduction::sum);
    many.op.out_heads = few.op.out_heads = {};
    cuda::context small = test::one_thread();
    small.n_sm = 1;  // as if the device had one multiprocessor: blocks get more work
    REQUIRE(test::run_exact(test::one_thread(), many.op) == status::ok);
    REQUIRE(test::run_exact(small, few.op) == status::ok);
    check(l, rows, few);
    CHECK(test::same_bits(many.out.data(), few.out.data()));
  }
}
#endif

TEST_CASE("fused rows have the same bits in every layout") {
  test::same_in_every_layout({2, 6, 2, 20, 4, 45}, [](test::test_layer const& l) {
    generator g(9);
    test_rows const rows(l, g, 7, true);
    fused_run f(l, rows.ref(), 8, reduction::sum), alone(l, rows.ref(), 8, reduction::sum);
    alone.op.out_heads = {};
    for (fused_run* const x : {&f, &alone}) {
      test::run_op(x->op, x->out, x->out_heads);
      check(l, rows, *x);
    }
    return std::vector<std::vector<float>>{f.out.data(), f.out_heads.data(), alone.out.data()};
  });
}

TEST_CASE("without a present row the score is the position; recent slots are never ranked") {
  test::layer_options o;
  o.cache.shape = {2, 4, 2, 8, 4, 16};
  test::test_layer const l(o);
  generator g(5);
  test_rows rows(l, g, 3, true);
  rows.position.each([](index_t& p) { p = -1; });
  for (index_t const recent : {0, 5, 100}) {
    fused_run f(l, rows.ref(), recent, reduction::max);
    test::run_op(f.op, f.out, f.out_heads);
    check(l, rows, f);
  }
}

TEST_CASE("a window column that dominates has no part in the normaliser") {
  test::layer_options o;
  o.cache.shape = {1, 4, 2, 8, 4, 20};
  o.min_length = 20;
  test::test_layer l(o);
  generator g(5);
  test_rows const rows(l, g, 5, false);
  for (index_t c = 0; c < 2; ++c) {
    index_t const newest = l.slots_by_position(0, c).back();
    l.cache.set_k(0, c, newest, g.normals(8, 600));
  }
  fused_run f(l, rows.ref(), 4, reduction::sum);
  test::run_op(f.op, f.out, f.out_heads);
  check(l, rows, f);
}

TEST_CASE("NaN keys and queries leave the other scores right") {
  float const nan = std::numeric_limits<float>::quiet_NaN();
  test::layer_options o;
  o.cache.shape = {1, 4, 2, 8, 4, 20};
  o.min_length = 20;
  test::test_layer l(o);
  auto key = l.cache.get_k(0, 1, 3);
  key[6] = nan;
  l.cache.set_k(0, 1, 3, key);
  generator g(5);
  test_rows rows(l, g, 5, false);
  rows.q(0, 1, 2, 0) = nan;
  fused_run f(l, rows.ref(), 4, reduction::sum);
  test::run_op(f.op, f.out, f.out_heads);
  check(l, rows, f);
}

TEST_CASE("rows cannot be fused by their mean") {
  test::layer_options o;
  o.cache.shape = {1, 1, 1, 4, 4, 5};
  test::test_layer const l(o);
  generator g(1);
  test_rows const rows(l, g, 2, false);
  fused_run f(l, rows.ref(), 0, reduction::mean);
  workspace ws;
  CHECK(test::call(test::one_thread(), f.op, ws) == status::bad_argument);
}
