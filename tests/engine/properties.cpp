// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// What holds for every policy: guards and counts, threads, chunks, head order, memory, verify.
#include "../support/catch.hpp"
#include "../support/prompt_reference.hpp"
#include "../support/run_op.hpp"
#include "../support/session_run.hpp"

using namespace kvkeep;
using namespace kvkeep::test;

namespace {

bool has(std::vector<decode_case> const& cases, std::string_view name) {
  return std::any_of(cases.begin(), cases.end(),
                     [&](decode_case const& c) { return name == c.policy.name; });
}

/// The decode forms, and every other policy of the table, small.
std::vector<decode_case> every_case() {
  std::vector<decode_case> cases = all_decode_cases();
  policy_options o;
  o.capacity = 16;
  o.window = 4;
  o.kernel = 3;
  o.every = 2;
  o.r_max = 2;
  o.lag = 3;
  o.sinks = 1;
  list_policies([&](policy_info const& i) {
    if (!has(cases, i.name)) cases.push_back({i.name, make(i.name, o), false, nullptr});
  });
  return cases;
}

struct run_result {
  std::vector<std::vector<token_record>> steps;
  std::vector<std::byte> state;
};

run_result run(decode_case const& c, world const& w, engine_options o, text const& words,
               prompt_options const& how = {}, index_t steps = 30) {
  engine e(std::move(o), c.policy);
  stream s = e.begin(words);
  e.prompt(s, w.prompt, how);
  run_result r;
  for (index_t i = 0; i < steps; ++i) r.steps.push_back(e.step({&s}));
  e.check({&s});
  r.state.resize(e.session().saved_bytes());
  REQUIRE(e.session().save(s.id, r.state) == status::ok);
  return r;
}

/// Heads in another order.
text permuted(text const& t, std::vector<index_t> const& order, index_t group) {
  text p;
  for (auto const& l : t.layer) {
    oracle::tokens x = l;
    auto const move = [&](oracle::array const& from, oracle::array& to, index_t per) {
      for (std::size_t h = 0; h < order.size(); ++h)
        for (index_t g = 0; g < per; ++g)
          for (index_t i = 0; i < from.extent(1); ++i)
            for (index_t d = 0; d < from.extent(2); ++d)
              to.at(static_cast<index_t>(h) * per + g, i, d) = from.at(order[h] * per + g, i, d);
    };
    move(l.q, x.q, group);
    move(l.k, x.k, 1);
    move(l.v, x.v, 1);
    p.layer.push_back(std::move(x));
  }
  return p;
}

index_t& position_at(any_session& s, index_t l, index_t id, index_t h, index_t slot) {
  return const_cast<index_t&>(s.positions(l)(id, h, slot));
}

}  // namespace

TEST_CASE("every policy that cuts while decoding has a case with an oracle") {
  auto const cases = all_decode_cases();
  list_policies([&](policy_info const& i) {
    INFO(i.name);
    if (i.at_decode && std::string_view(i.name) != "observed_attention")  // H2O's by age
      CHECK(has(cases, i.name));
  });
}

TEST_CASE("one thread and three give the same bits") {
  cpu::thread_pool pool(3);
  cpu::context three{&pool};
  for (decode_case const& c : every_case())
    for (layout_id const layout : {layout_id::hnd, layout_id::tiled}) {
      INFO(c.name << ", " << layout);
      world w;
      w.layout = layout;
      w.shape = {3, 6, 3, 8, 6, 0};
      text const words = w.words();
      engine_options o = w.options(c.policy, 80);
      auto const one = run(c, w, o, words);
      o.ctx = &three;
      auto const many = run(c, w, o, words);
      for (std::size_t i = 0; i < one.steps.size(); ++i) require_same(one.steps[i], many.steps[i]);
      CHECK(one.state == many.state);
    }
}

TEST_CASE("any chunks of a prompt, in any pieces of max_chunk, give the same set") {
  for (decode_case const& c : every_case()) {
    if (!c.policy.score.traits().chunk_invariant) continue;
    for_seeds(3, [&](generator& g) {
      INFO(c.name);
      world w;
      w.seed = g.next();
      w.prompt = 37;
      text const words = w.words();
      engine_options o = w.options(c.policy, 80);
      auto const whole = run(c, w, o, words);
      prompt_options how;
      for (index_t left = w.prompt; left > 0; left -= how.chunks.back())
        how.chunks.push_back(std::min(left, g.integer(1, 12)));
      o.lim.max_chunk = g.integer(1, 9);
      auto const parts = run(c, w, o, words, how);
      for (std::size_t i = 0; i < whole.steps.size(); ++i)
        require_same(whole.steps[i], parts.steps[i], false);
    });
  }
}

