// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The engine token by token: across layouts, batches, threads, chunks, and from saved state.
#include <set>

#include "../support/catch.hpp"
#include "generate/file.hpp"
#include "generate_runs.hpp"

using namespace kvkeep;
using namespace kvkeep::test;

TEST_CASE("greedy tokens do not depend on layout, threads, chunks or batch") {
  model const m = random_model(21);
  ids const prompt = random_prompt(1, 45);
  constexpr index_t tokens = 60;
  std::set<ids> texts;
  for (std::string const policy :
       {"fullkv", "morphkv", "h2o", "tova", "streamingllm", "snapkv", "knorm", "keydiff",
        "snapkv+morphkv", "adakv+morphkv", "pyramidkv+h2o"}) {
    policy_request const r = with(policy, 20);
    ids const want = written(m, r, prompt, tokens);
    CHECK(want.size() == static_cast<std::size_t>(tokens));
    texts.insert(want);
    way const ways[] = {{layout_kind::paged, 1, 64, 1, false},
                        {layout_kind::ragged, 2, 7, 1, false},
                        {layout_kind::strided, 2, 16, 4, false},
                        {layout_kind::paged, 2, 1, 3, true},
                        {layout_kind::strided, 1, 45, 1, true}};
    for (way const& w : ways) {
      INFO(policy << ", layout " << to_string(w.layout) << ", " << w.threads
                  << " threads, chunks of " << w.chunk << ", batch of " << w.batch
                  << (w.in_place ? ", in place" : ""));
      CHECK(written(m, r, prompt, tokens, w) == want);
    }
  }
  CHECK(texts.size() >= 8);  // what is evicted matters to this model
}

TEST_CASE("other granularities and bursts do not depend on the way either") {
  model const m = random_model(22);
  ids const prompt = random_prompt(2, 40);
  std::vector<policy_request> list;
  for (scope const s : {scope::layer, scope::sequence})
    for (char const* policy : {"h2o", "morphkv"}) {
      list.push_back(with(policy, 16));
      list.back().granularity = s;
    }
  list.push_back(with("morphkv", 16));
  list.back().evict_after = 1.5;
  list.back().fusion = reduction::max;
  list.push_back(with("morphkv", 16));
  list.back().layer_budget = "pyramid";
  list.push_back(with("morphkv", 16));
  list.back().rows = morph_rows::direct;
  for (auto const& r : list) {
    ids const want = written(m, r, prompt, 50);
    INFO(r.policy << " per " << to_string(r.granularity) << " " << r.layer_budget);
    CHECK(written(m, r, prompt, 50, {layout_kind::paged, 2, 9, 3, false}) == want);
    CHECK(written(m, r, prompt, 50, {layout_kind::ragged, 1, 64, 1, true}) == want);
  }
}

TEST_CASE("caches have room for prompts of any length under every budget") {
  model const m = random_model(31);
  for (index_t const prompt : {1, 2, 17, 40})
    for (char const* budget : {"", "pyramid", "dynamic", "ada"})
      for (std::string const policy : {"h2o", "morphkv", "snapkv+knorm", "keydiff+morphkv"}) {
        policy_request r = with(policy, 16);
        r.layer_budget = budget;
        if (policy == "morphkv") r.evict_after = 2;
        INFO(policy << " " << budget << ", prompt of " << prompt);
        CHECK(written(m, r, random_prompt(1, prompt), 60).size() == 60);
      }
}

TEST_CASE("a budget no smaller than the sequence gives the full cache's tokens") {
  model const m = random_model(23);
  ids const prompt = random_prompt(3, 30);
  ids const full = written(m, with("fullkv", 1), prompt, 40);
  std::vector<std::string> names;
  list_policies([&](policy_info const& p) { names.push_back(p.name); });
  names.insert(names.end(), {"snapkv+morphkv", "dynamickv+morphkv", "fullkv+tova"});
  for (auto const& policy : names) {
    INFO(policy);
    CHECK(written(m, with(policy, 70), prompt, 40) == full);
    CHECK(written(m, with(policy, 70), prompt, 40, {layout_kind::paged, 1, 8, 2, false}) == full);
  }
}

