// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Attention mass per column against plain loops in double; chunks of rows give the same bits.
#include <kvkeep/backend/cpu/attend.hpp>
#include <kvkeep/backend/cpu/column_sums.hpp>

#include "../support/test_rows.hpp"
#include "layers.hpp"

namespace {

using namespace kvkeep;
using test::generator;
using test::near;
using test::padded;
using test::test_rows;
using test::uz;

struct sums_run {
  padded<float, 4> out;
  op::column_sums<> op;

  sums_run(test::test_layer const& l, query_rows<> const& rows, bool by_id, bool per_query_head)
      : out({by_id ? l.n_ids : l.n(), l.shape().n_kv_heads, per_query_head ? l.shape().group() : 1,
             l.shape().max_slots},
            0.5F) {
    op.batch = l.batch();
    op.layer = l.ref();
    op.rows = rows;
    op.out = out.ref();
    op.out_by_id = by_id;
    op.per_query_head = per_query_head;
  }
};

/// The tolerance also covers queries as sums of two 16-bit numbers: two bf16 hold 16 bits, so each term of a
/// logit is off by up to 2^-18 of it, and a logit by some 1e-6.
void check(test::test_layer const& l, test_rows const& rows, sums_run const& s,
           double tolerance = 1e-5) {
  auto const rule = test::rule_of(s.op.layer.kv);
  index_t const group = l.shape().group();
  bool right = true;
  for (index_t b = 0; b < l.n(); ++b) {
    oracle::array const k = l.keys(b), q = test::queries_of(rows.q.ref(), rows.source(l, b));
    for (index_t c = 0; c < l.shape().n_kv_heads; ++c) {
      oracle::array sum({group, l.shape().max_slots}, s.op.clear ? 0 : 0.5);
      for (index_t r = 0; r < rows.n_rows; ++r) {
        index_t const p = rows.position_of(l, b, r);
        if (p < 0) continue;
        auto const seen = test_rows::visible(l, b, c, p);
        for (index_t g = 0; g < group; ++g) {
          auto const a = oracle::row_probs(q, c * group + g, r, k, seen, rule);
          index_t const row = s.op.per_query_head ? g : 0;
          for (std::size_t j = 0; j < seen.size(); ++j) sum.at(row, seen[j]) += a[j];
        }
      }
      index_t const at = s.op.out_by_id ? l.id[uz(b)] : b;
      for (index_t g = 0; g < (s.op.per_query_head ? group : 1); ++g)
        for (index_t t = 0; t < l.length(b, c); ++t)
          right = right &&
                  near(static_cast<double>(s.out(at, c, g, t)), sum.at(g, t), tolerance, tolerance);
    }
  }
  CHECK(right);
}

}  // namespace

TEST_CASE("column sums equal the oracle, with and without log-sum-exp") {
  test::for_layers(24, 60, 5, [](test::test_layer const& l, generator& g) {
    test_rows rows(l, g, g.integer(1, 40), g.chance(0.5F), g.chance(0.3F) ? 1 : 0);
    sums_run s(l, rows.ref(), g.chance(0.5F), g.chance(0.5F));
    test::random_logits const logits(g, s.op.layer.kv);
    s.op.clear = g.chance(0.5F);
    if (g.chance(0.5F)) s.op.rows = rows.with_lse(l, test::rule_of(s.op.layer.kv));
    test::run_op(s.op, s.out);
    check(l, rows, s);
  });
}

TEST_CASE("the log-sum-exp that attention leaves serves, with sink logits in it") {
  test::for_layers(8, 60, 4, [](test::test_layer const& l, generator& g) {
    test_rows rows(l, g, 1, false);
    for (index_t b = 0; b < l.n(); ++b) rows.position(b, 0) = l.newest(b);
    sums_run without(l, rows.ref(), false, true), with(l, rows.ref(), false, true);
    std::vector<float> const sinks = g.normals(uz(l.shape().n_q_heads), 2);
    without.op.layer.kv.sink_logits = with.op.layer.kv.sink_logits = sinks.data();
    test::run_op(without.op, without.out);
    // The same queries attend.
    padded<float, 3> q({l.n(), l.shape().n_q_heads, l.shape().dim_k}, 0, 0);
    padded<float, 2> lse({l.n(), l.shape().n_q_heads}, -7);
    for (index_t b = 0; b < l.n(); ++b)
      for (index_t h = 0; h < l.shape().n_q_heads; ++h)
        for (index_t d = 0; d < l.shape().dim_k; ++d) q(b, h, d) = rows.q(b, h, 0, d);
    op::attend<> a;
    a.batch = l.batch();
    a.layer = with.op.layer;
    a.q = q.cref();
    a.lse = lse.ref();
    REQUIRE(test::run_exact(test::one_thread(), a) == status::ok);
    for (index_t b = 0; b < l.n(); ++b)
      for (index_t h = 0; h < l.shape().n_q_heads; ++h) rows.lse(b, h, 0) = lse(b, h);
    with.op.rows.lse = rows.lse.cref();
    test::run_op(with.op, with.out);
    check(l, rows, without);
    check(l, rows, with);
    bool same = true;
    for (std::size_t i = 0; i < with.out.data().size(); ++i)
      same = same && near(static_cast<double>(with.out.data()[i]),
                          static_cast<double>(without.out.data()[i]), 1e-5, 1e-5);
    CHECK(same);
  });
}

