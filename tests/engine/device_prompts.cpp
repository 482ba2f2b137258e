// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Prompts that pass through a buffer of one layer into the cache of a device session.
#include "../support/device_engine.hpp"

namespace {

using namespace kvkeep;
using test::bit;
using test::small;
using test::uz;

}  // namespace

TEST_CASE("what a transient prompt leaves needs a place, or no head has any of it") {
  bool const pages = GENERATE(false, true);
  policy_options const o = small(16);
  test::world w;
  w.lim.max_prompt = 40;
  w.layout = pages ? test::layout_id::paged : test::layout_id::ragged;
  auto e = w.options(test::make("h2o", o), 20);
  cache_shape const& shape = e.cache.shape;
  if (!pages) {  // the last head of the second row has room for fewer than the policy keeps
    e.cache.capacities.assign(uz(shape.n_seq * shape.n_kv_heads), shape.max_slots);
    e.cache.capacities[uz(2 * shape.n_kv_heads - 1)] = 15;
  }
  auto const policy = make_policy<test::op_context>("h2o", o);
  test::device_engine device(e, policy, policy);
  if (pages) {
    auto const& table = device.specs()[1].kv.v.layout.paged;
    const_cast<index_t*>(table.table)[table.table_seq_stride] = table.n_blocks;
  }
  auto const a = w.words(1), b = w.words(2);
  test::stream x = device.begin(a), y = device.begin(b);
  REQUIRE(y.row == 1);
  for (test::stream* s : {&y, &x}) device.prompt(*s, 40, {25, 15});
  device_fault const fault = pages ? device_fault::bad_table : device_fault::no_slot;
  for (int t = 0; t < 3; ++t) {
    CHECK(device.session().faults()[y.id] == bit(fault));
    CHECK(device.session().faults()[x.id] == 0);
    for (oracle::kept_set const& head : device.kept(1, y)) CHECK(head.empty());
    for (oracle::kept_set const& head : device.kept(1, x)) CHECK(oracle::count(head) == 16);
    device.step({&y, &x});
  }
  if (!pages) CHECK(device.intact());
}

TEST_CASE("transient prompts come one at a time, whole, and with their views") {
  policy_options const o = small(16);
  test::world w;
  w.lim.max_prompt = 40;
  auto const p = make_policy<test::op_context>("h2o", o);
  auto e = w.options(test::make("h2o", o), 20);
  e.lim.max_sequences = w.shape.n_seq + 1;
  test::device_engine device(e, p, p);
  auto& s = device.session();
  auto const words = w.words(1);
  test::stream x = device.begin(words), y = device.begin(words);
  cache_shape shape = w.shape;
  shape.max_slots = 40;
  test::test_cache const other = test::test_cache::make(w.layout, w.type, shape),
                         tiled = test::test_cache::make(test::layout_id::tiled, w.type, shape);
  auto const good = test::to_device(other.ref());
  std::vector<float> const numbers(uz(w.shape.n_q_heads * 50 * w.shape.dim_k));
  auto const rows = [&](index_t n) {
    return make_queries(numbers.data(), w.shape.n_q_heads, n, w.shape.dim_k);
  };
  auto const refused = [&](status want, auto change) {
    auto view = good;
    change(view);
    CHECK(s.observe(0, x.id, rows(3), &view) == want);
  };
  CHECK(s.observe(0, x.id, rows(3)) == status::bad_argument);  // H2O reads keys
  CHECK(s.observe(0, x.id, rows(41), &good) == status::capacity_exceeded);
  CHECK(s.observe(0, x.id, rows(3), &good, w.shape.n_seq) == status::bad_argument);
  refused(status::bad_argument, [](auto& v) { v.shape.max_slots = 41; });
  refused(status::capacity_exceeded, [](auto& v) { v.shape.max_slots = 2; });
  refused(status::bad_argument, [](auto& v) { v.shape.n_kv_heads = 1; });
  refused(status::bad_argument, [](auto& v) { v.v.type = dtype::bf16; });
#if defined(KVKEEP_TEST_CUDA)
  refused(status::unsupported, [](auto& v) { v.k.layout = any_layout(custom_layout{}); });
#endif
  refused(status::unsupported, [&](auto& v) { v.k = test::to_device(tiled.ref()).k; });
  CHECK(s.observe(0, x.id, own_scores{numbers.data(), 0, 40}) == status::unsupported);
  for (index_t h = 0; h < w.shape.n_kv_heads; ++h) CHECK(device.kept(0, x)[uz(h)].empty());
  REQUIRE(s.observe(0, x.id, rows(3), &good) == status::ok);
  CHECK(s.observe(0, x.id, tokens_only(3), &good) == status::bad_argument);  // H2O wants queries
  CHECK(s.observe(0, x.id, rows(38), &good) == status::capacity_exceeded);
  CHECK(s.end_prompt(0, x.id) == status::bad_argument);
  CHECK(s.end_prompt(x.id) == status::bad_argument);
  CHECK(s.observe(0, y.id, rows(3), &good) == status::bad_order);  // the buffer is x's
  CHECK(s.end_prompt(0, y.id, &good) == status::bad_order);
  CHECK(s.observe(0, x.id, rows(3), &good) == status::ok);
  CHECK(s.end_prompt(0, x.id, &good) == status::ok);
  index_t id = -1;
  CHECK(s.begin(id, {-1, 4}) == status::unsupported);  // a frozen prefix lies in the cache
  REQUIRE(s.begin(id) == status::ok);
  REQUIRE(s.begin(id) == status::ok);  // an id without a row of the cache
  REQUIRE(id == w.shape.n_seq);
  CHECK(s.observe(0, id, rows(3), &good) == status::bad_argument);
  test::settle_device();
  for (index_t h = 0; h < w.shape.n_kv_heads; ++h)
    CHECK(device.kept(0, x)[uz(h)] == oracle::kept_set{0, 1, 2, 3, 4, 5});
}

TEST_CASE("a transient view has as many slots as its prompt needs") {
  policy_options const o = small(16);
  test::world w;
  w.lim.max_prompt = 40;
  auto const p = make_policy<test::op_context>("h2o", o);
  test::device_engine device(w.options(test::make("h2o", o), 20), p, p);
  auto const words = w.words(1);
  oracle::kept_sets all;
  for (index_t const slots : {40, 39, 27}) {
    INFO(slots << " slots");
    device.transient_slots(slots);
    test::stream s = device.begin(words);
    device.prompt(s, 27, {27});
    if (all.empty()) all = device.kept(1, s);
    CHECK(oracle::count(all[0]) == 16);
    CHECK(device.kept(1, s) == all);
    REQUIRE(device.session().end(s.id) == status::ok);
  }
}

TEST_CASE("coupled layers are cut again in a cache that is larger than any prompt") {
  policy_options o = small(16);
  o.every = 2;
  test::world w;
  w.n_layers = 4;
  w.lim.max_prompt = 40;
  auto const p = make_policy<test::op_context>("dynamickv", o);
  test::device_engine device(w.options(test::make("dynamickv", o), 5000), p, p);
  auto const words = w.words(1);
  test::stream s = device.begin(words);
  device.prompt(s, 40, {40});
  index_t total = 0;
  for (index_t l = 0; l < 4; ++l)
    for (oracle::kept_set const& head : device.kept(l, s)) total += oracle::count(head);
  CHECK(total == 4 * w.shape.n_kv_heads * 16);
}
