// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "generate/by_position.hpp"

#include <algorithm>
#include <cmath>

namespace kvkeep::generate {

log_probabilities log_softmax(std::span<float const> logits) {
  double const most = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (float const z : logits) sum += std::exp(z - most);
  double const shift = most + std::log(sum);
  log_probabilities p(logits.size());
  std::transform(logits.begin(), logits.end(), p.begin(), [&](float z) { return z - shift; });
  return p;
}

double divergence(log_probabilities const& p, log_probabilities const& q) {
  double sum = 0;
  for (std::size_t i = 0; i < p.size(); ++i) sum += std::exp(p[i]) * (p[i] - q[i]);
  return sum;
}

predictions predict(runtime& rt, model const& m, policy_pair const& policies,
                    std::span<episode const> episodes, evaluation_options o) {
  predictions all(episodes.size());
  o.forced = true;
  o.see = [&](index_t sequence, index_t, std::span<float const> logits) {
    all[static_cast<std::size_t>(sequence)].push_back(log_softmax(logits));
  };
  evaluate(rt, m, policies, episodes, o);
  return all;
}

void position_tally::add(std::int64_t seed, index_t position, double surprise, double kl) {
  sums& s = buckets_[position / width_][seed];
  s.surprise += surprise;
  s.kl += kl;
  ++s.tokens;
}

void position_tally::summarise(by_seed const& seeds, position_bucket& b) {
  std::vector<double> perplexity, kl;
  for (auto const& [seed, s] : seeds) {
    auto const n = static_cast<double>(s.tokens);
    perplexity.push_back(std::exp(s.surprise / n));
    kl.push_back(s.kl / n);
    b.tokens += s.tokens;
  }
  b.perplexity = estimate_of(perplexity);
  b.kl = estimate_of(kl);
}

std::vector<position_bucket> position_tally::buckets() const {
  std::vector<position_bucket> list;
  for (auto const& [number, seeds] : buckets_) {
    position_bucket& b = list.emplace_back();
    b.from = number * width_;
    b.to = b.from + width_;
    summarise(seeds, b);
  }
  return list;
}

position_bucket position_tally::whole() const {
  by_seed all;
  for (auto const& [number, seeds] : buckets_)
    for (auto const& [seed, s] : seeds) {
      sums& sum = all[seed];
      sum.surprise += s.surprise;
      sum.kl += s.kl;
      sum.tokens += s.tokens;
    }
  position_bucket b;
  if (!buckets_.empty()) b.to = (buckets_.rbegin()->first + 1) * width_;
  summarise(all, b);
  return b;
}

see_logits tally_against(predictions const& full, std::span<episode const> episodes,
                         position_tally& tally) {
  std::vector<std::vector<bool>> asks;
  for (episode const& e : episodes) asks.push_back(questions_of(e));
  return
      [&full, episodes, &tally, asks](index_t sequence, index_t at, std::span<float const> logits) {
        auto const i = static_cast<std::size_t>(sequence), j = static_cast<std::size_t>(at);
        if (asks[i][j]) return;
        episode const& e = episodes[i];
        log_probabilities const p = log_softmax(logits);
        tally.add(e.seed, static_cast<index_t>(e.prompt.size()) + at,
                  -p[static_cast<std::size_t>(e.response[j])], divergence(full[i][j], p));
      };
}

}  // namespace kvkeep::generate
