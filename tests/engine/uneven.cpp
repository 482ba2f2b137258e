// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Heads and sequences that differ: budgets below what decoding protects, heads of which only some have a
// free slot, batches of which only some sequences need a cut.
#include "../support/catch.hpp"
#include "../support/oracle_budget.hpp"
#include "../support/session_run.hpp"

using namespace kvkeep;
using namespace kvkeep::test;

namespace {

/// Tokens per layer and head that a policy leaves of a prompt.
std::vector<oracle::counts> left_by(any const& p, world const& w, text const& words) {
  engine e(w.options(p, w.prompt), p);
  stream s = e.begin(words);
  e.prompt(s, w.prompt);
  std::vector<oracle::counts> left;
  for (index_t l = 0; l < w.n_layers; ++l) {
    left.emplace_back();
    for (auto const& head : e.kept(l, s)) left.back().push_back(oracle::count(head));
  }
  return left;
}

/// Prompts that come through a transient view, into a ragged pool of so many slots per head.
world tight(world w) {
  w.layout = layout_id::ragged;
  w.n_layers = 1;
  w.lim.max_prompt = w.prompt;
  return w;
}
engine_options with_slots(world const& w, any const& p, oracle::counts const& slots) {
  engine_options o = w.options(p, *std::max_element(slots.begin(), slots.end()));
  for (index_t s = 0; s < w.shape.n_seq; ++s)
    o.cache.capacities.insert(o.cache.capacities.end(), slots.begin(), slots.end());
  return o;
}

struct guarded_case {
  char const* decode;
  index_t sinks, window;
};

policy_options ada_options() {
  policy_options o;
  o.capacity = 12;
  o.window = 2;
  o.alpha = 0;  // a head is sure of its window alone
  return o;
}

any inheriting(guarded_case const& c) {
  policy_options o;
  o.sinks = c.sinks;
  o.window = c.window;
  o.budget = "inherit";
  return make(c.decode, o);
}

constexpr guarded_case guarded_cases[] = {
    {"streamingllm", 8, 0}, {"h2o", 0, 9}, {"knorm", 3, 6}, {"keydiff", 2, 7}, {"morphkv", 0, 9}};

}  // namespace

TEST_CASE("a head with a smaller budget than decoding protects keeps what is protected") {
  any const prompt = make("adakv", ada_options());
  for (guarded_case const& c : guarded_cases) {
    any const decode = inheriting(c);
    index_t const room = decode.when.room, least = decode.keep.sinks + decode.keep.recent + room;
    index_t raised = 0;
    for_seeds(24, [&](generator& g) {
      INFO(c.decode);
      world w;
      w.prompt = 40;
      w.seed = g.next();
      text const words = w.words();
      auto const left = left_by(prompt, w, words);
      engine e(w.options(decode, 46), prompt, decode);
      stream s = e.begin(words);
      e.prompt(s, w.prompt);
      std::vector<oracle::kept_sets> first;
      for (index_t l = 0; l < w.n_layers; ++l) first.push_back(e.kept(l, s));
      for (index_t step = 0; step < least; ++step) (void)e.step({&s});
      auto const cuts = e.session().count().cuts;
      for (index_t step = 0; step < 20; ++step) {
        (void)e.step({&s});
        for (index_t l = 0; l < w.n_layers; ++l)
          for (index_t h = 0; h < w.shape.n_kv_heads; ++h) {
            index_t const budget = left[uz(l)][uz(h)];
            auto const live = e.kept(l, s)[uz(h)];
            raised += budget < least ? 1 : 0;
            REQUIRE(oracle::count(live) == std::max(budget, least) - room);
            auto const& oldest = first[uz(l)][uz(h)];
            for (std::size_t i = 0; i < std::min(uz(decode.keep.sinks), oldest.size()); ++i)
              REQUIRE(live[i] == oldest[i]);
            for (index_t i = 0; i < decode.keep.recent; ++i)
              REQUIRE(live[live.size() - 1 - uz(i)] == s.tokens - 1 - i);
          }
        e.check({&s});
      }
      CHECK(e.session().count().cuts == cuts);  // the steady state moves nothing
    });
    CHECK(raised > 0);
  }
}

