// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// TOVA: the token that the newest query attends to least leaves; one set per layer.
#pragma once

#include "../score/heavy_hitter.hpp"
#include "policy.hpp"

namespace kvkeep {

/// Spec 4.2, 3.9; arXiv 2401.06104, schwartz-lab-NLP/TOVA tova_cache.py, kvpress TOVAPress.
/// A step attends to C + 1 tokens, then one leaves, by the mean over all query heads of the layer.
/// `protect_last` (kvpress) keeps the newest token; the published code may evict it.
using tova = policy<last_row_score>;

struct tova_options {
  index_t capacity = 1024;
  bool protect_last = false;
  index_t sinks = 0;
};

inline tova make_tova(tova_options const& o) {
  return {"tova", {}, {o.capacity}, {}, {o.sinks, o.protect_last ? 1 : 0}};
}

}  // namespace kvkeep
