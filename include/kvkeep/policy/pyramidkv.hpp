// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// PyramidKV: SnapKV's scores, more tokens in lower layers.
#pragma once

#include "../budget/pyramid.hpp"
#include "snapkv.hpp"

namespace kvkeep {

/// Spec 3.4, 5.1; arXiv 2406.02069, KVCache-Factory PyramidKVCluster. Deviations: see budget/pyramid.hpp.
using pyramidkv = window_policy<pyramid>;

inline pyramidkv make_pyramidkv(window_options const& o, index_t beta = 20,
                                bool exact_total = true) {
  return {
      "pyramidkv", make_window_score(o), {o.capacity, beta, exact_total}, {}, {o.sinks, o.window}};
}

}  // namespace kvkeep
