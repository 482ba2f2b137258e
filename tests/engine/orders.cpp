// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Calls in orders that engines seldom make, to both kinds of session over plain arrays: nothing is lost, and what
// cannot be is refused before anything changes.
#include <kvkeep/kvkeep.hpp>

#include "../support/plain_model.hpp"

using namespace kvkeep;
using namespace kvkeep::test;

namespace {

/// A session of one layer of 32 slots.
struct small_cache : plain_model {
  small_cache() { add(32); }
  kv_ref<> transient(index_t slots) {
    rows.push_back(numbers(uz(slots * plain_dim)));
    cache_shape s = shape(slots);
    s.n_seq = 1;
    return contiguous_view(rows.back().data(), rows.back().data(), s);
  }
};

/// Positions that a sequence holds, ascending.
template <class S>
std::vector<index_t> held(S const& s, index_t id) {
  std::vector<index_t> all;
  for (index_t t = 0; t < s.lengths(0)(id, 0); ++t)
    if (t != s.free_slots(0)(id, 0)) all.push_back(s.positions(0)(id, 0, t));
  std::sort(all.begin(), all.end());
  return all;
}
std::vector<index_t> first(index_t n) {
  std::vector<index_t> all(uz(n));
  std::iota(all.begin(), all.end(), 0);
  return all;
}

template <class S>
status step(S& s, index_t id) {
  one const b{id};
  std::vector<float> const q(2 * plain_dim, 0.5F);
  std::vector<float> out(2 * plain_dim);
  index_t slot = -1;
  KVKEEP_TRY(s.append(0, of(s, b), &slot));
  return s.attend(0, of(s, b), make_queries(q.data(), 2, 1, plain_dim), out.data());
}

}  // namespace

TEMPLATE_TEST_CASE("a plan that was chosen before a prompt is stale after it", "", std::false_type,
                   std::true_type) {
  for (index_t const tokens : {20, 6}) {  // cut, and not
    small_cache m;
    m.lim.engine_commits = true;
    auto s = m.bind(TestType{}, make_knorm({.capacity = 8}));
    index_t id = 0;
    REQUIRE(s.begin(id) == status::ok);
    plan<> p;
    REQUIRE(s.choose(of(s, one{id}), p) == status::ok);
    REQUIRE(s.observe(0, id, tokens_only(tokens)) == status::ok);
    REQUIRE(s.end_prompt(id) == status::ok);
    auto const before = held(s, id);
    CHECK(before.size() == uz(std::min(tokens, 8)));
    status const said = s.commit(p);
    if constexpr (TestType::value)
      CHECK(s.faults()[id] == static_cast<index_t>(device_fault::stale_plan));
    else
      CHECK(said == status::stale_plan);
    CHECK(held(s, id) == before);
    CHECK(s.verify() == status::ok);
  }
}

TEMPLATE_TEST_CASE("a prompt that nobody cuts leaves its buffer whole, whatever shares a set", "",
                   std::false_type, std::true_type) {
  for (scope const per : {scope::head, scope::layer, scope::sequence}) {
    small_cache m;
    m.lim.max_prompt = 16;
    kv_ref<> const prompt = m.transient(16);
    policy_options o;
    o.per = per;
    auto s = m.bind(TestType{}, make_policy<cpu::context>("fullkv", o));
    index_t id = 0;
    REQUIRE(s.begin(id) == status::ok);
    REQUIRE(s.observe(0, id, tokens_only(10), &prompt) == status::ok);
    REQUIRE(s.end_prompt(0, id, &prompt) == status::ok);
    CHECK(held(s, id) == first(10));
  }
}

