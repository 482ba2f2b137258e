// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// KeyDiff: keep the keys that differ most from the mean direction.
#pragma once

#include "../score/geometry.hpp"
#include "policy.hpp"

namespace kvkeep {

/// Spec 3.7; arXiv 2504.15364, kvpress KeyDiffPress. For the prompt, and while decoding: the paper cuts
/// block-wise, here `evict_after` bursts. Deviation: the mean direction is recomputed at every decision.
using keydiff = policy<key_diff_score>;

struct keydiff_options {
  index_t capacity = 1024;
  double evict_after = 1;
  index_t sinks = 0;
  index_t window = 0;
};

inline keydiff make_keydiff(keydiff_options const& o) {
  cadence when;
  when.evict_after = o.evict_after;
  return {"keydiff", {}, {o.capacity}, {}, {o.sinks, o.window}, scope::head, when};
}

}  // namespace kvkeep