TEST_CASE("permuting the KV heads permutes the kept sets") {
  for (decode_case const& c : every_case()) {
    // One set for all heads has no order; AdaKV gives odd units to lower heads.
    if (c.policy.width() != scope::head || c.policy.budget.traits().varies_over_heads) continue;
    for_seeds(2, [&](generator& g) {
      INFO(c.name);
      world w;
      w.shape = {1, 6, 3, 8, 6, 0};
      w.seed = g.next();
      text const words = w.words();
      auto const order = g.permutation(3);
      text const other = permuted(words, order, 2);
      engine_options const o = w.options(c.policy, 80);
      auto const a = run(c, w, o, words), b = run(c, w, o, other);
      for (std::size_t i = 0; i < a.steps.size(); ++i)
        for (std::size_t l = 0; l < a.steps[i].size(); ++l)
          for (std::size_t h = 0; h < 3; ++h)
            REQUIRE(b.steps[i][l].done[h] == a.steps[i][l].done[uz(order[h])]);
    });
  }
}

TEST_CASE("counts equal budgets and guarded tokens stay") {
  for (decode_case const& c : all_decode_cases()) {
    INFO(c.name);
    world w;
    text const words = w.words();
    engine e(w.options(c.policy), c.policy);
    stream s = e.begin(words);
    e.prompt(s, w.prompt);
    index_t const k = c.policy.budget.capacity(), needed = e.session().slots_needed();
    bool const bursts = c.policy.when.evict_after > 1;
    for (index_t step = 0; step < 50; ++step) {
      auto const r = e.step({&s});
      for (auto const& t : r)
        for (index_t h = 0; h < 2; ++h) {
          auto const& done = t.done[uz(h)];
          index_t const extra = is_plain(c) ? -c.policy.when.room : 1;
          if (!bursts) REQUIRE(oracle::count(done) == k + extra);
          // Decisions that wait for a token's own query see the whole prompt once.
          if (is_plain(c) || step > 0) REQUIRE(oracle::count(t.appended[uz(h)]) <= needed);
          guard const keep = c.policy.keep;
          for (index_t i = 0; i < keep.recent; ++i)
            REQUIRE(done[done.size() - 1 - uz(i)] == s.tokens - 1 - i);
          for (index_t i = 0; i < keep.sinks; ++i) REQUIRE(done[uz(i)] == i);
        }
      e.check({&s});
      CHECK(e.session().tokens(s.id) == s.tokens);
    }
    counters const n = e.session().count();
    CHECK(n.tokens == 2 * s.tokens);
    std::int64_t live = 0;
    for (index_t l = 0; l < 2; ++l)
      for (auto const& h : e.kept(l, s)) live += oracle::count(h);
    CHECK(n.evicted == 4 * std::int64_t{s.tokens} - live);
    CHECK(n.freed_bytes == n.evicted * (8 + 6) * 4);
    if (!bursts && is_plain(c)) CHECK(n.victims == 50 * 2 * 2);
  }
}

TEST_CASE("a steady state moves no byte") {
  for (decode_case const& c : all_decode_cases()) {
    if (c.policy.when.evict_after > 1) continue;
    INFO(c.name);
    world w;
    text const words = w.words();
    engine e(w.options(c.policy), c.policy);
    stream s = e.begin(words);
    e.prompt(s, w.prompt);
    (void)e.step({&s});
    auto const moved = e.session().count().moved_bytes;
    auto const cuts = e.session().count().cuts;
    for (index_t step = 0; step < 30; ++step) (void)e.step({&s});
    CHECK(e.session().count().moved_bytes == moved);
    CHECK(e.session().count().cuts == cuts);
  }
}