TEMPLATE_TEST_CASE("the buffer of transient prompts has one owner until its layer has ended", "",
                   std::false_type, std::true_type) {
  small_cache m;
  m.lim.max_prompt = 16;
  kv_ref<> const prompt = m.transient(16);
  auto s = m.bind(TestType{}, make_knorm({.capacity = 8}));
  index_t a = 0, b = 0, c = 0;
  REQUIRE(s.begin(a) == status::ok);
  REQUIRE(s.begin(b) == status::ok);
  REQUIRE(s.observe(0, a, tokens_only(4), &prompt) == status::ok);
  CHECK(s.observe(0, b, tokens_only(16), &prompt) == status::bad_order);
  CHECK(s.end_prompt(0, b, &prompt) == status::bad_order);
  std::vector<std::byte> saved(s.saved_bytes());
  CHECK(s.save(a, saved) == status::bad_order);
  REQUIRE(s.end(b) == status::ok);
  CHECK(s.fork(a, c) == status::bad_order);
  REQUIRE(s.observe(0, a, tokens_only(2), &prompt) == status::ok);
  REQUIRE(s.end_prompt(0, a, &prompt) == status::ok);
  CHECK(held(s, a) == first(6));
  // It is free again: by an end of the prompt, and of the sequence.
  REQUIRE(s.begin(b) == status::ok);
  REQUIRE(s.observe(0, b, tokens_only(16), &prompt) == status::ok);
  REQUIRE(s.end(b) == status::ok);
  REQUIRE(s.begin(c) == status::ok);
  REQUIRE(s.observe(0, c, tokens_only(7), &prompt) == status::ok);
  REQUIRE(s.end_prompt(0, c, &prompt) == status::ok);
  CHECK(held(s, c) == first(7));
  CHECK(held(s, a) == first(6));
  CHECK(s.verify() == status::ok);
}

TEMPLATE_TEST_CASE(
    "what a prompt has gathered of its queries goes with a copy and with saved state", "",
    std::false_type, std::true_type) {
  small_cache m;
  auto const write_rows = [&kv = m.rows.front()] {  // of both sequences the same
    auto const half = numbers(kv.size() / 2);
    std::copy(half.begin(), half.end(), std::copy(half.begin(), half.end(), kv.begin()));
  };
  write_rows();
  auto s = m.bind(TestType{}, make_expected_attention({.capacity = 8, .sinks = 2}));
  std::vector<float> q = numbers(2 * 24 * plain_dim);
  for (float& x : q) x *= 20;
  auto const observe = [&](index_t id, index_t from, index_t n) {
    queries chunk = make_queries(q.data(), 2, 24, plain_dim);
    chunk.data = q.data() + offset_t{from} * plain_dim;
    chunk.n_rows = n;
    REQUIRE(s.observe(0, id, chunk) == status::ok);
  };
  index_t whole = 0, part = 0, copy = -1;
  REQUIRE(s.begin(whole) == status::ok);
  observe(whole, 0, 24);
  REQUIRE(s.end_prompt(0, whole) == status::ok);
  auto const want = held(s, whole);
  CHECK(want.size() == 8);
  REQUIRE(s.end(whole) == status::ok);
  write_rows();

  REQUIRE(s.begin(part) == status::ok);
  observe(part, 0, 11);
  REQUIRE(s.fork(part, copy) == status::ok);
  std::vector<std::byte> saved(s.saved_bytes());
  bool const on_host = !TestType::value;  // a device session takes no prompt after such a load
  if (on_host) REQUIRE(s.save(part, saved) == status::ok);
  for (index_t const id : {part, copy}) {
    observe(id, 11, 13);
    REQUIRE(s.end_prompt(0, id) == status::ok);
    CHECK(held(s, id) == want);
    REQUIRE(s.end(id) == status::ok);
  }
  if (!on_host) return;
  index_t loaded = -1;
  write_rows();
  REQUIRE(s.begin(loaded) == status::ok);
  REQUIRE(s.load(loaded, saved) == status::ok);
  observe(loaded, 11, 13);
  REQUIRE(s.end_prompt(0, loaded) == status::ok);
  CHECK(held(s, loaded) == want);
}