TEST_CASE("any chunking of the rows gives the same bits") {
  test::for_layers(12, 50, 4, [](test::test_layer const& l, generator& g) {
    index_t const n = g.integer(2, 300);
    test_rows rows(l, g, n, false, 0.2F);
    query_rows<> const all =
        g.chance(0.5F) ? rows.ref() : rows.with_lse(l, test::rule_of(l.cache.ref()));
    bool const per_query_head = g.chance(0.5F);
    sums_run whole(l, all, true, per_query_head), parts(l, all, true, per_query_head);
    REQUIRE(test::run_exact(test::one_thread(), whole.op) == status::ok);
    for (index_t first = 0; first < n;) {
      index_t const count = g.integer(1, n - first);
      parts.op.rows = test_rows::part(all, first, count);
      REQUIRE(test::run_exact(test::two_threads(), parts.op) == status::ok);
      first += count;
    }
    CHECK(test::same_bits(whole.out.data(), parts.out.data()));
  });
}

TEST_CASE("column sums of long rows and of more slots than a slice") {
  struct {
    index_t dim, slots, group;
  } const sizes[] = {{32, 1100, 1}, {64, 300, 4},  {72, 70, 2},
                     {128, 280, 8}, {200, 150, 3}, {256, 140, 4}};
  for (auto const& size : sizes)
    for (dtype const type : test::readable_dtypes()) {
      test::layer_options o;
      o.cache.shape = {1, size.group, 1, size.dim, 4, size.slots};
      o.cache.type = type;
      o.min_length = size.slots - 5;
      INFO("dim " << size.dim << " slots " << size.slots << " " << type);
      test::test_layer const l(o);
      generator g(static_cast<std::uint64_t>(size.dim));
      test_rows rows(l, g, g.integer(5, 10), false, 0.2F);
      test::round_rows(rows, g.integer(1, 3));
      for (bool const per_query_head : {false, true}) {
        sums_run s(l, rows.ref(), false, per_query_head);
        test::run_op(s.op, s.out);
        check(l, rows, s);
        sums_run aligned(l, rows.ref(), false, per_query_head);
        test::aligned_keys const keys(l);
        aligned.op.layer = keys.ref();
        REQUIRE(test::run_exact(test::one_thread(), aligned.op) == status::ok);
        CHECK(test::same_bits(s.out.data(), aligned.out.data()));
      }
    }
}

TEST_CASE("a logit that is infinite has its weight, with and without log-sum-exp") {
  for (dtype const type : {dtype::f32, dtype::f16, dtype::bf16}) {
    test::layer_options o;
    o.cache.shape = {1, 2, 1, 8, 4, 20};
    o.cache.type = type;
    o.dense = true;
    o.min_length = 20;
    test::test_layer l(o);
    auto key = l.cache.get_k(0, 0, 7);
    key[2] = std::numeric_limits<float>::infinity();
    l.cache.set_k(0, 0, 7, key);
    generator g(2);
    test_rows rows(l, g, 6, false);
    for (index_t h = 0; h < 2; ++h)
      for (index_t r = 0; r < 6; ++r) rows.q(0, h, r, 2) = h == 0 ? 1.0F : -1.0F;
    for (bool const given : {false, true}) {
      sums_run s(l, given ? rows.with_lse(l, test::rule_of(l.cache.ref())) : rows.ref(), false,
                 true);
      test::run_op(s.op, s.out);
      check(l, rows, s);
      CHECK(s.out(0, 0, 0, 7) == 6.5F);  // all of six rows, and what was there
    }
  }
}