TEST_CASE("a session works in exactly the memory that it names, and is refused less") {
  for (decode_case const& c : every_case())
    for (bool const layers : {false, true}) {
      INFO(c.name << (layers ? ", concurrent layers" : ""));
      world w;
      w.lim.concurrent_layers = layers;
      w.lim.max_chunk = 6;
      text const words = w.words();
      engine reference(w.options(c.policy, 60), c.policy);
      cpu::context ctx;
      limits lim = w.lim;
      lim.max_sequences = 3;
      auto const specs = reference.specs();
      std::size_t const n = session_bytes(ctx, c.policy, c.policy, specs, lim);
      CHECK(n == reference.session().bytes());
      aligned_block const block(n);
      std::string const message =
          refusal([&] { (void)bind_session(ctx, c.policy, c.policy, specs, lim, block.span(1)); });
      CHECK(message.find("memory.size = " + std::to_string(n - 1)) != std::string::npos);
      CHECK(message.find(std::to_string(n)) != std::string::npos);
      // Memory full of garbage: nothing is read before it is written.
      auto s = bind_session(ctx, c.policy, c.policy, specs, lim, block.span());
      index_t id = -1;
      REQUIRE(s.begin(id) == status::ok);
      stream x = reference.begin(words, {}, id);
      REQUIRE(reference.session().end(x.id) == status::ok);
      std::vector<index_t> slots(2);
      std::vector<float> out(24);
      for (index_t l = 0; l < 2; ++l) {
        for (index_t h = 0; h < 2; ++h)
          for (index_t t = 0; t < 30; ++t) reference.write(reference.cache(l), x, id, l, h, t, t);
        auto const q = reference.query_rows(x, l, 0, 30);
        REQUIRE(s.observe(l, id, make_queries(q.data(), 4, 30, 8)) == status::ok);
        REQUIRE(s.end_prompt(l, id) == status::ok);
      }
      index_t const ids[] = {id};
      for (index_t t = 30; t < 50; ++t) {
        for (index_t l = 0; l < 2; ++l) {
          REQUIRE(s.append(l, {ids, {}}, slots.data()) == status::ok);
          for (index_t h = 0; h < 2; ++h)
            reference.write(reference.cache(l), x, id, l, h, slots[uz(h)], t);
          auto const q = reference.query_rows(x, l, t, 1);
          REQUIRE(s.attend(l, {ids, {}}, make_queries(q.data(), 4, 1, 8), out.data()) ==
                  status::ok);
        }
        REQUIRE(s.confirm({ids, {}}, 1) == status::ok);
        REQUIRE(s.verify() == status::ok);
      }
      CHECK(s.count().scratch_peak <= s.count().scratch_bytes);
    }
}

TEST_CASE("verify finds what does not belong") {
  for (decode_case const& c : all_decode_cases()) {
    INFO(c.name);
    world w;
    text const words = w.words();
    engine e(w.options(c.policy), c.policy);
    stream s = e.begin(words);
    e.prompt(s, w.prompt);
    for (index_t i = 0; i < 20; ++i) (void)e.step({&s});
    auto& x = e.session();
    REQUIRE(x.verify() == status::ok);
    index_t const n = x.lengths(1)(s.id, 1), hole = x.free_slots(1)(s.id, 1);
    auto const slot_of = [&](index_t position) {
      for (index_t t = 0; t < n; ++t)
        if (t != hole && x.positions(1)(s.id, 1, t) == position) return t;
      return index_t{-1};
    };
    auto const tampered = [&](index_t slot, index_t value) {
      REQUIRE(slot >= 0);
      index_t& p = position_at(x, 1, s.id, 1, slot);
      index_t const before = p;
      p = value;
      status const found = x.verify();
      p = before;
      REQUIRE(x.verify() == status::ok);
      return found;
    };
    index_t const a = hole == 0 ? 1 : 0, b = hole == a + 1 ? a + 2 : a + 1;
    CHECK(tampered(a, x.positions(1)(s.id, 1, b)) == status::duplicate_position);
    CHECK(tampered(a, -1) == status::corrupt);
    CHECK(tampered(a, s.tokens) == status::corrupt);
    auto const kept = e.kept(1, s)[1];
    index_t gone = 0;
    while (std::binary_search(kept.begin(), kept.end(), gone)) ++gone;
    // An old free position in the place of a protected token.
    if (c.policy.keep.recent > 0)
      CHECK(tampered(slot_of(s.tokens - 1), gone) == status::lost_token);
    if (c.policy.keep.sinks > 0) CHECK(tampered(slot_of(0), gone) == status::lost_token);
    // Slots that nobody evicted.
    auto& length = const_cast<index_t&>(x.lengths(1)(s.id, 1));
    index_t const old = length;
    length = e.cache(1).shape().max_slots + 1;
    CHECK(x.verify() == status::corrupt);
    length = -1;
    CHECK(x.verify() == status::corrupt);
    length = old;
    std::vector<index_t> saved;
    for (index_t t = old; t < e.cache(1).shape().max_slots; ++t) {
      saved.push_back(position_at(x, 1, s.id, 1, t));
      index_t free = 0;
      while (slot_of(free) >= 0 || std::count(saved.begin(), saved.end(), -free - 1) > 0) ++free;
      position_at(x, 1, s.id, 1, t) = free;
      saved.back() = -free - 1;
    }
    length = e.cache(1).shape().max_slots;
    CHECK(x.verify() == status::over_budget);
    length = old;
    CHECK(x.verify() == status::ok);
  }
}