TEST_CASE(
    "no token comes before a prompt has ended in all layers, however many drafts there may be") {
  small_cache m;
  m.add(32);
  m.lim.max_draft = 8;
  auto s = m.bind(std::false_type{}, make_knorm({.capacity = 8}));
  index_t a = 0, b = 0;
  REQUIRE(s.begin(a) == status::ok);
  index_t slot = -1;
  for (index_t layer : {0, 1}) {
    REQUIRE(s.observe(layer, a, tokens_only(4)) == status::ok);
    REQUIRE(s.end_prompt(layer, a) == status::ok);
    CHECK(s.append(0, of(s, one{a}), &slot) == (layer == 0 ? status::bad_order : status::ok));
  }
  // Without a prompt, layers take their drafts one after the other.
  REQUIRE(s.begin(b) == status::ok);
  for (index_t layer : {0, 1})
    for (int draft = 0; draft < 3; ++draft) {
      std::vector<float> const q(2 * plain_dim, 0.5F);
      std::vector<float> out(2 * plain_dim);
      REQUIRE(s.append(layer, of(s, one{b}), &slot) == status::ok);
      REQUIRE(s.attend(layer, of(s, one{b}), make_queries(q.data(), 2, 1, plain_dim), out.data()) ==
              status::ok);
    }
  CHECK(s.confirm(of(s, one{b}), 3) == status::ok);
}

TEMPLATE_TEST_CASE("nothing is due for ever: a frozen prefix beyond the budget", "",
                   std::false_type, std::true_type) {
  bool const commits = GENERATE(false, true);
  for (index_t const frozen : {6, 8, 12}) {
    INFO("frozen " << frozen);
    small_cache m;
    m.lim.engine_commits = commits;
    auto s = m.bind(TestType{}, make_knorm({.capacity = 8, .sinks = 0, .window = 2}));
    index_t id = 0;
    REQUIRE(s.begin(id, {-1, frozen}) == status::ok);
    index_t const kept = std::max(8, frozen + 2);
    for (index_t t = 0; t < 30; ++t) {
      REQUIRE(step(s, id) == status::ok);
      if constexpr (!TestType::value) REQUIRE(s.confirm(of(s, one{id}), 1) == status::ok);
      if (commits) {
        plan<> p;
        bool const more = s.lengths(0)(id, 0) > kept;
        if constexpr (!TestType::value) CHECK(s.due(of(s, one{id})) == more);
        REQUIRE(s.choose(of(s, one{id}), p) == status::ok);
        REQUIRE(s.commit(p) == status::ok);
        if constexpr (!TestType::value) CHECK(!s.due(of(s, one{id})));
      }
      CHECK(static_cast<index_t>(held(s, id).size()) == std::min(frozen + t + 1, kept));
      REQUIRE(s.verify() == status::ok);
    }
    auto const all = held(s, id);
    CHECK(std::vector<index_t>(all.begin(), all.begin() + frozen) == first(frozen));
    if constexpr (!TestType::value)
      if (!commits) CHECK(s.count().moved_bytes == 0);
    if constexpr (TestType::value) CHECK(s.faults()[id] == 0);
  }
}

TEST_CASE(
    "nothing is due for ever: whole blocks of sinks and a window that a prompt's budget does not "
    "cover") {
  for (index_t const frozen : {0, 5}) {
    plain_model m;
    m.add_pages(40);
    m.lim.engine_commits = true;
    auto prompt = make_snapkv({.capacity = 7, .window = 4});
    policy<slot_score<key_norm_fn>, inherit, whole_blocks> decode;
    decode.name = "knorm";
    decode.select.block = plain_block;
    decode.keep = {1, 5};
    prompt.per = decode.per = scope::layer;
    auto s = m.bind(std::false_type{}, prompt, decode);
    index_t id = 0;
    REQUIRE(s.begin(id, {-1, frozen}) == status::ok);
    std::vector<float> const q(2 * 12 * plain_dim, 0.5F);
    REQUIRE(s.observe(0, id, make_queries(q.data(), 2, 12, plain_dim)) == status::ok);
    REQUIRE(s.end_prompt(0, id) == status::ok);
    for (index_t t = 0; t < 12; ++t) {
      INFO("frozen " << frozen << " token " << t);
      REQUIRE(step(s, id) == status::ok);
      REQUIRE(s.confirm(of(s, one{id}), 1) == status::ok);
      if (!s.due(of(s, one{id}))) continue;
      plan<> p;
      REQUIRE(s.choose(of(s, one{id}), p) == status::ok);
      REQUIRE(s.commit(p) == status::ok);
      CHECK(!s.due(of(s, one{id})));
      std::vector<index_t> pages(10), sizes(1);
      report_buffer told;
      told.tables = pages;
      told.table_sizes = sizes;
      REQUIRE(s.report(id, told) == status::ok);
      auto const table = m.tables[0].begin();  // what stays, then what is free again
      std::stable_partition(table, table + 10, [&](index_t block) {
        return std::find(pages.begin(), pages.begin() + sizes[0], block) !=
               pages.begin() + sizes[0];
      });
      REQUIRE(s.verify() == status::ok);
    }
  }
}

