// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Heads that differ: only some of them have a free slot.
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

}  // namespace

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
