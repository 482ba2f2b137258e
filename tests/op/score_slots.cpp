// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// User functors per slot and per index.
#include <kvkeep/backend/cpu/score_slots.hpp>

#include "../support/run_op.hpp"

namespace {

using namespace kvkeep;
using test::generator;
using test::padded;
using test::uz;

template <bool K, bool V>
struct with_rows {
  static constexpr bool reads_k = K, reads_v = V;
  float weight = 1;
  KVKEEP_HD float operator()(slot_values const& s) const {
    float sum = static_cast<float>(s.seen - s.position);
    sum += static_cast<float>(2 * s.entry + 3 * s.head + 5 * s.slot);
    for (index_t d = 0; K && d < s.dim_k; ++d) sum += weight * s.k[d];
    for (index_t d = 0; V && d < s.dim_v; ++d) sum -= s.v[d];
    return sum;
  }
};

struct position_only {
  static constexpr bool reads_k = false, reads_v = false;
  KVKEEP_HD float operator()(slot_values const& s) const {
    return s.k == nullptr && s.v == nullptr ? static_cast<float>(s.position) : -1;
  }
};

struct write_square {
  index_t* out;
  KVKEEP_HD void operator()(index_t i) const { out[i] = i * i; }
};

template <class Fn>
op::score_slots<Fn> make(test::test_layer const& l, Fn fn, padded<float, 3> const& out,
                         bool by_id) {
  op::score_slots<Fn> o{};
  o.batch = l.batch();
  o.layer = l.ref();
  o.fn = fn;
  o.out = out.ref();
  o.out_by_id = by_id;
  return o;
}

/// On a random layer of some layout and type.
template <bool K, bool V>
void check_functor(generator& g, test::layout_id layout, dtype type) {
  INFO(layout << " " << type << ", keys " << K << ", values " << V);
  test::layer_options lo;
  lo.cache.layout = layout;
  lo.cache.type = type;
  lo.cache.shape = test::random_shape(g, 30);
  lo.cache.seed = g.next();
  test::test_layer const l(lo);
  bool const by_id = g.chance(0.5F);
  padded<float, 3> out({l.n_ids, l.shape().n_kv_heads, l.shape().max_slots}, -7);
  padded<index_t, 2> only({l.n_ids, l.shape().n_kv_heads}, -1);
  std::vector<index_t> seen(uz(l.n_ids));
  for (index_t& s : seen) s = g.integer(0, 1000);
  with_rows<K, V> const fn{g.uniform()};
  auto o = make(l, fn, out, by_id);
  o.seen = seen.data();
  bool const use_only = g.chance(0.3F);
  if (use_only) {
    l.each_head(
        [&](index_t b, index_t h) { only(l.id[uz(b)], h) = g.integer(-1, l.length(b, h) - 1); });
    o.only = only.cref();
  } else {
    o.first_slot = g.integer(0, 5);
  }
  test::run_op(o, out);
  bool right = true;
  l.each_head([&](index_t b, index_t h) {
    index_t const id = l.id[uz(b)];
    for (index_t t = 0; t < l.shape().max_slots; ++t) {
      float const got = out(by_id ? id : b, h, t);
      bool const scored = t < l.length(b, h) && (use_only ? only(id, h) == t : t >= o.first_slot);
      if (!scored) {
        right = right && got == -7;
        continue;
      }
      auto const k = l.cache.get_k(l.row[uz(b)], h, t), v = l.cache.get_v(l.row[uz(b)], h, t);
      slot_values const s{l.position(b, h, t),
                          seen[uz(id)],
                          k.data(),
                          v.data(),
                          l.shape().dim_k,
                          l.shape().dim_v,
                          b,
                          h,
                          t};
      right = right && test::near(static_cast<double>(got), static_cast<double>(fn(s)), 1e-5, 1e-5);
    }
  });
  CHECK(right);
  CHECK(l.cache.canaries_intact());
}

}  // namespace

TEST_CASE("a functor sees where its slot is, tokens seen, and the rows that it reads as floats") {
  for (test::layout_id const layout : test::all_layouts())
    for (dtype const type : test::readable_dtypes())
      test::for_seeds(1, [&](generator& g) {
        check_functor<true, true>(g, layout, type);
        check_functor<true, false>(g, layout, type);
        check_functor<false, true>(g, layout, type);
      });
}

TEST_CASE("a functor that reads no rows gets none, and opaque rows need no reader for it") {
  test::layer_options lo;
  lo.cache.shape = {2, 2, 2, 4, 4, 9};
  lo.cache.type = dtype::opaque;
  test::test_layer const l(lo);
  padded<float, 3> out({l.n_ids, 2, 9}, -7);
  auto o = make(l, position_only{}, out, true);
  o.layer.kv.k.reader = o.layer.kv.v.reader = {};
  test::run_op(o, out);
  l.each_head([&](index_t b, index_t h) {
    for (index_t t = 0; t < l.length(b, h); ++t)
      CHECK(out(l.id[uz(b)], h, t) == static_cast<float>(l.position(b, h, t)));
  });
  auto rows = make(l, with_rows<true, true>{}, out, true);
  rows.layer.kv.v.reader = {};
  workspace ws;
  CHECK(test::call(test::one_thread(), rows, ws) == status::unsupported);
}

TEST_CASE("for_each calls its functor once for every index") {
  std::vector<index_t> out(20, -1);
  op::for_each<write_square> o{17, {out.data()}};
  workspace measure;
  REQUIRE(test::call(test::two_threads(), o, measure) == status::ok);
  CHECK(out[0] == -1);
  REQUIRE(test::run_exact(test::two_threads(), o) == status::ok);
  for (index_t i = 0; i < 20; ++i) CHECK(out[uz(i)] == (i < 17 ? i * i : -1));
  o.n = 0;
  CHECK(test::run_exact(test::one_thread(), o) == status::ok);
}