TEMPLATE_TEST_CASE("a copy keeps what it has frozen", "", std::false_type, std::true_type) {
  small_cache m;
  auto s = m.bind(TestType{}, make_knorm({.capacity = 8, .sinks = 0, .window = 2}));
  index_t id = 0, copy = 0;
  REQUIRE(s.begin(id) == status::ok);
  REQUIRE(s.observe(0, id, tokens_only(8)) == status::ok);
  REQUIRE(s.end_prompt(id) == status::ok);
  REQUIRE(s.fork(id, copy, {-1, 8}) == status::ok);
  for (int t = 0; t < 20; ++t) {
    REQUIRE(step(s, copy) == status::ok);
    if constexpr (!TestType::value) REQUIRE(s.confirm(of(s, one{copy}), 1) == status::ok);
    REQUIRE(s.verify() == status::ok);
  }
  auto const all = held(s, copy);
  CHECK(std::vector<index_t>(all.begin(), all.begin() + 8) == first(8));
  CHECK(all.size() == 10);
}

TEMPLATE_TEST_CASE("scorers of the last queries do not go without them", "", std::false_type,
                   std::true_type) {
  small_cache m;
  m.lim.prompt = prompt_offer::window_queries;
  auto s = m.bind(TestType{}, make_snapkv({.capacity = 8, .window = 4}));
  std::vector<float> const q(2 * 4 * plain_dim, 0.5F);
  auto const end_after = [&](index_t rows, index_t tokens_after) {
    index_t id = 0;
    REQUIRE(s.begin(id) == status::ok);
    queries last = make_queries(q.data(), 2, rows, plain_dim);
    last.tokens = 20;
    REQUIRE(s.observe(0, id, last) == status::ok);
    if (tokens_after > 0) REQUIRE(s.observe(0, id, tokens_only(tokens_after)) == status::ok);
    auto const before = held(s, id);
    status const said = s.end_prompt(0, id);
    if (said != status::ok) CHECK(held(s, id) == before);
    REQUIRE(s.end(id) == status::ok);
    return said;
  };
  CHECK(end_after(4, 0) == status::ok);
  CHECK(end_after(3, 0) == status::bad_order);
  CHECK(end_after(4, 1) == status::bad_order);
}

TEMPLATE_TEST_CASE("a prompt that is shorter than its budget needs no queries", "", std::false_type,
                   std::true_type) {
  small_cache m;
  m.lim.prompt = prompt_offer::window_queries;
  auto s = m.bind(TestType{}, make_snapkv({.capacity = 16, .window = 4}));
  index_t id = 0;
  for (index_t const tokens : {15, 17}) {
    REQUIRE(s.begin(id) == status::ok);
    REQUIRE(s.observe(0, id, tokens_only(tokens)) == status::ok);
    CHECK(s.end_prompt(0, id) == (tokens < 16 ? status::ok : status::bad_order));
    CHECK(held(s, id) == first(tokens));
    REQUIRE(s.end(id) == status::ok);
  }
}

