// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Scores from the geometry of keys and values: KeyDiff and LagKV.
#pragma once

#include "backend.hpp"
#include "common.hpp"

namespace kvkeep::op {

/// KeyDiff (spec 3.7): minus the cosine of each key with the mean unit key of the slots in use. The mean
/// runs over the slots in position order in double, so that layouts and slot order do not matter.
/// A key whose fp32 norm is not finite does not enter the mean, and scores NaN.
/// Bytes: K twice. Operations: 5 * dim_k per slot. Slots that are not in position order are sorted (CPU: about 16
/// bytes per slot and byte that their positions differ in).
template <class Space = host_space>
struct key_diff {
  using space = Space;
  batch_ref<Space> batch{};
  layer_ref<Space> layer{};
  score_map<Space> out{};  ///< [entry, kv_head, slot]
};

/// LagKV (spec 3.8): partitions of `lag` tokens after the sinks (position order of the slots in use) are
/// normalised by the next partition's per-channel range; sinks, the last full partition and the tail
/// score 1. Without `cross_scoring` a score is its rank inside the partition over `lag`.
/// Values that are not finite do not count for a range, and a row that has one counts as deviating least.
/// Bytes: K and V twice. Slots are sorted as in key_diff.
template <class Space = host_space>
struct lag_score {
  using space = Space;
  batch_ref<Space> batch{};
  layer_ref<Space> layer{};
  index_t sinks = 4;
  index_t lag = 128;
  bool cross_scoring = false;
  score_map<Space> out{};  ///< [entry, kv_head, slot]
};

}  // namespace kvkeep::op
