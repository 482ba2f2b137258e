// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// How many slots a cache needs, asked before there is one: so many serve every prompt, and fewer are
// refused.
#include "../support/catch.hpp"
#include "../support/session_run.hpp"

using namespace kvkeep;
using namespace kvkeep::test;

namespace {

constexpr index_t most_prompt = 45;

cache_demand demand_of(world const& w) {
  cache_demand d{w.shape, w.n_layers, -1, w.lim};
  d.lim.max_draft = w.draft;
  d.longest_prompt = most_prompt;
  return d;
}

/// Prompts of every size, then tokens, in a cache of exactly `slots` slots.
void serves(world const& w, index_t slots, any const& prompt, any const& decode) {
  INFO(slots << " slots, transient " << (w.lim.max_prompt > 0));
  text const words = w.words();
  engine e(w.options(decode, slots), prompt, decode);
  for (index_t const n : {0, 1, 6, 15, 16, 17, 18, 19, 21, 24, 30, most_prompt}) {
    INFO("T " << n);
    stream s = e.begin(words);
    e.prompt(s, n);
    for (index_t step = 0; step < 40; ++step) (void)e.step({&s});
    e.check({&s});
    REQUIRE(e.session().end(s.id) == status::ok);
  }
}

std::string bound(world const& w, index_t slots, any const& p) {
  return refusal([&] { engine const e(w.options(p, slots), p); });
}

policy_options options_of(index_t capacity) {
  policy_options o;
  o.capacity = capacity;
  o.window = 4;
  o.sinks = 2;
  return o;
}

}  // namespace

TEST_CASE("every decode policy runs in the slots that were asked for, and in no fewer") {
  for (decode_case const& c : all_decode_cases())
    for (bool const transient : {false, true}) {
      if (transient && !is_plain(c)) continue;
      INFO(c.name);
      world w;
      w.lim.max_prompt = transient ? most_prompt : 0;
      index_t const needed = slots_needed(c.policy, demand_of(w));
      serves(w, needed, c.policy, c.policy);
      if (!transient) CHECK(needed >= most_prompt);
      cache_demand bare = demand_of(w);
      bare.longest_prompt = 0;
      index_t const least = slots_needed(c.policy, bare);
      CHECK(least <= needed);
      CHECK(bound(w, least, c.policy) == "accepted");
      std::string const less = bound(w, least - 1, c.policy);
      INFO(less);
      CHECK(less.find("layers[0].shape.max_slots = " + std::to_string(least - 1)) !=
            std::string::npos);
      CHECK(less.find(">= " + std::to_string(least) + " (slots_needed)") != std::string::npos);
    }
}

TEST_CASE("policy pairs with uneven budgets run in the slots that were asked for") {
  policy_options p = options_of(18), d = options_of(14);
  p.r_max = 3;
  p.every = 2;
  p.lag = 4;
  d.budget = "inherit";
  policy_options burst = d;
  burst.evict_after = 1.3;
  for (char const* prompt :
       {"snapkv", "pyramidkv", "dynamickv", "cake", "adakv", "lagkv", "expected_attention"})
    for (char const* decode : {"morphkv", "streamingllm", "h2o", "knorm"})
      for (policy_options const& o : {d, burst})
        for (bool const transient : {false, true}) {
          INFO(prompt << " + " << decode << ", evict_after " << o.evict_after);
          any const a = make(prompt, p), b = make(decode, o);
          world w;
          w.n_layers = 3;
          w.lim.max_prompt = transient ? most_prompt : 0;
          serves(w, slots_needed(a, b, demand_of(w)), a, b);
        }
}

TEST_CASE("the slots of each policy, by contract") {
  world const w;
  auto const of = [&](char const* name, auto&& edit) {
    policy_options o = options_of(16);
    edit(o);
    cache_demand d = demand_of(w);
    d.longest_prompt = 0;
    return slots_needed(make(name, o), d);
  };
  auto const plain = [](policy_options&) {};
  CHECK(of("streamingllm", plain) == 16);
  for (char const* name : {"h2o", "tova", "knorm", "keydiff", "morphkv"})
    CHECK(of(name, plain) == 17);
  CHECK(of("morphkv", [](auto& o) { o.include_current = true; }) == 18);
  CHECK(of("morphkv", [](auto& o) { o.per_head_mask = true; }) == 18);
  CHECK(of("morphkv", [](auto& o) { o.evict_after = 2; }) == 33);
  CHECK(of("knorm", [](auto& o) { o.block = 4; }) == 20);  // a block leaves once it is full
  CHECK(of("knorm", [](auto& o) { o.capacity = 18, o.block = 4; }) == 20);
  cache_demand d = demand_of(w);
  d.lim.max_draft = 5;
  d.lim.max_prompt = most_prompt;
  CHECK(slots_needed(make("h2o", options_of(16)), d) == 22);
  // Policies that evict nothing while decoding hold the whole sequence.
  d.longest_sequence = 100;
  CHECK(slots_needed(make("snapkv", options_of(16)), d) == 105);
  CHECK(slots_needed(make("fullkv"), d) == 105);
}

TEST_CASE("layers with budgets of their own need slots of their own") {
  any p = make("h2o", options_of(16));
  per_layer b;
  b.n = 3;
  b.tokens[0] = 20;
  b.tokens[1] = 9;
  b.tokens[2] = 14;
  p.budget = b;
  world w;
  w.n_layers = 3;
  w.lim.max_prompt = most_prompt;
  cache_demand d = demand_of(w);
  CHECK(slots_needed(p, d) == 21);
  engine_options o = w.options(p);
  for (index_t l = 0; l < 3; ++l) {
    d.layer = l;
    o.slots.push_back(slots_needed(p, d));
    CHECK(o.slots.back() == b.tokens[l] + 1);
  }
  engine e(o, p);
  text const words = w.words();
  stream s = e.begin(words);
  e.prompt(s, 40);
  for (index_t step = 0; step < 40; ++step) (void)e.step({&s});
  e.check({&s});
  o.slots[1] -= 1;
  std::string const less = refusal([&] { engine const smaller(o, p); });
  INFO(less);
  CHECK(less.find("layers[1].shape.max_slots = 9") != std::string::npos);
}

TEST_CASE("what a session would refuse, the question refuses, too") {
  world const w;
  auto const asked = [&](char const* name, policy_options const& o) {
    return refusal([&] { (void)slots_needed(make(name, o), demand_of(w)); });
  };
  CHECK(asked("h2o", options_of(4)).find("capacity = 4") != std::string::npos);
  policy_options beta = options_of(16);
  beta.beta = 0;
  CHECK(asked("pyramidkv", beta).find("beta = 0") != std::string::npos);
}