TEMPLATE_TEST_CASE("what a prompt leaves a late policy is no alarm", "", std::false_type,
                   std::true_type) {
  small_cache m;
  auto const prompt = make_snapkv({.capacity = 16, .window = 4});
  morphkv_options o{.capacity = 8, .window = 4};
  o.include_current = true;
  auto s = m.bind(TestType{}, prompt, make_morphkv(o));
  std::vector<float> const q(2 * 20 * plain_dim, 0.5F);
  index_t id = 0;
  REQUIRE(s.begin(id) == status::ok);
  REQUIRE(s.observe(0, id, make_queries(q.data(), 2, 20, plain_dim)) == status::ok);
  REQUIRE(s.end_prompt(id) == status::ok);
  CHECK(held(s, id).size() == 16);
  CHECK(s.verify() == status::ok);
  for (int t = 0; t < 6; ++t) {
    REQUIRE(step(s, id) == status::ok);
    if constexpr (!TestType::value) REQUIRE(s.confirm(of(s, one{id}), 1) == status::ok);
    CHECK(s.verify() == status::ok);
  }
  CHECK(held(s, id).size() <= 10);
  if constexpr (TestType::value) CHECK(s.faults()[id] == 0);
}

TEMPLATE_TEST_CASE("a copy freezes no more than the tokens that are still there, in a row", "",
                   std::false_type, std::true_type) {
  small_cache m;
  m.n_seq = m.lim.max_sequences = 4;
  auto s = m.bind(TestType{}, make_knorm({.capacity = 8}));
  index_t id = 0, copy = -1;
  REQUIRE(s.begin(id) == status::ok);
  REQUIRE(s.observe(0, id, tokens_only(16)) == status::ok);
  REQUIRE(s.end_prompt(id) == status::ok);
  index_t run = 0;
  for (auto const all = held(s, id); run < 8 && all[uz(run)] == run;) ++run;
  REQUIRE(run < 8);
  for (index_t const n : {16, run + 1}) {
    status const said = s.fork(id, copy, {-1, n});
    if constexpr (TestType::value) {  // which can only see it later
      REQUIRE(said == status::ok);
      CHECK(s.faults()[copy] == static_cast<index_t>(device_fault::bad_prefix));
    } else {
      CHECK(said == status::bad_argument);
      CHECK(copy == -1);
    }
  }
  CHECK(s.fork(id, copy, {-1, 33}) == status::bad_argument);
  CHECK(s.fork(id, copy, {-1, run}) == status::ok);
  CHECK(s.verify() == status::ok);
  if constexpr (TestType::value)
    for (index_t const i : {id, copy}) CHECK(s.faults()[i] == 0);
}

TEST_CASE(
    "a token comes to no layer before the prompt has ended in all, nor a prompt after a token") {
  small_cache m;
  m.add(32);
  auto s = m.bind(std::false_type{}, make_knorm({.capacity = 8}));
  index_t id = 0, other = 0;
  REQUIRE(s.begin(id) == status::ok);
  one const b{id};
  index_t slot = -1;
  REQUIRE(s.observe(0, id, tokens_only(10)) == status::ok);
  CHECK(s.append(1, b.host(), &slot) == status::bad_order);  // open in the other layer
  REQUIRE(s.end_prompt(0, id) == status::ok);
  CHECK(s.append(1, b.host(), &slot) == status::bad_order);  // ended there
  REQUIRE(s.observe(1, id, tokens_only(10)) == status::ok);
  REQUIRE(s.end_prompt(1, id) == status::ok);
  CHECK(s.append(1, b.host(), &slot) == status::ok);

  REQUIRE(s.begin(other) == status::ok);
  REQUIRE(s.append(0, one{other}.host(), &slot) == status::ok);
  CHECK(s.observe(1, other, tokens_only(3)) == status::bad_order);
  CHECK(s.end_prompt(1, other) == status::bad_order);
  CHECK(s.lengths(1)(other, 0) == 0);
  CHECK(s.append(1, one{other}.host(), &slot) == status::ok);
  CHECK(s.verify() == status::ok);
}

