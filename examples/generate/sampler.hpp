// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The next token from logits: the best one, or a draw with a seed.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include <kvkeep/core/types.hpp>

namespace kvkeep::generate {

struct sampling_options {
  double temperature = 0;  ///< 0: the best token
  double top_p = 1;        ///< smallest set of best tokens with at least this probability
  std::uint64_t seed = 1;
};

/// The largest logit; of equal ones the lowest id. NaN loses.
index_t best_token(std::span<float const> logits);

/// Draws depend on the seed and on the number of draws before, and on nothing else.
class sampler {
 public:
  explicit sampler(sampling_options const& o) : options_(o), state_(o.seed) {}
  index_t operator()(std::span<float const> logits);

 private:
  double draw();  ///< in [0, 1)

  sampling_options options_;
  std::uint64_t state_;
  struct candidate {
    double p;
    index_t id;
  };
  std::vector<candidate> candidates_;
};

}  // namespace kvkeep::generate
