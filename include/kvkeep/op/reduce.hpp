// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Joins scores of heads or layers, for kept sets that are shared among them (spec 5.6).
#pragma once

#include "backend.hpp"
#include "common.hpp"

namespace kvkeep::op {

/// Replaces every head's scores by their fp32 mean over the KV heads, summed in head order.
/// Precondition: the heads hold the same positions in the same slots.
template <class Space = host_space>
struct mean_heads {
  using space = Space;
  batch_ref<Space> batch{};
  slot_state<Space> slots{};
  score_map<Space> scores{};  ///< [entry, kv_head, slot], in place
};

/// Adds one layer's scores to a sum over layers, or (`last`) finishes the mean over `n_layers`.
template <class Space = host_space>
struct mean_layers {
  using space = Space;
  batch_ref<Space> batch{};
  slot_state<Space> slots{};
  tensor_ref<float const, 3, Space> scores{};  ///< [entry, kv_head, slot] of this layer
  bool first = false;
  bool last = false;
  index_t n_layers = 1;
  score_map<Space> sum{};  ///< [entry, kv_head, slot], in place
};

}  // namespace kvkeep::op
