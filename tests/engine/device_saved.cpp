// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Sequences of a device session, stored and taken up elsewhere, and what verify finds.
#include "../support/device_engine.hpp"

namespace {

using namespace kvkeep;
using test::bit;
using test::generator;
using test::small;
using test::uz;

/// The state is the backend's: a test may damage it.
template <class T, int R, class Space>
T& damaged(tensor_ref<T const, R, Space> const& t, index_t a, index_t b, index_t c = 0) {
  if constexpr (R == 3)
    return const_cast<T&>(t(a, b, c));
  else
    return const_cast<T&>(t(a, b));
}

}  // namespace

TEST_CASE("a stored sequence goes on in another session") {
  std::vector<std::pair<std::string, policy_options>> cases;
  for (char const* name : {"h2o", "tova", "knorm", "keydiff", "morphkv", "streamingllm", "fullkv"})
    cases.emplace_back(name, small(14));
  for (morph_rows rows : {morph_rows::cached, morph_rows::lazy, morph_rows::direct}) {
    policy_options o = small(20);
    o.window = 9;
    o.evaluation = rows;
    cases.emplace_back("morphkv", o);
  }
  for (auto const& [name, options] : cases)
    test::for_seeds(2, [&, &name = name, &options = options](generator& g) {
      INFO(name);
      test::world w;
      w.layout = g.one_of(test::all_layouts());
      w.seed = g.next();
      auto const p = make_policy<test::op_context>(name, options);
      auto o = w.options(test::make(name, options), w.prompt + 40);
      test::device_engine first(o, p, p), second(o, p, p);
      auto const words = w.words(1), others = w.words(2);
      test::stream a = first.begin(words);
      index_t const n = g.integer(0, w.prompt);
      if (n > 0) first.prompt(a, n, {n});
      index_t const steps = g.integer(1, 12);
      for (index_t t = 0; t < steps; ++t) first.step({&a});
      test::aligned_block const memory(first.session().saved_bytes());
      REQUIRE(first.session().save(a.id, memory.span()) == status::ok);
      test::settle_device();
      // The id has been somebody else's, and is not the one it was.
      test::stream used = second.begin(others, 1);
      second.prompt(used, 9, {9});
      for (int t = 0; t < 8; ++t) second.step({&used});
      REQUIRE(second.session().end(used.id) == status::ok);
      test::stream b = second.begin(words, 1);
      REQUIRE(second.session().load(b.id, memory.span()) == status::ok);
      test::settle_device();
      b.tokens = a.tokens;
      for (index_t l = 0; l < w.n_layers; ++l) REQUIRE(second.kept(l, b) == first.kept(l, a));
      second.copy_rows(first, a, b);
      for (int t = 0; t < 10; ++t) test::require_same(second.step({&b}), first.step({&a}));
      REQUIRE(second.session().faults()[b.id] == 0);
      // No prompt may follow.
      CHECK(second.session().end_prompt(0, b.id, nullptr, b.row) == status::bad_order);
    });
}

