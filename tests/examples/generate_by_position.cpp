// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Perplexity and divergence by position: against naive sums, and nothing where nothing was evicted.
#include <cmath>

#include "../support/catch.hpp"
#include "generate/by_position.hpp"
#include "generate_runs.hpp"

namespace {

using namespace kvkeep;
using namespace kvkeep::test;
using namespace kvkeep::generate;

std::vector<episode> random_episodes() {
  std::vector<episode> list;
  for (std::uint64_t i = 0; i < 4; ++i) {
    episode& e = list.emplace_back();
    e.task = "recall";
    e.seed = 1 + static_cast<std::int64_t>(i) % 2;
    e.prompt = random_prompt(50 + i, 9 + static_cast<index_t>(i));
    e.response = random_prompt(60 + i, 30);
    e.checks.push_back({"recall", -1, -1, 10, 2, {1, 2, 3}});  // tokens 7, 8 and 9 ask
  }
  return list;
}

evaluation_options forced_options(index_t batch = 1) {
  evaluation_options o;
  o.forced = true;
  o.engine.max_sequences = batch;
  return o;
}

/// Softmax as it is written down.
std::vector<double> naive_softmax(std::span<float const> logits) {
  std::vector<double> p;
  double sum = 0;
  for (float const z : logits) p.push_back(std::exp(double{z})), sum += p.back();
  for (double& x : p) x /= sum;
  return p;
}

using all_logits = std::vector<std::vector<std::vector<float>>>;

all_logits logits_of(model const& m, policy_pair const& p, std::vector<episode> const& episodes) {
  all_logits all(episodes.size());
  runtime rt(1);
  evaluation_options o = forced_options();
  o.see = [&](index_t i, index_t, std::span<float const> l) {
    all[static_cast<std::size_t>(i)].emplace_back(l.begin(), l.end());
  };
  evaluate(rt, m, p, episodes, o);
  return all;
}

position_tally tally_of(model const& m, policy_pair const& p, std::vector<episode> const& episodes,
                        index_t batch = 1) {
  runtime rt(1);
  auto const full =
      predict(rt, m, make_policies(with("fullkv", 1)), episodes, forced_options(batch));
  position_tally tally(16);
  evaluation_options o = forced_options(batch);
  o.see = tally_against(full, episodes, tally);
  evaluate(rt, m, p, episodes, o);
  return tally;
}

}  // namespace

TEST_CASE("log-softmax and divergence of small distributions, of large logits too") {
  std::vector<float> const z{0, std::log(3.0F)};
  auto const p = log_softmax(z);
  CHECK(std::exp(p[0]) == Approx(0.25));
  CHECK(std::exp(p[1]) == Approx(0.75));
  auto const far = log_softmax(std::vector<float>{1e30F, 1000, 0});
  CHECK(far[0] == 0);
  CHECK(std::isfinite(far[2]));
  log_probabilities const half{std::log(0.5), std::log(0.5)};
  CHECK(divergence(half, p) == Approx(0.5 * std::log(0.5 / 0.25) + 0.5 * std::log(0.5 / 0.75)));
  CHECK(divergence(p, half) == Approx(0.25 * std::log(0.25 / 0.5) + 0.75 * std::log(0.75 / 0.5)));
  CHECK(divergence(p, p) == 0);
}

TEST_CASE("questions do not count, but what follows from the text does") {
  episode e;
  e.task = "recall";
  e.response.resize(8);
  e.checks = {{"recall", -1, 0, 0, 1, {5, 6}}, {"recall", -1, 0, 5, 2, {5, 6}}};
  CHECK(questions_of(e) == std::vector<bool>{false, false, false, true, true, false, false, false});
  e.task = "diary";
  CHECK(questions_of(e) == std::vector<bool>(8));
}

TEST_CASE("perplexity and divergence equal naive sums over the tokens of each bucket and seed") {
  model const m = random_model(51);
  auto const episodes = random_episodes();
  policy_pair const morph = make_policies(with("morphkv", 8));
  auto const full = logits_of(m, make_policies(with("fullkv", 1)), episodes);
  auto const cut = logits_of(m, morph, episodes);
  auto const tally = tally_of(m, morph, episodes, 3);
  auto const buckets = tally.buckets();
  REQUIRE(buckets.size() == 3);  // positions 9 to 41
  std::int64_t tokens = 0;
  for (position_bucket const& b : buckets) {
    INFO("from " << b.from);
    std::vector<double> perplexity, kl;
    for (std::int64_t seed : {1, 2}) {
      double surprise = 0, divergence = 0;
      int n = 0;
      for (std::size_t i = 0; i < episodes.size(); ++i)
        for (std::size_t j = 0; j < full[i].size(); ++j) {
          auto const at = static_cast<index_t>(episodes[i].prompt.size() + j);
          bool const asks = j >= 7 && j < 10;
          if (asks || episodes[i].seed != seed || at < b.from || at >= b.to) continue;
          auto const p = naive_softmax(full[i][j]), q = naive_softmax(cut[i][j]);
          for (std::size_t t = 0; t < p.size(); ++t) divergence += p[t] * std::log(p[t] / q[t]);
          surprise -= std::log(q[static_cast<std::size_t>(episodes[i].response[j])]);
          ++n;
        }
      perplexity.push_back(std::exp(surprise / n));
      kl.push_back(divergence / n);
      tokens += n;
    }
    CHECK(b.perplexity.mean == Approx((perplexity[0] + perplexity[1]) / 2));
    CHECK(b.perplexity.half == Approx(12.706 * std::abs(perplexity[0] - perplexity[1]) / 2));
    CHECK(b.kl.mean == Approx((kl[0] + kl[1]) / 2));
    CHECK(b.kl.seeds == 2);
  }
  CHECK(buckets.back().kl.mean > 0);
  CHECK(buckets.front().to == 16);
  CHECK(tally.whole().tokens == tokens);
  CHECK(tokens == 4 * (30 - 3));
}

TEST_CASE("a budget that holds the sequence diverges by exactly nothing") {
  model const m = random_model(52);
  auto const episodes = random_episodes();
  for (char const* const policy :
       {"streamingllm", "h2o", "tova", "keydiff", "morphkv", "snapkv+morphkv"}) {
    INFO(policy);
    for (index_t const batch : {1, 3}) {
      auto const tally = tally_of(m, make_policies(with(policy, 42)), episodes, batch);
      auto const full = tally_of(m, make_policies(with("fullkv", 1)), episodes, batch);
      CHECK(tally.whole().kl.mean == 0);
      CHECK(tally.whole().perplexity.mean == full.whole().perplexity.mean);
      for (position_bucket const& b : tally.buckets()) CHECK(b.kl.mean == 0);
    }
    CHECK(tally_of(m, make_policies(with(policy, 12)), episodes).whole().kl.mean > 0);
  }
}
