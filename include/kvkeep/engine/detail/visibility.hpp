// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Steps of decisions beside attention: which slots each query head sees, `[entry, q_head, slot]`.
#pragma once

#include <cstdint>

#include "../../op/common.hpp"

namespace kvkeep::detail {

/// Shows all slots. Index: entry * n_q_heads + query head.
template <class Space>
struct show_all {
  tensor_ref<std::uint8_t, 3, Space> visible;
  KVKEEP_HD void operator()(index_t i) const noexcept {
    std::uint8_t* const row = visible.at(i / visible.extent[1], i % visible.extent[1]);
    for (index_t j = 0; j < visible.extent[2]; ++j) row[j] = 1;
  }
};

/// Hides what leaves. Index: entry * n_q_heads + query head.
template <class Space>
struct hide_victims {
  tensor_ref<std::uint8_t, 3, Space> visible;
  tensor_ref<index_t, 2, Space> victim;
  index_t const* id;
  index_t group;
  KVKEEP_HD void operator()(index_t i) const noexcept {
    index_t const entry = i / visible.extent[1], q_head = i % visible.extent[1];
    index_t const slot = victim(id[entry], q_head / group);
    if (slot >= 0) visible(entry, q_head, slot) = 0;
  }
};

/// Shows query head `g` of each group what a plan keeps, and hides the rest.
/// Index: (entry * n_kv_heads + head) * pieces + piece of the slots.
template <class Space>
struct show_plan {
  static constexpr index_t piece = 64;  ///< slots of an index
  tensor_ref<std::uint8_t, 3, Space> visible;
  keep_plan<Space> plan;  ///< slots ascending
  index_t n_kv_heads;
  index_t group;
  index_t g;
  /// Indices per entry and head.
  KVKEEP_HD static constexpr index_t pieces(index_t slots) noexcept {
    return (slots + piece - 1) / piece;
  }
  KVKEEP_HD void operator()(index_t i) const noexcept {
    index_t const n = visible.extent[2], row = i / pieces(n), first = i % pieces(n) * piece;
    index_t const entry = row / n_kv_heads, h = row % n_kv_heads, count = plan.count(entry, h);
    index_t const last = first + piece < n ? first + piece : n;
    index_t const* const kept = plan.slots.at(entry, h);
    std::uint8_t* const see = visible.at(entry, h * group + g);
    index_t next = 0;  // the first kept slot that is not before this piece
    for (index_t left = count; left > 0;) {
      index_t const half = left / 2;
      bool const before = kept[next + half] < first;
      next += before ? half + 1 : 0;
      left = before ? left - half - 1 : half;
    }
    for (index_t j = first; j < last; ++j) {
      see[j] = next < count && kept[next] == j ? 1 : 0;
      next += see[j];
    }
  }
};

}  // namespace kvkeep::detail
