// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// HeadKV: SnapKV's scores, more tokens for heads that were found important.
#pragma once

#include "../budget/per_head.hpp"
#include "snapkv.hpp"

namespace kvkeep {

/// Spec 5.4; arXiv 2410.19258, KVCache-Factory HeadKVCluster.
/// Lengths differ among heads, as AdaKV's do. Deviations: see budget/per_head.hpp.
using headkv = window_policy<per_head>;

/// @param tokens  what every layer and KV head keeps: `headkv_budget` of importances, `per_head::of_query_heads` of a
///                published table, or any other. `o.capacity` is not read.
/// The published code takes the mean over window rows: `o.rows = mean` gives its scores.
inline headkv make_headkv(window_options const& o, per_head tokens) {
  return {"headkv", make_window_score(o), std::move(tokens), {}, {o.sinks, o.window}};
}

}  // namespace kvkeep
