// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Scoring of slots by query rows: attention mass per column, MorphKV's fused rows, pooling.
#pragma once

#include "backend.hpp"
#include "common.hpp"

namespace kvkeep::op {

/// Attention mass that every slot receives from the query rows:
/// `out += sum over rows (ascending), query heads of a row (ascending) of exp(z - lse_row)`, where a row
/// sees the slots whose position is not above its own. Without log-sum-exp a first pass computes it over
/// all visible slots and the view's sink logit (spec 3.3 step 1, 3.5); one that is given includes that
/// logit too. The sum starts from the value in `out`, term by term, so any chunking of the rows gives the
/// same bits.
/// Bytes: K once plus 4 per slot and output row. Operations: 2 * dim_k and an exponential per row, query head
/// and slot. Without lse two exponentials, and what two passes share: logits that are kept between them (CPU:
/// 4 bytes per row, query head and slot of a KV head, up to 16 MiB), else K and the multiply-adds twice.
template <class Space = host_space>
struct column_sums {
  using space = Space;
  batch_ref<Space> batch{};
  layer_ref<Space> layer{};
  query_rows<Space> rows{};
  tensor_ref<float, 4, Space> out{};  ///< [entry or id, kv_head, 1 or group, slot]
  bool out_by_id = false;
  bool per_query_head = false;  ///< out has a row per query head of the group; else one for all
  bool clear = false;           ///< start from zero instead of from `out`
};

/// Moments of what every slot receives from the query rows, weights as column_sums has them (spec 5.5): per query head
/// their mean over the rows that are present, the sum of squares of what they deviate from it by (updated row by row:
/// squares would cancel where all rows attend to one slot), and the sum of their entropies `-p ln max(p, 1e-10)`.
/// Precondition: absent rows come first, positions of the others ascend.
/// Cost: as column_sums, with 12 bytes per slot and query head. CUDA reads keys and moments, and writes these, once per
/// 32 packed rows. Products are in fp32 whatever the keys' type.
template <class Space = host_space>
struct column_moments {
  using space = Space;
  static constexpr index_t moments = 3;
  static constexpr float least_weight = 1e-10F;  ///< under the logarithm
  batch_ref<Space> batch{};
  layer_ref<Space> layer{};
  query_rows<Space> rows{};
  tensor_ref<float, 4, Space> out{};  ///< [entry, kv_head, moment * group + g, slot]
};

/// MorphKV's direct form (spec 4.3 steps 4 to 6): for every row and query head softmax over the *old*
/// slots only (all but the `recent` largest positions), maximum over the group, then `fuse` over rows, in an
/// order that is the backend's and always the same. Slots that are not old get +infinity. Without any present
/// row the score is the position. Cost: as column_sums without lse.
template <class Space = host_space>
struct fused_rows {
  using space = Space;
  batch_ref<Space> batch{};
  layer_ref<Space> layer{};
  query_rows<Space> rows{};
  index_t recent = 0;
  reduction fuse = reduction::max;  ///< sum or max
  score_map<Space> out{};           ///< [entry, kv_head, slot]
  tensor_ref<float, 3, Space>
      out_heads{};  ///< [entry, q_head, slot]: fused without the group, or null
};

/// Attention weights exp(z - max) of query rows over the slots, written as ring rows for later reuse:
/// row r of entry b goes to ring row `position % ring`. Sums as in attend.
template <class Space = host_space>
struct row_weights {
  using space = Space;
  batch_ref<Space> batch{};
  layer_ref<Space> layer{};
  query_rows<Space> rows{};
  tensor_ref<float, 4, Space> weights{};     ///< [id, kv_head, g, slot] of ring row 0
  tensor_ref<float, 4, Space> weight_sum{};  ///< [id, kv_head, g, ring row]
  offset_t ring_stride = 0;
  index_t ring = 0;
};

/// out[slot] = scale * reduce over rows of in[row, slot], divided by (seen - position) if `by_age`.
/// A maximum ignores NaN: of nothing else it is -infinity.
/// @note `in` is indexed by id if `in_by_id`.
template <class Space = host_space>
struct reduce_rows {
  using space = Space;
  batch_ref<Space> batch{};
  slot_state<Space> slots{};
  tensor_ref<float const, 4, Space> in{};  ///< [entry or id, kv_head, row, slot]
  bool in_by_id = false;
  reduction how = reduction::sum;
  float scale = 1;
  bool by_age = false;
  index_t const* seen = nullptr;  ///< [id] tokens seen, needed by `by_age`
  score_map<Space> out{};         ///< [entry, kv_head, slot]
};

enum class pooling : std::uint8_t { none, average, maximum };

/// Pools each row over the position order of the candidates (all but the `recent` largest positions),
/// stride 1, odd kernel, same length. Average counts zeros outside, maximum ignores them (spec 1.2).
/// In place; protected slots keep their value. Slots that are not in position order are sorted.
template <class Space = host_space>
struct pool_rows {
  using space = Space;
  batch_ref<Space> batch{};
  slot_state<Space> slots{};
  index_t recent = 0;
  pooling kind = pooling::average;
  index_t kernel = 5;
  tensor_ref<float, 4, Space> values{};  ///< [entry, kv_head, row, slot]
};

}  // namespace kvkeep::op