TEST_CASE("heads below their guards stay within the slots of their guards") {
  any const prompt = make("adakv", ada_options());
  for (guarded_case const& c : guarded_cases) {
    any const decode = inheriting(c);
    index_t const least = decode.keep.sinks + decode.keep.recent + decode.when.room;
    for_seeds(6, [&](generator& g) {
      INFO(c.decode);
      world w;
      w.prompt = 40;
      w.seed = g.next();
      w = tight(w);
      text const words = w.words();
      world roomy = w;
      roomy.lim.max_prompt = 0;
      oracle::counts slots = left_by(prompt, roomy, words)[0];
      for (index_t& n : slots) n = detail::decode_slots(std::max(n, least), decode.when);
      engine e(with_slots(w, decode, slots), prompt, decode);
      stream s = e.begin(words);
      e.prompt(s, w.prompt);
      for (index_t step = 0; step < 40; ++step) (void)e.step({&s});
      e.check({&s});
    });
  }
}

TEST_CASE("a head without a free slot asks for one, and the others do not") {
  // Bursts of the larger budgets, while the smaller ones evict with every token.
  policy_options o;
  o.capacity = 10;
  o.window = 2;
  o.alpha = 0;
  o.evict_after = 1.1;
  o.budget = "ada";
  any const p = make("knorm", o);
  index_t mixed = 0;
  for_seeds(12, [&](generator& g) {
    world w;
    w.prompt = 40;
    w.seed = g.next();
    w = tight(w);
    text const words = w.words();
    world roomy = w;
    roomy.lim.max_prompt = 0;
    oracle::counts const k = left_by(p, roomy, words)[0];
    oracle::counts slots;
    for (index_t const n : k) slots.push_back(detail::decode_slots(n, p.when));
    bool const one = std::any_of(k.begin(), k.end(), [](index_t n) { return n < 9; });
    bool const burst = std::any_of(k.begin(), k.end(), [](index_t n) { return n > 10; });
    mixed += one && burst ? 1 : 0;
    engine e(with_slots(w, p, slots), p);
    stream s = e.begin(words);
    e.prompt(s, w.prompt);
    for (index_t step = 0; step < 45; ++step) (void)e.step({&s});
    e.check({&s});
  });
  CHECK(mixed > 0);
}

TEST_CASE("one sequence that needs a cut leaves the others their victims") {
  for (decode_case const& c : all_decode_cases()) {
    if (!is_plain(c)) continue;
    for_seeds(2, [&](generator& g) {
      INFO(c.name);
      world w;
      w.shape.n_seq = 4;
      w.draft = 4;
      w.prompt = 24;
      w.seed = g.next();
      engine_options const o = w.options(c.policy);
      engine e(o, c.policy);
      std::vector<text> texts;
      for (std::uint64_t i = 0; i < 4; ++i) texts.push_back(w.words(i));
      std::vector<std::unique_ptr<engine>> singles;
      std::vector<stream> together, apart;
      std::vector<stream*> who;
      for (text const& t : texts) {
        index_t const prompt = g.integer(3, w.prompt);
        together.push_back(e.begin(t));
        e.prompt(together.back(), prompt);
        singles.push_back(std::make_unique<engine>(o, c.policy));
        apart.push_back(singles.back()->begin(t));
        singles.back()->prompt(apart.back(), prompt);
      }
      for (stream& s : together) who.push_back(&s);
      for (index_t round = 0; round < 15; ++round) {
        index_t const n = g.integer(1, w.draft);
        for (index_t t = 0; t < n; ++t) {
          auto const r = e.token(who);
          for (std::size_t i = 0; i < who.size(); ++i) {
            auto const alone = singles[i]->token({&apart[i]});
            for (std::size_t l = 0; l < alone.size(); ++l)
              require_same(r[l * who.size() + i], alone[l], false);
          }
        }
        REQUIRE(e.session().confirm(engine::batch_of(who).batch(), n) == status::ok);
        std::int64_t victims = 0, evicted = 0;
        for (std::size_t i = 0; i < who.size(); ++i) {
          any_session& single = singles[i]->session();
          REQUIRE(single.confirm(engine::batch_of({&apart[i]}).batch(), n) == status::ok);
          victims += single.count().victims;
          evicted += single.count().evicted;
          for (index_t l = 0; l < w.n_layers; ++l)
            REQUIRE(e.kept(l, together[i]) == singles[i]->kept(l, apart[i]));
        }
        REQUIRE(e.session().count().victims == victims);
        REQUIRE(e.session().count().evicted == evicted);
      }
      for (stream const& s : together) e.check({&s});
    });
  }
}
