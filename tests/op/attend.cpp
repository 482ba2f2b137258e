// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Decode attention against plain loops in double, in every layout and element type.
#include <kvkeep/backend/cpu/accumulate.hpp>
#include <kvkeep/backend/cpu/attend.hpp>

#include "layers.hpp"

namespace {

using namespace kvkeep;
using test::generator;
using test::near;
using test::padded;
using test::uz;

/// Arguments and results of one call.
struct attend_run {
  padded<float, 3> q, out;
  padded<float, 2> lse;
  padded<float, 4> weights;  // [id, kv_head, ring * group, slot]: a ring of weight rows
  padded<float, 4> weight_sum;
  padded<std::uint8_t, 3> visible;
  std::vector<index_t> ring_row, tickets;
  index_t ring;
  op::attend<> op;

  attend_run(test::test_layer const& l, generator& g, index_t n_ring, float q_scale = 1)
      : q({l.n(), l.shape().n_q_heads, l.shape().dim_k}, 0, 0),
        out({l.n(), l.shape().n_q_heads, l.shape().dim_v}, -7),
        lse({l.n(), l.shape().n_q_heads}, -7),
        weights({l.n_ids, l.shape().n_kv_heads, n_ring * l.shape().group(), l.shape().max_slots},
                -7),
        weight_sum({l.n_ids, l.shape().n_kv_heads, l.shape().group(), n_ring}, -7),
        visible({l.n(), l.shape().n_q_heads, l.shape().max_slots}),
        ring(n_ring) {
    q.each([&](float& x) { x = q_scale * g.normal(); });
    visible.each([&](std::uint8_t& x) { x = g.chance(0.6F) ? 1 : 0; });
    for (index_t b = 0; b < l.n(); ++b) ring_row.push_back(g.integer(0, n_ring - 1));
    op.batch = l.batch();
    op.layer = l.ref();
    op.q = q.cref();
    op.out = out.ref();
    op.lse = lse.ref();
    op.weights = weights.ref();
    op.weights.extent[2] = l.shape().group();
    op.ring_stride = l.shape().group() * op.weights.stride[2];
    op.weight_sum = weight_sum.ref();
    op.weight_row = ring_row.data();
    tickets.resize(uz(l.n() * l.shape().n_q_heads));
    if (g.chance(0.5F)) op.tickets = tickets.data();
  }
  void run() {
    test::run_op(op, out, lse, weights, weight_sum);
    REQUIRE(std::count(tickets.begin(), tickets.end(), 0) == static_cast<long>(tickets.size()));
  }
};

/// Compares with the oracle. `mask` says whether the op had one.
void check(test::test_layer const& l, attend_run const& a, bool mask, double tolerance = 1e-5) {
  kv_ref<> const& kv = a.op.layer.kv;
  auto const rule = test::rule_of(kv);
  index_t const group = l.shape().group();
  bool out_right = true, lse_right = true, weights_right = true, others_kept = true;
  for (index_t b = 0; b < l.n(); ++b) {
    oracle::array const k = l.keys(b), v = l.values(b);
    oracle::array q({l.shape().n_q_heads, 1, l.shape().dim_k});
    for (index_t h = 0; h < l.shape().n_q_heads; ++h)
      for (index_t d = 0; d < l.shape().dim_k; ++d)
        q.at(h, 0, d) = static_cast<double>(a.q(b, h, d));
    for (index_t h = 0; h < l.shape().n_q_heads; ++h) {
      index_t const c = h / group, n = l.length(b, c), g = h % group;
      std::vector<index_t> seen;
      for (index_t t = 0; t < n; ++t)
        if (!mask || a.visible(b, h, t)) seen.push_back(t);
      double lse = 0;
      auto const p = oracle::row_probs(q, h, 0, k, seen, rule, true, &lse);
      if (seen.empty()) lse = -oracle::infinity;
      for (index_t d = 0; d < l.shape().dim_v; ++d) {
        double sum = 0;
        for (std::size_t j = 0; j < seen.size(); ++j) sum += p[j] * v.at(c, seen[j], d);
        out_right =
            out_right && near(static_cast<double>(a.out(b, h, d)), sum, tolerance, tolerance);
      }
      lse_right = lse_right && near(static_cast<double>(a.lse(b, h)), lse, tolerance, tolerance);
      auto const all = oracle::row_probs(q, h, 0, k, oracle::iota_positions(n), rule);
      index_t const id = l.id[uz(b)], row = a.ring_row[uz(b)];
      double const total = static_cast<double>(a.weight_sum(id, c, g, row));
      for (index_t t = 0; t < n; ++t) {
        double const w = static_cast<double>(a.weights(id, c, row * group + g, t));
        weights_right =
            weights_right && near(w / total, all[uz(t)], tolerance, tolerance) && w <= 1;
      }
      for (index_t r = 0; r < a.ring; ++r) {
        if (r == row) continue;
        others_kept = others_kept && a.weight_sum(id, c, g, r) == -7;
        for (index_t t = 0; t < l.shape().max_slots; ++t)
          others_kept = others_kept && a.weights(id, c, r * group + g, t) == -7;
      }
    }
  }
  CHECK(out_right);
  CHECK(lse_right);
  CHECK(weights_right);
  CHECK(others_kept);
}

}  // namespace

