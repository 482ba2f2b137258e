// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// DynamicKV: SnapKV's scores, layers budgeted by their share of the globally best scores.
#pragma once

#include "../budget/dynamic_layers.hpp"
#include "snapkv.hpp"

namespace kvkeep {

/// Spec 5.2; arXiv 2412.14838, DreamMr/DynamicKV dynamic_v11.py. Deviations: see
/// budget/dynamic_layers.hpp.
using dynamickv = window_policy<dynamic_layers>;

struct dynamickv_options {
  double r_max = 10;
  double r_min = 0.1;
  index_t every = 4;
};

inline dynamickv make_dynamickv(window_options const& o, dynamickv_options const& d = {}) {
  return {"dynamickv",
          make_window_score(o),
          {o.capacity, d.r_max, d.r_min, d.every},
          {},
          {o.sinks, o.window}};
}

}  // namespace kvkeep