TEST_CASE("sequences that begin and end at random go their own ways") {
  model const m = random_model(24);
  auto const policies = generate::make_policies(with("morphkv", 16));
  constexpr index_t n_seq = 64;
  engine_options o;
  o.layout = {layout_kind::paged, 4};
  o.max_sequences = n_seq;
  o.max_prompt = 40;
  o.max_tokens = 200;
  generate::runtime rt(1);
  engine e(rt, m, policies, o);
  struct going {
    index_t id;
    ids prompt, tokens;
    std::size_t length;
  };
  std::vector<going> live;
  random_floats r{77};
  std::uint64_t begun = 0;
  auto const draw = [&](index_t n) {
    return static_cast<index_t>((r() + 1) / 2 * (static_cast<float>(n) - 0.01F));
  };
  for (int step = 0; step < 200; ++step) {
    if (live.size() < n_seq && draw(4) > 0) {
      ids const p = random_prompt(++begun, 1 + draw(40));
      live.push_back({e.begin(p), p, {}, static_cast<std::size_t>(5 + draw(60))});
    }
    std::vector<feed> batch;
    for (auto it = live.rbegin(); it != live.rend(); ++it) {  // in any order
      it->tokens.push_back(generate::best_token(e.logits(it->id)));
      batch.push_back({it->id, it->tokens.back()});
    }
    if (!batch.empty()) e.step(batch);
    e.verify();
    for (std::size_t i = live.size(); i-- > 0;) {
      if (live[i].tokens.size() < live[i].length) continue;
      INFO("prompt of " << live[i].prompt.size() << ", " << live[i].length << " tokens");
      CHECK(written(m, with("morphkv", 16), live[i].prompt, static_cast<index_t>(live[i].length)) ==
            live[i].tokens);
      e.end(live[i].id);
      live.erase(live.begin() + static_cast<std::ptrdiff_t>(i));
    }
  }
  CHECK(begun > 60);
}

TEST_CASE("a saved sequence goes on with the same tokens on another engine") {
  model const m = random_model(25);
  ids const prompt = random_prompt(9, 50);
  for (std::string const policy : {"morphkv", "h2o", "snapkv+h2o"})
    for (layout_kind const layout : {layout_kind::strided, layout_kind::paged}) {
      auto const policies = generate::make_policies(with(policy, 24));
      engine_options const o = options_of({layout, 1, 64, 1, false}, {prompt, {1}}, 80);
      generate::runtime rt(1);
      engine first(rt, m, policies, o), second(rt, m, policies, o);
      CHECK(second.begin(ids{1, 2, 3}) == 0);  // so the ids differ
      index_t const id = first.begin(prompt);
      auto const go_on = [](engine& e, index_t at, int n) {
        ids list;
        for (int i = 0; i < n; ++i) {
          list.push_back(generate::best_token(e.logits(at)));
          feed const f{at, list.back()};
          e.step({&f, 1});
        }
        return list;
      };
      go_on(first, id, 17);
      auto const saved = first.save(id);
      index_t const other = second.load(saved);
      CHECK(other == 1);
      second.verify();
      INFO(policy << " " << to_string(layout));
      CHECK(go_on(second, other, 40) == go_on(first, id, 40));
      CHECK_THROWS_AS(first.load(std::span(saved).first(saved.size() - 4)), std::runtime_error);
      second.end(0);
      CHECK_THROWS_AS(second.load(std::span(saved).first(saved.size() - 4)), generate::bad_input);
      CHECK_THROWS_AS(second.load(std::span(saved).first(7)), generate::bad_input);
      engine third(rt, m, generate::make_policies(with(policy, 25)), o);
      CHECK_THROWS_AS(third.load(saved), generate::bad_input);
    }
}
