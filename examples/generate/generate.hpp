// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Loops over the engine: free-running generation of a batch, and teacher forcing.
#pragma once

#include <functional>
#include <span>
#include <vector>

#include "generate/engine.hpp"
#include "generate/sampler.hpp"

namespace kvkeep::generate {

struct generation_options {
  index_t tokens = 128;             ///< most new tokens per sequence
  sampling_options sampling;        ///< sequence i draws with seed + i
  std::vector<index_t> end_tokens;  ///< a sequence ends before one of these
  index_t verify_every = 0;         ///< steps between checks of the session's state; 0: none
  std::function<void(index_t sequence, index_t token)> on_token;
};

/// Generates behind every prompt until all sequences have ended; those that go on share each step.
/// @return new tokens per prompt, end tokens not included
std::vector<std::vector<index_t>> generate(engine& e, std::span<std::vector<index_t> const> prompts,
                                           generation_options const& o);

/// Feeds `response` whatever the model would have said. Calls `on_logits(i, logits)` before token i.
/// @return the best token at each place
std::vector<index_t> follow(
    engine& e, std::span<index_t const> prompt, std::span<index_t const> response,
    std::function<void(index_t, std::span<float const>)> const& on_logits = {});

}  // namespace kvkeep::generate