TEST_CASE("any chunking gives the same bits where only some rows are 16-bit numbers") {
  float const inf = std::numeric_limits<float>::infinity();
  for (dtype const type : {dtype::f16, dtype::bf16})
    test::for_seeds(4, [&](generator& g) {
      test::layer_options o;
      o.cache.shape = {1, g.integer(1, 5), 1, g.one_of(std::array<index_t, 3>{8, 24, 64}), 4, 50};
      o.cache.seed = g.next();
      o.cache.type = type;
      o.min_length = 10;
      test::test_layer l(o);
      auto key = l.cache.get_k(0, 0, 7);
      key[2] = g.chance(0.5F) ? inf : key[2];
      l.cache.set_k(0, 0, 7, key);
      test_rows rows(l, g, 21, false, 0.2F);
      test::round_rows(rows, g.integer(2, 3));
      bool const per_query_head = g.chance(0.5F);
      query_rows<> const all =
          g.chance(0.5F) ? rows.ref() : rows.with_lse(l, test::rule_of(l.cache.ref()));
      sums_run whole(l, all, false, per_query_head), parts(l, all, false, per_query_head);
      REQUIRE(test::run_exact(test::one_thread(), whole.op) == status::ok);
      check(l, rows, whole);
      for (index_t first = 0; first < rows.n_rows; ++first) {
        parts.op.rows = test_rows::part(all, first, 1);
        REQUIRE(test::run_exact(test::one_thread(), parts.op) == status::ok);
      }
      CHECK(test::same_bits(whole.out.data(), parts.out.data()));
    });
}

#if !defined(KVKEEP_TEST_CUDA)
TEST_CASE("logits that are too many to be kept between the passes give the same bits") {
  test::layer_options o;
  o.cache.shape = {1, 1, 1, 8, 4, 9000};
  o.min_length = 8900;
  test::test_layer const l(o);
  generator g(11);
  test_rows const rows(l, g, 512, false);
  REQUIRE(cpu::size_of(8900) * 512 > cpu::most_kept_logits);
  REQUIRE(cpu::size_of(9008) * 128 < cpu::most_kept_logits);
  sums_run whole(l, rows.ref(), false, false), parts(l, rows.ref(), false, false);
  REQUIRE(test::run_exact(test::one_thread(), whole.op) == status::ok);
  for (index_t first = 0; first < 512; first += 128) {
    parts.op.rows = test_rows::part(rows.ref(), first, 128);
    REQUIRE(test::run_exact(test::one_thread(), parts.op) == status::ok);
  }
  CHECK(test::same_bits(whole.out.data(), parts.out.data()));
}
#endif

#if defined(KVKEEP_TEST_CUDA)
TEST_CASE("a block that takes several strips of slots gives each the same bits") {
  for (bool const aligned : {false, true}) {
    test::layer_options o;
    o.cache.shape = {4, 8, 2, 16, 4, 700};
    o.cache.type = dtype::bf16;
    test::test_layer const l(o);
    test::aligned_keys const keys(l);
    generator g(7);
    test_rows const rows(l, g, 4, false);
    sums_run many(l, rows.ref(), false, true), few(l, rows.ref(), false, true);
    if (aligned) many.op.layer = few.op.layer = keys.ref();
    cuda::context small = test::one_thread();
    small.n_sm = 1;  // as if the device had one multiprocessor: blocks get more work
    REQUIRE(test::run_exact(test::one_thread(), many.op) == status::ok);
    REQUIRE(test::run_exact(small, few.op) == status::ok);
    check(l, rows, few);
    CHECK(test::same_bits(many.out.data(), few.out.data()));
  }
}
#endif

TEST_CASE("queries far from 1 keep their precision") {
  for (dtype const type : test::readable_dtypes())
    for (float const size : {1e-6F, 1e-3F, 1e5F}) {
      INFO(type << " size " << size);
      test::layer_options o;
      o.cache.shape = {1, 2, 1, 16, 4, 40};
      o.cache.type = type;
      test::test_layer const l(o, type == dtype::f16 ? 1 : 1 / size);
      generator g(3);
      test_rows const rows(l, g, 6, false, 0, size);
      sums_run s(l, rows.ref(), false, false);
      if (type == dtype::f16) s.op.layer.kv.scale /= size;
      test::run_op(s.op, s.out);
      check(l, rows, s);
    }
}