TEST_CASE(
    "attention, log-sum-exp and weights equal the oracle, with and without cap, sink and mask") {
  test::for_layers(16, 70, 9, [](test::test_layer const& l, generator& g) {
    attend_run a(l, g, g.integer(1, 3));
    test::random_logits const logits(g, a.op.layer.kv);
    bool const mask = g.chance(0.4F);
    if (g.chance(0.3F)) a.op.layer.kv.scale = g.uniform(0.1F, 1);
    if (mask) a.op.visible = a.visible.cref();
    a.run();
    check(l, a, mask);
  });
}

TEST_CASE("attention equals the oracle for rows read in pieces, over hundreds of slots") {
  test::for_seeds(18, [](generator& g) {
    test::layer_options o;
    index_t const heads = g.integer(1, 2), dim = g.one_of(std::array<index_t, 3>{64, 128, 256});
    o.cache.shape = {2, heads * g.integer(1, 9), heads, dim, dim, g.integer(200, 600)};
    o.cache.seed = g.next();
    o.cache.layout = g.one_of(test::all_layouts());
    o.cache.type = g.one_of(test::readable_dtypes());
    o.cache.aligned = true;
    INFO(o.cache.layout << " " << o.cache.type << " dim " << dim << " group "
                        << o.cache.shape.group());
    test::test_layer const l(o);
    attend_run a(l, g, g.integer(1, 2));
    std::vector<float> const sinks = g.normals(uz(l.shape().n_q_heads), 2);
    bool const mask = g.chance(0.3F);
    if (g.chance(0.3F)) a.op.layer.kv.softcap = g.uniform(0.5F, 5);
    if (g.chance(0.3F)) a.op.layer.kv.sink_logits = sinks.data();
    if (mask) a.op.visible = a.visible.cref();
    a.run();
    check(l, a, mask);
    CHECK(l.cache.canaries_intact());
  });
}

TEST_CASE("attention equals the oracle over thousands of slots") {
  test::layer_options o;
  o.cache = {test::layout_id::paged, dtype::bf16, {1, 2, 1, 64, 64, 2500}, 16, 3, {}, true};
  o.min_length = 2400;
  test::test_layer const l(o);
  generator g(7);
  attend_run a(l, g, 1);
  a.run();
  check(l, a, false);
}

TEST_CASE("every layout gives the bits of every other, for each element type") {
  std::array<test::cache_options, 4> shapes;
  shapes[0].shape = {2, 6, 2, 20, 12, 75};
  shapes[1].shape = {2, 6, 2, 64, 64, 270};
  shapes[2].shape = {1, 18, 2, 128, 128, 90};
  shapes[3].shape = {1, 1, 1, 256, 256, 100};
  for (test::cache_options& cache : shapes) {
    cache.aligned = cache.shape.dim_k >= 64;
    test::same_in_every_layout(cache, [](test::test_layer const& l) {
      generator g(9);
      attend_run a(l, g, 1);
      a.run();
      check(l, a, false);
      return std::vector<std::vector<float>>{a.out.data(), a.lse.data(), a.weights.data()};
    });
  }
}

