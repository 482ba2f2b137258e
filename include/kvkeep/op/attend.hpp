// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Decode attention that also hands over its evidence.
#pragma once

#include "../view/evidence.hpp"
#include "backend.hpp"
#include "common.hpp"

namespace kvkeep::op {

/// One query per entry and query head attends to all slots in use.
///
/// out = sum_j p_j v_j with p = softmax(z) over the slots (and the sink logit, if the view has one).
/// Bytes: reads (dim_k * e_k + dim_v * e_v) per slot and KV head once, shared by the group; writes
/// 4 bytes per slot and query head when weights are asked for. Operations: 2 (dim_k + dim_v) per slot
/// and query head, one exponential. Sums run in a fixed order per output element.
/// Queries are fp32 rows `q`, or `raw` ones. A head without slots yields zeros and lse = -infinity.
/// Without anything to write nothing is done.
template <class Space = host_space>
struct attend {
  using space = Space;
  batch_ref<Space> batch{};
  layer_ref<Space> layer{};
  tensor_ref<float const, 3, Space> q{};  ///< [entry, q_head, dim_k]
  /// Instead of `q`, if it has a row: of any type, one row per entry and query head.
  queries raw{};
  tensor_ref<float, 3, Space> out{};  ///< [entry, q_head, dim_v], or null: weights only
  /// [entry, q_head] natural log-sum-exp over what the output sees, the sink logit included, or null
  tensor_ref<float, 2, Space> lse{};
  /// exp(z - max) per slot, `[id, kv_head, g, slot]`, row `weight_row[entry]` of a ring (stride
  /// `ring_stride` elements), or null.
  tensor_ref<float, 4, Space> weights{};
  tensor_ref<float, 4, Space> weight_sum{};  ///< [id, kv_head, g, ring row] sum of the weights
  tensor_ref<float, 4, Space> weight_max{};  ///< [id, kv_head, g, ring row] the maximum, or null
  index_t const* weight_row = nullptr;       ///< [entry] ring row; null: row 0
  offset_t ring_stride = 0;
  /// Folds the weights while they are at hand: the same bits as op::accumulate afterwards.
  /// Bytes: 8 per output. Operations: 2 per slot and query head.
  weight_fold<Space> fold{};
  /// Optional visibility, `[entry, q_head, slot]`: 0 hides the slot from that query head's output (the
  /// weights are unaffected).
  tensor_ref<std::uint8_t const, 3, Space> visible{};

  /// Optional, `[entry, q_head]`: 0, and so again afterwards. With them a backend whose blocks do not wait for each
  /// other tells which of a row's is last, and needs fewer launches; no result depends on it. Attentions that may run
  /// at the same time have tickets of their own. The CPU has no need.
  index_t* tickets = nullptr;

  /// Slots that heads seldom exceed, 0: max_slots. How work is cut up, no result: where prompts are cut in place a
  /// cache is longer than what decoding attends to.
  index_t usual_slots = 0;

  /// Whether there is anything to write.
  constexpr bool asks() const noexcept {
    return out.data != nullptr || lse.data != nullptr || weights.data != nullptr ||
           weight_sum.data != nullptr || weight_max.data != nullptr || fold.out.data != nullptr;
  }
};

}  // namespace kvkeep::op