TEST_CASE("every FP8 key counts as its number, NaN as the least") {
  for (dtype const type : {dtype::e4m3, dtype::e5m2})
    for (index_t const dim : {20, 64}) {
      INFO(type << " dim " << dim);
      test::layer_options o;
      o.cache = {test::layout_id::hnd, type, {1, 2, 1, dim, 4, 256}, 4, 3, {}, true};
      o.min_length = 256;
      test::test_layer l(o);
      test::fill_with_bytes(l);
      generator g(3);
      test_rows const rows(l, g, 6, false);
      sums_run s(l, rows.ref(), false, false);
      s.op.layer.kv.scale = type == dtype::e4m3 ? 0x1p-6F : 0x1p-13F;
      test::run_op(s.op, s.out);
      check(l, rows, s);
    }
}

TEST_CASE("column sums have the same bits in every layout") {
  test::same_in_every_layout({2, 6, 2, 20, 4, 45}, [](test::test_layer const& l) {
    generator g(9);
    test_rows const rows(l, g, 17, false);
    sums_run s(l, rows.ref(), false, false);
    test::run_op(s.op, s.out);
    check(l, rows, s);
    return std::vector<std::vector<float>>{s.out.data()};
  });
}

TEST_CASE("keys that begin anywhere give the same bits, by no kernel that serves no head") {
  struct {
    dtype type;
    test::key_place at;
    long kernels;  ///< that add up
  } const places[] = {
      {dtype::bf16, {0, 0}, 1}, {dtype::bf16, {0, 8}, 1}, {dtype::bf16, {4, 0}, 1},
      {dtype::bf16, {4, 4}, 2}, {dtype::bf16, {2, 4}, 1}, {dtype::bf16, {0, 1}, 2},
      {dtype::e4m3, {0, 0}, 1}, {dtype::e4m3, {1, 0}, 1},
  };
  for (auto const& p : places) {
    INFO(p.type << " shift " << p.at.shift << " apart " << p.at.apart);
    test::layer_options o;
    o.cache.shape = {2, 4, 2, 144, 4, 40};
    o.cache.type = p.type;
    test::test_layer const l(o);
    generator g(5);
    test_rows const rows(l, g, 3, false);
    sums_run s(l, rows.ref(), false, false), placed(l, rows.ref(), false, false);
    REQUIRE(test::run_exact(test::one_thread(), s.op) == status::ok);
    check(l, rows, s);
    test::aligned_keys const keys(l, p.at);
    placed.op.layer = keys.ref();
    long const before = test::started_kernels();
    REQUIRE(test::run_exact(test::one_thread(), placed.op) == status::ok);
    long const started = test::started_kernels() - before;
    CHECK((started == 0 || started == 3 + p.kernels));  // 0: nobody counts them
    CHECK(test::same_bits(s.out.data(), placed.out.data()));
  }
}

TEST_CASE("more packed rows than one block holds") {
  for (dtype const type : {dtype::f32, dtype::bf16}) {
    test::layer_options o;
    o.cache.shape = {1, 12, 2, 8, 4, 40};
    o.cache.type = type;
    test::test_layer const l(o);
    generator g(5);
    test_rows const rows(l, g, 230, false);
    for (bool const per_query_head : {false, true}) {
      sums_run s(l, rows.ref(), false, per_query_head);
      test::run_op(s.op, s.out);
      check(l, rows, s, 1e-4);
    }
  }
}

TEST_CASE("one bad key or query row leaves the other sums finite and right") {
  float const nan = std::numeric_limits<float>::quiet_NaN();
  float const inf = std::numeric_limits<float>::infinity();
  for (float const bad : {nan, inf, -inf}) {
    INFO("value " << bad);
    test::layer_options o;
    o.cache.shape = {1, 4, 2, 8, 4, 30};
    o.dense = true;
    o.min_length = 30;
    test::test_layer l(o);
    auto key = l.cache.get_k(0, 1, 7);
    key[2] = bad;
    l.cache.set_k(0, 1, 7, key);
    generator g(5);
    test_rows rows(l, g, 9, false);
    if (std::isnan(bad)) rows.q(0, 0, 4, 1) = bad;
    sums_run s(l, rows.ref(), false, true);
    test::run_op(s.op, s.out);
    check(l, rows, s);
  }
}

TEST_CASE("without rows, or with absent rows only, nothing is added") {
  test::layer_options o;
  o.cache.shape = {2, 4, 2, 8, 4, 12};
  test::test_layer const l(o);
  generator g(5);
  test_rows rows(l, g, 4, true);
  rows.position.each([](index_t& p) { p = -1; });
  sums_run s(l, rows.ref(), false, false);
  test::run_op(s.op, s.out);
  check(l, rows, s);
  s.op.clear = true;
  test::run_op(s.op, s.out);
  check(l, rows, s);
}