TEST_CASE("an entry has the same bits alone, in a longer cache, as in a batch") {
  for (index_t const dim : {20, 64, 128})
    test::for_seeds(3, [&](generator& g) {
      test::layer_options o;
      o.cache.shape = {3, 8, 2, dim, dim, 520};
      o.cache.seed = g.next();
      o.cache.type = g.one_of(test::readable_dtypes());
      o.cache.aligned = true;
      INFO("dim " << dim << " " << o.cache.type);
      test::test_layer const l(o);
      attend_run batch(l, g, 2);
      batch.run();
      for (index_t b = 0; b < l.n(); ++b) {
        test::layer_options single = o;
        single.cache.shape.n_seq = 1;
        single.cache.shape.max_slots = 1300;
        test::test_layer alone(single);
        for (index_t h = 0; h < 2; ++h) {
          alone.lengths(alone.id[0], h) = l.length(b, h);
          for (index_t t = 0; t < l.length(b, h); ++t) {
            alone.cache.set_k(0, h, t, l.cache.get_k(l.row[uz(b)], h, t));
            alone.cache.set_v(0, h, t, l.cache.get_v(l.row[uz(b)], h, t));
          }
        }
        attend_run a(alone, g, 1);
        bool same = true;
        for (index_t h = 0; h < 8; ++h) std::copy_n(&batch.q(b, h, 0), dim, &a.q(0, h, 0));
        a.run();
        index_t const id = l.id[uz(b)], row = batch.ring_row[uz(b)];
        auto const equal = [&](float const* x, float const* y, index_t n) {
          same = same && std::memcmp(x, y, uz(n) * sizeof(float)) == 0;
        };
        for (index_t h = 0; h < 8; ++h) {
          equal(&a.out(0, h, 0), &batch.out(b, h, 0), dim);
          equal(&a.lse(0, h), &batch.lse(b, h), 1);
          equal(&a.weight_sum(alone.id[0], h / 4, h % 4, 0),
                &batch.weight_sum(id, h / 4, h % 4, row), 1);
          equal(&a.weights(alone.id[0], h / 4, h % 4, 0),
                &batch.weights(id, h / 4, row * 4 + h % 4, 0), l.length(b, h / 4));
        }
        CHECK(same);
      }
    });
}

TEST_CASE("heads without slots yield zeros and minus infinity") {
  for (dtype const type : test::readable_dtypes())
    for (test::layout_id const layout : {test::layout_id::hnd, test::layout_id::tiled}) {
      test::layer_options o;
      o.cache = {layout, type, {2, 4, 2, 8, 9, 6}, 4, 3, {}};
      test::test_layer l(o);
      for (index_t b = 0; b < l.n(); ++b) l.lengths(l.id[uz(b)], b % 2) = 0;
      generator g(1);
      attend_run a(l, g, 2);
      a.run();
      check(l, a, false);
      CHECK(a.lse(0, 0) == -std::numeric_limits<float>::infinity());
      CHECK(a.out(0, 1, 8) == 0);
    }
}

TEST_CASE("a query that sees nothing yields zeros") {
  test::layer_options o;
  o.cache.shape = {1, 2, 1, 4, 5, 9};
  o.min_length = 9;
  test::test_layer const l(o);
  generator g(2);
  attend_run a(l, g, 1);
  a.visible.each([](std::uint8_t& x) { x = 0; });
  a.visible(0, 1, 3) = 1;
  a.op.visible = a.visible.cref();
  a.run();
  check(l, a, true);
  for (index_t d = 0; d < 5; ++d) CHECK(a.out(0, 1, d) == l.cache.get_v(0, 0, 3)[uz(d)]);
}

TEST_CASE("queries of 16 bits, with gaps, give the bits of the same numbers as floats") {
  auto const compare = [](test::test_layer const& l, auto convert) {
    generator g(7);
    attend_run floats(l, g, 1);
    offset_t const each = l.shape().dim_k + 3, entry = each * l.shape().n_q_heads + 5;
    std::vector<decltype(convert(0.0F))> raw(uz(static_cast<index_t>(entry) * l.n()));
    for (index_t b = 0; b < l.n(); ++b)
      for (index_t h = 0; h < l.shape().n_q_heads; ++h)
        for (index_t d = 0; d < l.shape().dim_k; ++d) {
          auto const x = convert(floats.q(b, h, d));
          raw[static_cast<std::size_t>(b * entry + h * each + d)] = x;
          floats.q(b, h, d) = to_float(x);
        }
    floats.run();
    generator again(7);
    attend_run a(l, again, 1);
    a.op.q = {};
    a.op.raw = make_queries(raw.data(), l.shape().n_q_heads, 1, l.shape().dim_k);
    a.op.raw.entry_stride = entry;
    a.op.raw.head_stride = each;
    a.run();
    CHECK(test::same_bits(a.out.data(), floats.out.data()));
    CHECK(test::same_bits(a.weights.data(), floats.weights.data()));
  };
  for (index_t const dim : {12, 64, 128})
    for (dtype const type : test::readable_dtypes()) {
      test::layer_options o;
      o.cache.shape = {2, 6, 2, dim, dim, 300};
      o.cache.type = type;
      test::test_layer const l(o);
      compare(l, [](float x) { return to_fp16(x); });
      compare(l, [](float x) { return to_bf16(x); });
      compare(l, [](float x) { return x; });
    }
}

