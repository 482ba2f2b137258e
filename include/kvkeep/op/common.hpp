// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// What several ops share: the guard, the keep plan, query rows.
#pragma once

#include "../view/kv_ref.hpp"

namespace kvkeep {

enum class reduction : std::uint8_t { sum, mean, max };

constexpr char const* to_string(reduction r) noexcept {
  return r == reduction::sum ? "sum" : r == reduction::mean ? "mean" : "max";
}

/// Slots that are never chosen for eviction, by position: the `sinks` smallest live positions, the
/// `recent` largest ones, and every position below `frozen[id]`.
template <class Space = host_space>
struct guard_ref {
  index_t sinks = 0;
  index_t recent = 0;
  index_t const* frozen = nullptr;  ///< [id] or null
};

/// Slots to keep, ascending, and how many, per entry and KV head.
template <class Space = host_space>
struct keep_plan {
  tensor_ref<index_t, 3, Space> slots{};  ///< [entry, kv_head, i], i < count
  tensor_ref<index_t, 2, Space> count{};  ///< [entry, kv_head]
};

/// Query rows for scoring, fp32. Row r of entry b belongs to position `position(b, r)`; a negative
/// position marks an absent row. `by_id` arrays are indexed by sequence id instead of batch entry.
template <class Space = host_space>
struct query_rows {
  tensor_ref<float const, 4, Space> q{};  ///< [entry or id, q_head, row, dim_k], dim contiguous
  tensor_ref<index_t const, 2, Space> position{};  ///< [entry or id, row]
  /// [entry or id, q_head, row] natural log, of a view's sink logit too, or null
  tensor_ref<float const, 3, Space> lse{};
  bool by_id = false;
};

/// Where one token's attention weights go: `out[slot] (+)= scale * sum over g ascending of
/// weights[g, slot] / weight_sum[g]` (H2O, TOVA), or one output row per query head.
template <class Space = host_space>
struct weight_fold {
  tensor_ref<float, 4, Space> out{};  ///< [entry or id, kv_head, 1 or group, slot]; null: nowhere
  bool out_by_id = false;
  bool per_query_head = false;
  bool clear = false;  ///< overwrite instead of adding
  float scale = 1;
  /// The slot of the newest token starts from zero whatever `out` held: [id, kv_head] or null.
  tensor_ref<index_t const, 2, Space> fresh_slot{};
};

/// Slots lie side by side in every row that the kernels read; null counts as fine.
template <class T, int R, class S>
bool slots_contiguous(tensor_ref<T, R, S> const& t) noexcept {
  return t.data == nullptr || t.extent[R - 1] <= 1 || t.stride[R - 1] == 1;
}

/// A score map as a tensor with one row per KV head.
template <class Space>
KVKEEP_HD tensor_ref<float, 4, Space> as_rows(score_map<Space> const& m) noexcept {
  tensor_ref<float, 4, Space> r{};
  r.data = m.data;
  index_t const extent[] = {m.extent[0], m.extent[1], 1, m.extent[2]};
  offset_t const stride[] = {m.stride[0], m.stride[1], 0, m.stride[2]};
  for (int a = 0; a < 4; ++a) {
    r.extent[a] = extent[a];
    r.stride[a] = stride[a];
  }
  return r;
}

}  // namespace kvkeep
