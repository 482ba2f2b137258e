// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// SnapKV: the prompt's tokens that its last W queries attend to.
#pragma once

#include "../score/window.hpp"
#include "policy.hpp"

namespace kvkeep {

/// Spec 3.3; arXiv 2404.14469, FasterDecoding/SnapKV snapkv_utils.py, KVCache-Factory SnapKVCluster,
/// kvpress SnapKVPress. At the end of the prompt only; afterwards the cache grows unless a decode policy
/// is bound beside it. C includes the window.
/// Deviations: one set per KV head (the first publication repeats K and V to all query heads), fp32 sums,
/// ties by position, even kernels refused. `group_before_pool = false` with `rows = mean` is kvpress' form.
template <class Budget = uniform, class Select = top_k>
using window_policy = policy<window_score, Budget, Select>;
using snapkv = window_policy<>;

struct window_options {
  index_t capacity = 1024;
  index_t window = 32;
  index_t kernel = 5;
  op::pooling pooling = op::pooling::average;
  reduction group = reduction::mean;
  reduction rows = reduction::sum;
  bool group_before_pool = true;
  index_t sinks = 0;
};

/// The scorer that SnapKV, PyramidKV, DynamicKV and AdaKV share.
inline window_score make_window_score(window_options const& o) {
  window_score s;
  s.window = o.window;
  s.kernel = o.kernel;
  s.pooling = o.pooling;
  s.group = o.group;
  s.rows = o.rows;
  s.group_before_pool = o.group_before_pool;
  return s;
}

inline snapkv make_snapkv(window_options const& o) {
  return {"snapkv", make_window_score(o), {o.capacity}, {}, {o.sinks, o.window}};
}

}  // namespace kvkeep
