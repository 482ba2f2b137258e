// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Moves the survivors: K, V and every per-slot row together.
#pragma once

#include "backend.hpp"
#include "common.hpp"

namespace kvkeep::op {

enum class move_kind : std::uint8_t {
  pack,        ///< survivors keep their order; slot i of the plan moves to i
  fill_holes,  ///< only survivors beyond the new length move, into the holes, both ascending
  renumber     ///< whole blocks: state moves as in pack, K and V stay (the block table changes)
};

/// Applies a keep plan and sets the new lengths. Source and destination may be the same cache, or a
/// prompt view and a smaller pool (then `pack`). Rows of K and V move bytewise.
/// Bytes: 2 * (row bytes of K and V + 4 + 4 * state rows) per moved slot; nothing for slots that stay.
/// Precondition: in place, the planes of one head do not alias those of another.
template <class Space = host_space>
struct compact {
  using space = Space;
  batch_ref<Space> batch{};  ///< rows and ids of the source
  layer_ref<Space> from{};
  batch_ref<Space> to_batch{};  ///< rows and ids of the destination
  layer_ref<Space> to{};
  keep_plan<Space> plan{};
  move_kind how = move_kind::pack;
};

/// Rows of one plane are rows of the other.
template <class Space>
bool same_rows(plane_ref<Space> const& a, plane_ref<Space> const& b) noexcept {
  return a.type == b.type && a.dim == b.dim &&
         (a.type != dtype::opaque || a.row_bytes == b.row_bytes);
}

}  // namespace kvkeep::op
