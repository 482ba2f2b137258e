// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// One policy through one trace, step by step, against full attention.
#pragma once

#include <cstddef>
#include <vector>

#include "contestants.hpp"
#include "trace.hpp"

namespace kvkeep::demo {

/// Means over layers, query heads and the decoded steps that are counted.
struct quality {
  double error = 0;  ///< ||out - full|| / ||full||
  double mass = 0;   ///< share of the full attention's probability on tokens that are still there
};

struct outcome {
  quality all;                   ///< every decoded step
  quality answers;               ///< steps whose query has to find an answer
  std::int64_t peak_slots = 0;   ///< most slots in use at a time, all layers and heads
  std::size_t state_bytes = 0;   ///< state besides K and V, as `session::save` writes it
  std::vector<double> step_us;   ///< per decoded step and layer: append, attend, confirm
  std::vector<double> plain_us;  ///< per decoded step and layer: attention over the same slots
};

/// The recorded tokens are fed whatever the policy did to earlier ones (teacher forcing).
/// @throws std::runtime_error naming the call that the session refused
outcome replay(contestant const& c, trace const& t, full_attention const& full);

}  // namespace kvkeep::demo
