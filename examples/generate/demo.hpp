// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The demonstration: one long response with the full cache, with MorphKV and with StreamingLLM.
#pragma once

#include "generate/compare.hpp"

namespace kvkeep::generate {

/// Prints the instructions and what the model writes behind them, entry after entry as they come, under each
/// policy at half of the cache, and which entries break the instructions.
/// @throws std::invalid_argument if the set has no diary or the model no words
void show_long_response(runtime& rt, model const& m, episode_set const& set);

/// A comparison of minutes in seconds: fewer policies, budgets and episodes.
comparison_options quick_comparison();

}  // namespace kvkeep::generate