TEST_CASE("every FP8 key counts as its number, NaN as the least") {
  for (dtype const type : {dtype::e4m3, dtype::e5m2})
    for (index_t const dim : {20, 64}) {
      INFO(type << " dim " << dim);
      test::layer_options o;
      o.cache = {test::layout_id::hnd, type, {1, 2, 1, dim, dim, 256}, 4, 3, {}, true};
      o.min_length = 256;
      test::test_layer l(o);
      test::fill_with_bytes(l);
      generator g(5);
      attend_run a(l, g, 1);
      a.op.layer.kv.scale = type == dtype::e4m3 ? 0x1p-6F : 0x1p-13F;
      a.run();
      check(l, a, false);
    }
}

TEST_CASE("outputs may be left out one by one") {
  test::layer_options o;
  o.cache.shape = {2, 6, 3, 16, 8, 33};
  o.cache.type = dtype::bf16;
  test::test_layer const l(o);
  generator g(4);
  attend_run whole(l, g, 1);
  whole.run();
  for (int left_out = 0; left_out < 4; ++left_out) {
    INFO("left out " << left_out);
    generator again(4);
    attend_run a(l, again, 1);
    if (left_out == 0) a.op.out = {};
    if (left_out == 1) a.op.lse = {};
    if (left_out == 2) a.op.weights = {}, a.op.weight_sum = {};
    if (left_out == 3) a.op.weight_row = nullptr;  // row 0, which is the only one
    a.run();
    if (left_out != 0) CHECK(test::same_bits(a.out.data(), whole.out.data()));
    if (left_out != 1) CHECK(test::same_bits(a.lse.data(), whole.lse.data()));
    if (left_out != 2) {
      CHECK(test::same_bits(a.weights.data(), whole.weights.data()));
      CHECK(test::same_bits(a.weight_sum.data(), whole.weight_sum.data()));
    }
  }
}

TEST_CASE("neither tickets nor what is expected of lengths change a bit") {
  test::for_seeds(12, [](generator& g) {
    test::layer_options o;
    index_t const heads = g.integer(1, 2), dim = g.one_of(std::array<index_t, 3>{23, 64, 128});
    index_t const slots = g.one_of(std::array<index_t, 3>{40, 700, 2600});
    o.cache.shape = {2, heads * g.integer(1, 11), heads, dim, dim, slots};
    o.cache.seed = g.next();
    o.cache.layout = g.one_of(test::all_layouts());
    o.cache.type = g.one_of(test::readable_dtypes());
    o.cache.aligned = true;
    INFO(o.cache.layout << " " << o.cache.type << " dim " << dim << " group "
                        << o.cache.shape.group() << " slots " << slots);
    test::test_layer const l(o);
    attend_run a(l, g, 1);
    bool const mask = g.chance(0.3F);
    if (mask) a.op.visible = a.visible.cref();
    padded<float, 4> sums({l.n(), heads, 1, slots}, 0);
    a.op.fold.out = sums.ref();
    a.op.fold.clear = true;
    std::vector<std::vector<float>> results[2];
    for (bool const with : {false, true}) {
      a.op.tickets = with ? a.tickets.data() : nullptr;
      a.op.usual_slots = with ? g.integer(0, slots + 10) : 0;
      a.run();
      results[with] = {a.out.data(), a.lse.data(), a.weights.data(), a.weight_sum.data(),
                       sums.data()};
    }
    for (std::size_t i = 0; i < results[0].size(); ++i)
      CHECK(test::same_bits(results[0][i], results[1][i]));
    check(l, a, mask);
  });
}

