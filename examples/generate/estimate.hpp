// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Means over seeds with their intervals.
#pragma once

#include <vector>

namespace kvkeep::generate {

/// A mean over seeds with half the width of its 95% interval (Student's t).
struct estimate {
  double mean = 0;
  double half = 0;
  int seeds = 0;
};
estimate estimate_of(std::vector<double> const& per_seed);

}  // namespace kvkeep::generate
