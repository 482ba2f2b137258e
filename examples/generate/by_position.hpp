// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// How well reference text is predicted, by position: perplexity, and divergence from the full cache.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <utility>
#include <vector>

#include "generate/estimate.hpp"
#include "generate/evaluate.hpp"

namespace kvkeep::generate {

using log_probabilities = std::vector<double>;

/// Log-softmax in double, natural logarithms.
log_probabilities log_softmax(std::span<float const> logits);

/// Kullback-Leibler divergence of q from p in nats: the mean of log(p / q) over p.
double divergence(log_probabilities const& p, log_probabilities const& q);

/// What is predicted in front of every response token of teacher-forced episodes, `[episode][token]`.
using predictions = std::vector<std::vector<log_probabilities>>;
/// @param policies  of the full cache
predictions predict(runtime& rt, model const& m, policy_pair const& policies,
                    std::span<episode const> episodes, evaluation_options o);

/// Tokens whose positions are in [from, to).
struct position_bucket {
  index_t from = 0;
  index_t to = 0;
  std::int64_t tokens = 0;
  estimate perplexity;  ///< exp of a seed's mean of -log(probability) over tokens
  estimate kl;          ///< nats per token, of the policy's prediction from the full cache's
};

/// Sums over tokens by position and seed.
class position_tally {
 public:
  explicit position_tally(index_t width) : width_(width) {}

  /// @param position  of the predicted token
  /// @param surprise  -log of its probability
  void add(std::int64_t seed, index_t position, double surprise, double kl);
  /// In order of position, without those that have no tokens; an interval is over the seeds that have some.
  std::vector<position_bucket> buckets() const;
  /// All positions.
  position_bucket whole() const;

 private:
  struct sums {
    double surprise = 0, kl = 0;
    std::int64_t tokens = 0;
  };
  using by_seed = std::map<std::int64_t, sums>;
  static void summarise(by_seed const& seeds, position_bucket& b);

  index_t width_;
  std::map<index_t, by_seed> buckets_;  ///< by position / width
};

/// Tells a tally what a policy predicts for the response tokens of these episodes, but for questions.
see_logits tally_against(predictions const& full, std::span<episode const> episodes,
                         position_tally& tally);

}  // namespace kvkeep::generate
