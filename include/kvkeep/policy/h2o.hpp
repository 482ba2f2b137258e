// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// H2O: heavy hitters by accumulated attention, and the most recent tokens; ObservedAttention.
#pragma once

#include "../score/heavy_hitter.hpp"
#include "policy.hpp"

namespace kvkeep {

/// Spec 3.5, 4.1; arXiv 2306.14048, FMInference/H2O modify_llama.py, KVCache-Factory H2OKVCluster.
/// Needs every query of the prompt, in chunks. A step attends to C + 1 tokens, then one leaves.
/// Deviations: see score/heavy_hitter.hpp.
using h2o = policy<heavy_hitter_score>;

struct h2o_options {
  index_t capacity = 1024;  ///< C = heavy + recent
  index_t recent = 512;
  reduction group = reduction::mean;
};

inline h2o make_h2o(h2o_options const& o) {
  heavy_hitter_score s;
  s.group = o.group;
  return {"h2o", s, {o.capacity}, {}, {0, o.recent}};
}

/// Spec 3.5; kvpress ObservedAttentionPress: the same sums divided by the number of rows that saw a
/// token; nothing is protected.
inline h2o make_observed_attention(index_t capacity) {
  heavy_hitter_score s;
  s.by_age = true;
  return {"observed_attention", s, {capacity}, {}, {}};
}

}  // namespace kvkeep
