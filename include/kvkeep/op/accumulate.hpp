// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Attention weights of one token folded into per-slot rows, and MorphKV's scores from cached weights.
#pragma once

#include "backend.hpp"
#include "common.hpp"

namespace kvkeep::op {

/// Folds the weights that attention left in memory; op::attend folds those that it has at hand.
/// Bytes: 4 per weight, 8 per output. Operations: 2 per slot and query head.
template <class Space = host_space>
struct accumulate {
  using space = Space;
  batch_ref<Space> batch{};
  slot_state<Space> slots{};
  tensor_ref<float const, 4, Space> weights{};     ///< [id, kv_head, g, slot] of ring row 0
  tensor_ref<float const, 4, Space> weight_sum{};  ///< [id, kv_head, g, ring row]
  index_t const* ring_row = nullptr;               ///< [entry]; null: row 0
  offset_t ring_stride = 0;
  weight_fold<Space> fold{};
};

/// MorphKV's scores from cached weights (spec 4.4): with Z[g, r] the sum of row r over the old slots,
/// `f_j = fuse over rows ascending of max_g E[g, r, j] / Z[g, r]`; not-old slots get +infinity. A head in
/// which some Z vanishes or is not finite is scored by the direct form from the query ring instead.
/// Bytes: 8 * group * n_rows per slot. Operations: 3 * group * n_rows per slot, no exponential.
template <class Space = host_space>
struct ring_score {
  using space = Space;
  batch_ref<Space> batch{};
  layer_ref<Space> layer{};
  /// [entry, row] positions of the window's rows, ascending; negative: absent (present rows come last).
  /// A row's weights lie in ring row `position % ring`, its queries in row `position % q.extent[2]`.
  tensor_ref<index_t const, 2, Space> positions{};
  tensor_ref<float const, 4, Space> q{};  ///< [id, q_head, ring row, dim_k], for the direct form
  tensor_ref<float const, 4, Space> weights{};  ///< [id, kv_head, g, slot] of ring row 0
  offset_t ring_stride = 0;
  index_t ring = 0;
  index_t recent = 0;
  reduction fuse = reduction::max;  ///< sum or max
  score_map<Space> out{};           ///< [entry, kv_head, slot]
};

}  // namespace kvkeep::op
