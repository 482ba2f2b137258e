// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Episodes under a policy: which checks hold, what was written, what it cost.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "generate/episodes.hpp"
#include "generate/generate.hpp"

namespace kvkeep::generate {

struct evaluation_options {
  engine_options engine;  ///< lengths of prompts and sequences are taken from the episodes
  /// Feed the reference and look at the best token; else the model reads its own text.
  bool forced = false;
  /// Free text may be longer than the reference by this many tokens.
  index_t slack = 32;
  std::vector<index_t> end_tokens;
  see_logits see;  ///< teacher forcing only: logits in front of every reference token
};

struct evaluation {
  std::vector<std::vector<bool>> held;  ///< [episode, check]
  std::vector<token_list> tokens;  ///< free: what was written; forced: the best token at each place
  engine_usage usage;
};

/// Runs all episodes on one engine, `engine.max_sequences` at a time. No figure depends on that number but speed
/// and peak bytes.
evaluation evaluate(runtime& rt, model const& m, policy_pair const& policies,
                    std::span<episode const> episodes, evaluation_options const& o);
/// Makes the engine of `evaluate`, and runs nothing. @throws std::invalid_argument where policies cannot be bound
void check_evaluation(runtime& rt, model const& m, policy_pair const& policies,
                      std::span<episode const> episodes, evaluation_options const& o);

}  // namespace kvkeep::generate
