// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "generate/sampler.hpp"

#include <algorithm>
#include <cmath>

namespace kvkeep::generate {

index_t best_token(std::span<float const> logits) {
  std::size_t best = 0;
  for (std::size_t i = 1; i < logits.size(); ++i)
    if (logits[i] > logits[best] || std::isnan(logits[best])) best = i;
  return static_cast<index_t>(best);
}

/// SplitMix64.
double sampler::draw() {
  state_ += 0x9e3779b97f4a7c15ULL;
  std::uint64_t z = state_;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
  z ^= z >> 31;
  return static_cast<double>(z >> 11) * 0x1p-53;
}

index_t sampler::operator()(std::span<float const> logits) {
  index_t const best = best_token(logits);
  if (!(options_.temperature > 0)) return best;
  double const top = static_cast<double>(logits[static_cast<std::size_t>(best)]);
  candidates_.clear();
  double sum = 0;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    double const p = std::exp((static_cast<double>(logits[i]) - top) / options_.temperature);
    if (!(p > 0)) continue;
    candidates_.push_back({p, static_cast<index_t>(i)});
    sum += p;
  }
  std::sort(candidates_.begin(), candidates_.end(), [](candidate const& a, candidate const& b) {
    return a.p != b.p ? a.p > b.p : a.id < b.id;
  });
  double kept = 0;
  std::size_t n = 0;
  while (n < candidates_.size() && (n == 0 || kept < options_.top_p * sum))
    kept += candidates_[n++].p;
  double left = draw() * kept;
  for (std::size_t i = 0; i + 1 < n; ++i)
    if ((left -= candidates_[i].p) < 0) return candidates_[i].id;
  return n == 0 ? best : candidates_[n - 1].id;
}

}  // namespace kvkeep::generate