TEST_CASE("what does not fit is not loaded") {
  test::world w;
  auto const engine_of = [&](index_t capacity) {
    policy_options const o = small(capacity);
    auto const p = make_policy<test::op_context>("h2o", o);
    return std::make_unique<test::device_engine>(w.options(test::make("h2o", o), 60), p, p);
  };
  auto const from = engine_of(14), other = engine_of(15), same = engine_of(14);
  auto const words = w.words(1);
  test::stream a = from->begin(words);
  from->prompt(a, 20, {20});
  std::size_t const bytes = from->session().saved_bytes();
  test::aligned_block const memory(bytes);
  CHECK(from->session().save(a.id + 1, memory.span()) == status::bad_sequence);
  CHECK(from->session().save(a.id, memory.span(1)) == status::workspace_too_small);
  REQUIRE(from->session().save(a.id, memory.span()) == status::ok);
  test::stream open = from->begin(words);
  from->observe_prompt(open, 0, 0, 5);
  CHECK(from->session().save(open.id, memory.span()) == status::bad_order);
  CHECK(from->session().load(open.id, memory.span()) == status::ok);
  test::settle_device();
  for (index_t l = 0; l < w.n_layers; ++l) CHECK(from->kept(l, open) == from->kept(l, a));

  SECTION("another configuration") {
    test::stream b = other->begin(words);
    REQUIRE(other->session().load(b.id, memory.span()) == status::ok);
    test::settle_device();
    CHECK(other->session().faults()[b.id] == bit(device_fault::bad_save));
    CHECK(other->session().lengths(0)(b.id, 0) == 0);
  }
  SECTION("a damaged header") {
    memory.span()[uz(GENERATE(0, 7, 8, 16, 24))] ^= std::byte{1};
    test::stream b = same->begin(words);
    REQUIRE(same->session().load(b.id, memory.span()) == status::ok);
    test::settle_device();
    CHECK(same->session().faults()[b.id] == bit(device_fault::bad_save));
    CHECK(same->session().lengths(1)(b.id, 1) == 0);
  }
  SECTION("too little, or nowhere") {
    test::stream b = same->begin(words);
    CHECK(same->session().load(b.id, memory.span(1)) == status::bad_argument);
    CHECK(same->session().load(b.id + 1, memory.span()) == status::bad_sequence);
  }
  SECTION("a session on the host") {
    policy_options const o = small(14);
    test::engine host(w.options(test::make("h2o", o), 60), test::make("h2o", o));
    test::stream b = host.begin(words);
    std::vector<std::byte> copy(std::max(host.session().saved_bytes(), bytes));
    std::copy_n(memory.span().data(), bytes, copy.data());
    CHECK(host.session().load(b.id, copy) == status::bad_argument);
  }
}

TEST_CASE("verify finds what cannot be") {
  test::world w;
  policy_options const o = small(12);
  auto const p = make_policy<test::op_context>("knorm", o);
  test::device_engine e(w.options(test::make("knorm", o), 60), p, p);
  auto const words = w.words(1);
  test::stream a = e.begin(words), b = e.begin(words);
  for (auto* const s : {&a, &b}) e.prompt(*s, 20, {20});
  for (int t = 0; t < 3; ++t) e.step({&a, &b});
  auto& s = e.session();
  REQUIRE(s.verify() == status::ok);
  test::settle_device();
  REQUIRE(s.faults()[a.id] == 0);
  auto const find = [&](index_t position) {
    index_t at = 0;
    while (s.positions(1)(a.id, 1, at) != position) ++at;
    return at;
  };
  index_t const n = s.lengths(1)(a.id, 1), last = a.tokens - 1;
  auto const live = e.kept(1, a)[1];
  index_t const middle = live[2], other = live[3];  // nobody protects these
  index_t gone = 1;
  while (std::count(live.begin(), live.end(), gone) > 0) ++gone;
  SECTION("a position twice") { damaged(s.positions(1), a.id, 1, find(middle)) = other; }
  SECTION("a position to come") { damaged(s.positions(1), a.id, 1, find(middle)) = last + 1; }
  SECTION("a negative position") { damaged(s.positions(1), a.id, 1, find(middle)) = -1; }
  SECTION("a sink is gone") { damaged(s.positions(1), a.id, 1, find(0)) = gone; }
  SECTION("the newest token is gone") { damaged(s.positions(1), a.id, 1, find(last)) = gone; }
  SECTION("more tokens than the budget") {
    damaged(s.lengths(1), a.id, 1) = n + 1;
    damaged(s.positions(1), a.id, 1, n) = gone;
  }
  SECTION("more slots than there are") { damaged(s.lengths(1), a.id, 1) = 1000; }
  SECTION("a hole beyond the slots in use") { damaged(s.free_slots(1), a.id, 1) = n; }
  REQUIRE(s.verify() == status::ok);
  test::settle_device();
  CHECK(s.faults()[a.id] == bit(device_fault::corrupt));
  CHECK(s.faults()[b.id] == 0);
}
