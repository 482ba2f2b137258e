// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Loops over the engine: free-running generation, and teacher forcing, of any number of sequences.
#pragma once

#include <functional>
#include <span>
#include <vector>

#include "generate/engine.hpp"
#include "generate/sampler.hpp"

namespace kvkeep::generate {

using token_list = std::vector<index_t>;

struct generation_options {
  index_t tokens = 128;             ///< most new tokens per sequence
  std::vector<index_t> tokens_of;   ///< the same for each sequence; empty: `tokens` for all
  sampling_options sampling;        ///< sequence i draws with seed + i
  std::vector<index_t> end_tokens;  ///< a sequence ends before one of these
  index_t verify_every = 0;         ///< steps between checks of the session's state; 0: none
  std::function<void(index_t sequence, index_t token)> on_token;
};

/// Generates behind every prompt. As many sequences as the engine holds share each step; where there are
/// more prompts, the next one begins when a sequence has ended. No text depends on the others.
/// @return new tokens per prompt, end tokens not included
std::vector<token_list> generate(engine& e, std::span<token_list const> prompts,
                                 generation_options const& o);

/// Text that is fed whatever the model would have said.
struct forced_text {
  token_list prompt;
  token_list response;
};
using see_logits = std::function<void(index_t sequence, index_t at, std::span<float const> logits)>;

/// Teacher forcing, batched like `generate`. Calls `see` with the logits in front of every response token.
/// @return the best token at each place, per text
std::vector<token_list> follow(engine& e, std::span<forced_text const> texts,
                               see_logits const& see = {});

}  // namespace kvkeep::generate
