// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// What the command line asks for, once the model is known.
#pragma once

#include "generate/episodes.hpp"
#include "generate/options.hpp"

namespace kvkeep::generate {

/// What is to be generated behind.
struct job {
  std::vector<index_t> prompt;
  episode_set set;
  episode const* task = nullptr;  ///< into set
};

/// episodes.json beside the model, made for its words. @throws bad_input naming file and field
episode_set read_episodes(std::string const& model_file, model const& m);

/// @throws bad_input naming option and value
job read_job(arguments const& a, model const& m);

/// New tokens: what was asked for, or what the reference or the context suggests.
index_t tokens_of(arguments const& a, job const& j, index_t context);

/// A cache that only grows ends with the model's context; one that evicts may go on.
/// @throws bad_input naming option and value
void check_context(policy_pair const& p, index_t prompt, index_t final_length, index_t context);

}  // namespace kvkeep::generate
