// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The engine at its limits: long prompts, draws, teacher forcing, figures, refusals.
#include "../support/catch.hpp"
#include "generate/evaluate.hpp"
#include "generate/file.hpp"
#include "generate_runs.hpp"

using namespace kvkeep;
using namespace kvkeep::test;

TEST_CASE("a prompt beyond its chunks goes on at constant size, if the policy evicts") {
  model const m = random_model(26);
  ids const prompt = random_prompt(10, 150);
  engine_options o;
  o.max_prompt = 40;
  o.max_tokens = 300;
  generate::runtime rt(1);
  engine e(rt, m, generate::make_policies(with("morphkv", 16)), o);
  index_t const id = e.begin(prompt);
  CHECK(e.tokens(id) == 150);
  CHECK(e.positions(id, 0, 0).size() <= 17);
  e.verify();
  engine grows(rt, m, generate::make_policies(with("snapkv", 16)), o);
  CHECK_THROWS_AS(grows.begin(prompt), std::invalid_argument);
}

TEST_CASE("draws depend on the seed alone") {
  model const m = random_model(27);
  std::vector<ids> const prompts{random_prompt(1, 9), random_prompt(1, 9), random_prompt(1, 9)};
  auto const drawn = [&](std::uint64_t seed, std::size_t n, double temperature, double top_p) {
    generate::runtime rt(1);
    std::span<ids const> const some(prompts.data(), n);
    engine e(rt, m, generate::make_policies(with("tova", 12)), options_of({}, prompts, 40));
    generate::generation_options g;
    g.tokens = 40;
    g.sampling = {temperature, top_p, seed};
    return generate::generate(e, some, g);
  };
  auto const three = drawn(5, 3, 0.9, 0.95);
  CHECK(three[0] != three[1]);
  CHECK(drawn(6, 1, 0.9, 0.95)[0] == three[1]);
  CHECK(drawn(7, 1, 0.9, 0.95)[0] == three[2]);
  CHECK(drawn(7, 1, 0.9, 0.0)[0] == drawn(1, 1, 0, 1)[0]);  // only the best token is left
}

TEST_CASE("teacher forcing sees the same logits as free text that agrees, in any batch") {
  model const m = random_model(28);
  policy_request const r = with("h2o", 12);
  std::vector<generate::forced_text> texts;
  for (index_t i = 0; i < 5; ++i) {
    ids const prompt = random_prompt(static_cast<std::uint64_t>(i + 11), 20 - 3 * i);
    texts.push_back({prompt, written(m, r, prompt, 30 - i)});
  }
  texts.push_back({{1, 2}, {}});
  for (index_t const batch : {1, 2, 6}) {
    generate::runtime rt(1);
    engine_options o = options_of({}, {texts[0].prompt}, 30);
    o.max_sequences = batch;
    engine e(rt, m, generate::make_policies(r), o);
    std::vector<index_t> seen(texts.size());
    auto const best =
        generate::follow(e, texts, [&](index_t i, index_t at, std::span<float const> logits) {
          CHECK(logits.size() == 61);
          CHECK(at == seen[static_cast<std::size_t>(i)]++);
        });
    for (std::size_t i = 0; i < texts.size(); ++i) CHECK(best[i] == texts[i].response);
    std::vector<ids> prompts;
    for (auto const& t : texts) prompts.push_back(t.prompt);
    generate::generation_options g;
    g.tokens = 26;
    auto const free = generate::generate(e, prompts, g);  // more prompts than sequences
    for (std::size_t i = 0; i < 5; ++i)
      CHECK(std::equal(free[i].begin(), free[i].end(), texts[i].response.begin()));
  }
}