TEMPLATE_TEST_CASE("what waits for other layers is no alarm", "", std::false_type, std::true_type) {
  std::vector<float> const q(2 * plain_dim, 0.5F);
  std::vector<float> out(2 * plain_dim);
  for (bool const one_set : {true, false}) {
    INFO("one set " << one_set);
    small_cache m;
    m.add(32);
    policy_options o;
    o.capacity = 8;
    o.window = 2;
    o.sinks = 1;
    if (one_set) o.per = scope::sequence;
    auto s = m.bind(TestType{}, make_policy<cpu::context>(one_set ? "knorm" : "dynamickv", o),
                    make_policy<cpu::context>("knorm", o));
    index_t id = 0;
    REQUIRE(s.begin(id) == status::ok);
    for (index_t l : {0, 1}) {
      std::vector<float> const all(2 * 20 * plain_dim, 0.5F);
      REQUIRE(s.observe(l, id, make_queries(all.data(), 2, 20, plain_dim)) == status::ok);
      REQUIRE(s.end_prompt(l, id) == status::ok);
      CHECK(s.verify() == status::ok);
    }
    for (index_t l : {0, 1, 0, 1}) {
      index_t slot = -1;
      REQUIRE(s.append(l, of(s, one{id}), &slot) == status::ok);
      CHECK(s.verify() == status::ok);
      REQUIRE(s.attend(l, of(s, one{id}), make_queries(q.data(), 2, 1, plain_dim), out.data()) ==
              status::ok);
      CHECK(s.verify() == status::ok);
      if constexpr (!TestType::value)
        if (l == 1) REQUIRE(s.confirm(one{id}.host(), 1) == status::ok);
    }
    if constexpr (TestType::value) CHECK(s.faults()[id] == 0);
  }
}

TEMPLATE_TEST_CASE("a late policy's prompt is whole until its first token was attended to", "",
                   std::false_type, std::true_type) {
  small_cache m;
  morphkv_options o{.capacity = 8, .window = 4};
  o.include_current = true;
  auto s = m.bind(TestType{}, make_morphkv(o));
  std::vector<float> const q(2 * 20 * plain_dim, 0.5F);
  index_t id = 0, slot = -1;
  REQUIRE(s.begin(id) == status::ok);
  REQUIRE(s.observe(0, id, make_queries(q.data(), 2, 20, plain_dim)) == status::ok);
  REQUIRE(s.end_prompt(id) == status::ok);
  REQUIRE(s.append(0, of(s, one{id}), &slot) == status::ok);
  CHECK(s.verify() == status::ok);
  if constexpr (TestType::value) CHECK(s.faults()[id] == 0);
}

TEMPLATE_TEST_CASE("state is loaded into a sequence in the middle of its prompt, too", "",
                   std::false_type, std::true_type) {
  for (bool const transient : {false, true}) {
    small_cache m;
    if (transient) m.lim.max_prompt = 32;
    auto const prompt = m.transient(32);
    auto const* const view = transient ? &prompt : nullptr;
    auto s = m.bind(TestType{}, make_knorm({.capacity = 8}));
    index_t a = 0, b = 0;
    REQUIRE(s.begin(a) == status::ok);
    REQUIRE(s.observe(0, a, tokens_only(12), view) == status::ok);
    REQUIRE(s.end_prompt(0, a, view) == status::ok);
    auto const kept = held(s, a);
    std::vector<std::byte> saved(s.saved_bytes());
    REQUIRE(s.save(a, saved) == status::ok);
    REQUIRE(s.end(a) == status::ok);
    REQUIRE(s.begin(a) == status::ok);
    REQUIRE(s.observe(0, a, tokens_only(5), view) == status::ok);
    REQUIRE(s.load(a, saved) == status::ok);
    CHECK(held(s, a) == kept);
    // Nobody waits for the buffer.
    REQUIRE(s.begin(b) == status::ok);
    CHECK(s.observe(0, b, tokens_only(9), view) == status::ok);
    CHECK(step(s, a) == status::ok);
    if constexpr (TestType::value) CHECK(s.faults()[a] == 0);
  }
}