TEST_CASE("attention folds its weights to the bits of op::accumulate") {
  test::for_layers(12, 70, 9, [](test::test_layer const& l, generator& g) {
    index_t const heads = l.shape().n_kv_heads, group = l.shape().group();
    attend_run a(l, g, g.integer(1, 3));
    test::random_logits const logits(g, a.op.layer.kv);
    bool const mask = g.chance(0.3F), keeps_weights = g.chance(0.5F);
    if (mask) a.op.visible = a.visible.cref();

    weight_fold<> f;
    f.out_by_id = g.chance(0.5F);
    f.per_query_head = g.chance(0.4F);
    f.clear = g.chance(0.3F);
    f.scale = g.uniform(0.1F, 2);
    padded<index_t, 2> fresh({l.n_ids, heads}, 0);
    fresh.each([&](index_t& x) { x = g.integer(-1, l.shape().max_slots - 1); });
    if (g.chance(0.5F)) f.fresh_slot = fresh.cref();
    index_t const rows = f.out_by_id ? l.n_ids : l.n(), per_head = f.per_query_head ? group : 1;
    padded<float, 4> fused({rows, heads, per_head, l.shape().max_slots});
    padded<float, 4> apart({rows, heads, per_head, l.shape().max_slots});
    fused.each([&](float& x) { x = g.normal(); });
    apart.data() = fused.data();

    op::accumulate<> after;
    after.batch = l.batch();
    after.slots = l.slots();
    after.weights = a.op.weights;
    after.weight_sum = a.weight_sum.cref();
    after.ring_row = a.ring_row.data();
    after.ring_stride = a.op.ring_stride;
    after.fold = f;
    after.fold.out = apart.ref();
    a.run();
    test::run_op(after, apart);

    a.op.fold = f;
    a.op.fold.out = fused.ref();
    if (!keeps_weights) a.op.weights = {}, a.op.weight_sum = {};  // the fold needs neither
    test::run_op(a.op, a.out, a.lse, a.weights, a.weight_sum, fused);
    CHECK(test::same_bits(fused.data(), apart.data()));
  });
}

TEST_CASE("NaN and infinite keys, and huge logits, do not poison the other slots") {
  float const nan = std::numeric_limits<float>::quiet_NaN();
  float const inf = std::numeric_limits<float>::infinity();
  for (dtype const type : {dtype::f32, dtype::f16, dtype::bf16})
    for (float const softcap : {0.0F, 4.0F})
      for (float const bad : {nan, inf, -inf}) {
        INFO(type << " softcap " << softcap << " key " << bad);
        test::layer_options o;
        o.cache = {test::layout_id::paged, type, {1, 4, 2, 8, 8, 21}, 4, 3, {}};
        o.min_length = 21;
        test::test_layer l(o);
        auto key = l.cache.get_k(0, 0, 11);
        key[5] = bad;
        l.cache.set_k(0, 0, 11, key);
        generator g(6);
        attend_run a(l, g, 1);
        a.op.layer.kv.softcap = softcap;
        a.run();
        check(l, a, false);
        bool finite = true;
        a.out.each([&](float x) { finite = finite && std::isfinite(x); });
        CHECK(finite);
      }
}

TEST_CASE("a NaN query sees all slots alike") {
  test::layer_options o;
  o.cache.shape = {1, 2, 1, 8, 4, 17};
  o.min_length = 17;
  test::test_layer const l(o);
  generator g(3);
  attend_run a(l, g, 1);
  a.q(0, 1, 7) = std::numeric_limits<float>::quiet_NaN();
  a.run();
  check(l, a, false);
  CHECK(a.weights(l.id[0], 0, 1, 16) == 1);
}

TEST_CASE("logits far apart underflow to exact zeros and never overflow") {
  test::layer_options o;
  o.cache.shape = {2, 8, 2, 16, 8, 64};
  test::test_layer const l(o, 30);
  generator g(11);
  attend_run a(l, g, 1, 100);
  a.run();
  check(l, a, false, 2e-3);
  bool finite = true;
  a.out.each([&](float x) { finite = finite && std::isfinite(x); });
  CHECK(finite);
}

TEST_CASE("queries of other types than an engine computes in are refused") {
  test::layer_options o;
  o.cache.shape = {1, 1, 1, 4, 4, 5};
  test::test_layer const l(o);
  generator g(1);
  attend_run a(l, g, 1);
  a.op.raw = make_queries(a.q.data().data(), 1, 1, 4);
  workspace ws;
  CHECK(test::call(test::one_thread(), a.op, ws) == status::ok);
  for (dtype const type : {dtype::e4m3, dtype::e5m2, dtype::opaque}) {
    a.op.raw.type = type;
    CHECK(test::call(test::one_thread(), a.op, ws) == status::unsupported);
  }
}

TEST_CASE("opaque rows without a reader are refused") {
  test::layer_options o;
  o.cache.shape = {1, 1, 1, 4, 4, 5};
  o.cache.type = dtype::opaque;
  test::test_layer const l(o);
  generator g(1);
  attend_run a(l, g, 1);
  a.op.layer.kv.v.reader = {};
  workspace ws;
  CHECK(test::call(test::one_thread(), a.op, ws) == status::unsupported);
  a.op.out = {};
  CHECK(test::call(test::one_thread(), a.op, ws) ==
        (test::host_reads_rows ? status::ok : status::unsupported));
  a.op.layer.kv.k.reader = {};
  CHECK(test::call(test::one_thread(), a.op, ws) == status::unsupported);
}