TEST_CASE("episodes hold what the model itself wrote, free or forced, in any batch") {
  model const m = random_model(33);
  auto const policies = generate::make_policies(with("tova", 12));
  std::vector<generate::episode> episodes;
  for (index_t i = 0; i < 4; ++i) {
    generate::episode e;
    e.prompt = random_prompt(static_cast<std::uint64_t>(i + 50), 10 + i);
    e.response = written(m, with("tova", 12), e.prompt, 20 + i);
    e.checks.resize(2);
    e.checks[0].at = 3;
    e.checks[0].n = 2;
    e.checks[0].anchor.assign(e.response.begin(), e.response.begin() + 3);
    e.checks[1] = e.checks[0];
    e.checks[1].anchor = {-1};  // never written
    episodes.push_back(e);
  }
  generate::runtime rt(1);
  for (bool const forced : {false, true})
    for (index_t const batch : {1, 3}) {
      generate::evaluation_options o;
      o.engine.max_sequences = batch;
      o.forced = forced;
      o.slack = 2;
      auto const r = generate::evaluate(rt, m, policies, episodes, o);
      for (std::size_t i = 0; i < episodes.size(); ++i) {
        CHECK(r.held[i] == std::vector<bool>{true, forced});
        CHECK(r.tokens[i].size() == episodes[i].response.size() + (forced ? 0 : 2));
      }
    }
}

TEST_CASE("figures add up") {
  model const m = random_model(29);
  ids const prompt = random_prompt(12, 40);
  generate::runtime rt(1);
  engine e(rt, m, generate::make_policies(with("morphkv", 16)),
           options_of({layout_kind::paged, 1, 8, 1, false}, {prompt}, 60));
  generate::generation_options g;
  g.tokens = 60;
  generate::generate(e, std::vector<ids>{prompt}, g);
  auto const u = e.usage();
  CHECK(u.prompt_tokens == 40);
  CHECK(u.decoded_tokens == 59);
  CHECK(u.peak_slots == 3 * 2 * 17);
  CHECK(u.peak_bytes() == 3 * 2 * 17 * 2 * 8 * sizeof(float));
  CHECK(u.sampled_steps == 11);
  CHECK(u.state_bytes > 0);
  CHECK(u.eviction() > 0);
  CHECK(u.eviction() < u.prefill + u.decode);
  CHECK(u.peak_blocks >= 3 * 5);
}

TEST_CASE("what cannot run is refused before it starts") {
  model const m = random_model(30);
  generate::runtime rt(1);
  auto const refused = [&](policy_request const& r, char const* part) {
    try {
      engine const e(rt, m, generate::make_policies(r), options_of({}, {random_prompt(1, 30)}, 10));
      FAIL_CHECK("not refused: " << part);
    } catch (std::invalid_argument const& x) {
      INFO(x.what());
      CHECK(std::string(x.what()).find(part) != std::string::npos);
    }
  };
  policy_request r = with("h2o", 8);
  r.window = 8;
  refused(r, "sinks + window");
  r = with("knorm", 8);
  r.sinks = 5;
  r.window = 3;
  refused(r, "sinks + window");
  refused(with("nobody", 8), "--policy: nobody");
  refused(with("morphkv+snapkv", 8), "--policy: snapkv");
  refused(with("morphkv", 0), "--budget: 0");
  refused(with("adakv+streamingllm", 4), "--budget: 4: expected more than sinks + window = 4");
  r = with("fullkv+h2o", 8);
  r.layer_budget = "pyramid";
  refused(r, "--layer-budget: pyramid");
  r = with("streamingllm", 8);
  r.window = 3;
  refused(r, "--window: streamingllm");
  r = with("h2o", 8);
  r.fusion = reduction::max;
  refused(r, "--fusion: h2o");
  engine e(rt, m, generate::make_policies(with("h2o", 8)),
           options_of({}, {random_prompt(1, 30)}, 10));
  CHECK_THROWS_AS(e.begin(ids{61}), generate::bad_input);
  CHECK_THROWS_AS(e.begin(ids{-1}), generate::bad_input);
  CHECK_THROWS_AS(e.begin(ids{}), std::invalid_argument);
  feed const nobody{0, 1};
  CHECK_THROWS_AS(e.step({&nobody, 1}), std::invalid_argument);
}