TEMPLATE_TEST_CASE("the end of a prompt in all layers is all or nothing", "", std::false_type,
                   std::true_type) {
  small_cache m;
  m.add(32);
  auto s = m.bind(TestType{}, make_knorm({.capacity = 8}));
  index_t id = 0;
  REQUIRE(s.begin(id) == status::ok);
  REQUIRE(s.observe(0, id, tokens_only(10)) == status::ok);
  CHECK(s.end_prompt(id) == status::bad_order);
  REQUIRE(s.observe(1, id, tokens_only(10)) == status::ok);
  for (index_t l : {0, 1}) REQUIRE(s.observe(l, id, tokens_only(2)) == status::ok);
  CHECK(s.end_prompt(id) == status::ok);
  CHECK(held(s, id).size() == 8);
}

TEMPLATE_TEST_CASE("a prompt that lacks queries in a later layer ends in none", "", std::false_type,
                   std::true_type) {
  small_cache m;
  m.add(32);
  m.lim.prompt = prompt_offer::window_queries;
  auto s = m.bind(TestType{}, make_snapkv({.capacity = 8, .window = 4}));
  std::vector<float> const q(2 * 4 * plain_dim, 0.5F);
  index_t id = 0;
  REQUIRE(s.begin(id) == status::ok);
  queries last = make_queries(q.data(), 2, 4, plain_dim);
  last.tokens = 20;
  REQUIRE(s.observe(0, id, last) == status::ok);
  REQUIRE(s.observe(1, id, tokens_only(20)) == status::ok);
  CHECK(s.end_prompt(id) == status::bad_order);
  CHECK(held(s, id) == first(20));
  // It goes on with a chunk that shows them.
  for (index_t l : {0, 1})
    REQUIRE(s.observe(l, id, make_queries(q.data(), 2, 4, plain_dim)) == status::ok);
  CHECK(s.end_prompt(id) == status::ok);
  CHECK(held(s, id).size() == 8);
}

TEST_CASE("two sequences of a batch have rows of their own") {
  small_cache m;
  auto s = m.bind(std::false_type{}, make_knorm({.capacity = 8}));
  index_t ids[] = {0, 0}, slots[] = {-7, -7};
  for (index_t& id : ids) REQUIRE(s.begin(id) == status::ok);
  index_t const same[] = {1, 1}, own[] = {1, 0};
  CHECK(s.append(0, {ids, same}, slots) == status::bad_argument);
  CHECK(slots[0] == -7);
  CHECK(s.append(0, {ids, own}, slots) == status::ok);
}

TEST_CASE("what is saved of a sequence says nothing of who had its id before") {
  auto const saved = [](bool used) {
    small_cache m;
    auto s = m.bind(std::false_type{}, make_morphkv({.capacity = 8, .window = 4}));
    std::vector<float> q(2 * 20 * plain_dim, 0.25F);
    index_t id = 0;
    if (used) {
      REQUIRE(s.begin(id) == status::ok);
      for (std::size_t i = 0; i < q.size(); ++i) q[i] = static_cast<float>(i % 7);
      REQUIRE(s.observe(0, id, make_queries(q.data(), 2, 20, plain_dim)) == status::ok);
      REQUIRE(s.end_prompt(id) == status::ok);
      for (int t = 0; t < 9; ++t) {
        REQUIRE(step(s, id) == status::ok);
        REQUIRE(s.confirm(of(s, one{id}), 1) == status::ok);
      }
      REQUIRE(s.end(id) == status::ok);
      std::fill(q.begin(), q.end(), 0.25F);
      auto const keys = numbers(m.rows[0].size());  // the cut has moved them
      std::copy(keys.begin(), keys.end(), m.rows[0].begin());
    }
    REQUIRE(s.begin(id) == status::ok);
    REQUIRE(s.observe(0, id, make_queries(q.data(), 2, 3, plain_dim)) == status::ok);
    REQUIRE(s.end_prompt(id) == status::ok);
    std::vector<std::byte> bytes(s.saved_bytes());
    REQUIRE(s.save(id, bytes) == status::ok);
    return bytes;
  };
  CHECK(saved(false) == saved(true));
}

