// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "generate/estimate.hpp"

#include <cmath>
#include <iterator>

namespace kvkeep::generate {

namespace {

/// Two-sided 95% points of Student's t for 1, 2, ... degrees of freedom.
constexpr double t_points[] = {12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262};

}  // namespace

estimate estimate_of(std::vector<double> const& per_seed) {
  estimate e;
  e.seeds = static_cast<int>(per_seed.size());
  for (double x : per_seed) e.mean += x / e.seeds;
  if (e.seeds < 2) return e;
  double sum = 0;
  for (double x : per_seed) sum += (x - e.mean) * (x - e.mean);
  std::size_t const freedom = per_seed.size() - 1;
  double const t = freedom <= std::size(t_points) ? t_points[freedom - 1] : 2.0;
  e.half = t * std::sqrt(sum / static_cast<double>(freedom) / e.seeds);
  return e;
}

}  // namespace kvkeep::generate