TEST_CASE("saved state of another kind of decoding, or damaged, is refused and changes nothing") {
  small_cache m;
  m.lim.decode = decode_offer::nothing;
  auto s = m.bind(std::false_type{}, make_knorm({.capacity = 8}));
  index_t id = 0, other = 0;
  REQUIRE(s.begin(id) == status::ok);
  REQUIRE(s.observe(0, id, tokens_only(10)) == status::ok);
  std::vector<std::byte> saved(s.saved_bytes());
  REQUIRE(s.save(id, saved) == status::ok);  // in a prompt that lies in the cache itself
  REQUIRE(s.begin(other) == status::ok);
  for (std::size_t const at : {saved.size() / 2, saved.size() - 1}) {
    auto damaged = saved;
    damaged[at] ^= std::byte{4};
    CHECK(s.load(other, damaged) == status::bad_argument);
  }
  CHECK(held(s, other).empty());
  REQUIRE(s.load(other, saved) == status::ok);
  CHECK(held(s, other) == first(10));
  REQUIRE(s.end_prompt(other) == status::ok);

  small_cache n;
  auto attends = n.bind(std::false_type{}, make_knorm({.capacity = 8}));
  REQUIRE(attends.begin(other) == status::ok);
  CHECK(attends.load(other, saved) == status::bad_argument);
  small_cache passes;
  passes.lim.decode = decode_offer::nothing;
  passes.lim.max_prompt = 16;
  auto transient = passes.bind(std::false_type{}, make_knorm({.capacity = 8}));
  REQUIRE(transient.begin(other) == status::ok);
  CHECK(transient.load(other, saved) == status::bad_order);
}

TEST_CASE("a device session says so where a sequence is twice in a batch") {
  plain_model m;
  m.n_seq = m.lim.max_sequences = 3;
  m.add(32);
  auto s = m.bind(std::true_type{}, make_fullkv());
  index_t id = 0, other = 0;
  REQUIRE(s.begin(id) == status::ok);
  REQUIRE(s.begin(other) == status::ok);
  REQUIRE(s.observe(0, id, tokens_only(31)) == status::ok);
  REQUIRE(s.observe(0, other, tokens_only(5)) == status::ok);
  REQUIRE(s.end_prompt(id) == status::ok);
  REQUIRE(s.end_prompt(other) == status::ok);
  index_t const ids[] = {id, id, other};
  index_t slots[] = {-7, -7, -7};
  REQUIRE(s.append(0, {3, ids, ids}, slots) == status::ok);
  CHECK(slots[0] == 31);
  CHECK(slots[1] == -1);
  CHECK(slots[2] == 5);
  CHECK(s.faults()[id] == static_cast<index_t>(device_fault::bad_order));
  CHECK(s.faults()[other] == 0);
  CHECK(held(s, other) == first(6));
}

TEST_CASE("a device session says so where a prompt comes after a token") {
  small_cache m;
  auto s = m.bind(std::true_type{}, make_knorm({.capacity = 8}));
  index_t id = 0;
  REQUIRE(s.begin(id) == status::ok);
  for (int t = 0; t < 5; ++t) REQUIRE(step(s, id) == status::ok);
  REQUIRE(s.observe(0, id, tokens_only(3)) == status::ok);
  CHECK(s.faults()[id] == static_cast<index_t>(device_fault::bad_order));
  CHECK(held(s, id) == first(5));
  CHECK(s.tokens(0)[id] == 5);

  index_t other = 0;
  REQUIRE(s.begin(other) == status::ok);
  REQUIRE(step(s, other) == status::ok);
  REQUIRE(s.end_prompt(0, other) == status::ok);
  CHECK(s.faults()[other] == static_cast<index_t>(device_fault::bad_order));
}
