// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Set-up checks of views: every message names field, value and allowed range. Host only.
#pragma once

#include <algorithm>
#include <limits>
#include <string>
#include <utility>

#include "../core/status.hpp"
#include "kv_ref.hpp"

namespace kvkeep {

namespace detail {

struct view_axis {
  std::string name;
  offset_t extent;
  offset_t stride;
};

/// Refuses axes that overlap or whose farthest element does not fit a signed 64-bit byte offset.
KVKEEP_COLD inline void check_axes(std::string const& plane, view_axis* axes, int n,
                                   offset_t element_bytes) {
  // By stride. They are six at most: at -O3 g++ warns that std::sort may look at sixteen.
  for (int i = 1; i < n; ++i)
    for (int j = i; j > 0 && axes[j].stride < axes[j - 1].stride; --j)
      std::swap(axes[j], axes[j - 1]);
  offset_t const limit = std::numeric_limits<offset_t>::max() / element_bytes;
  offset_t reach = 1;  // elements covered by the faster axes
  for (int i = 0; i < n; ++i) {
    if (axes[i].extent == 1) continue;
    std::string const field = plane + "." + axes[i].name;
    KVKEEP_EXPECTS(axes[i].stride >= reach, field.c_str(), axes[i].stride,
                   ">= " + std::to_string(reach) + " (rows may not overlap)");
    KVKEEP_EXPECTS(axes[i].stride <= (limit - reach) / (axes[i].extent - 1), field.c_str(),
                   axes[i].stride, "offsets below 2^63 bytes");
    reach += (axes[i].extent - 1) * axes[i].stride;
  }
}

/// The axes inside one row: features, or bytes of an opaque row.
template <class Space>
KVKEEP_COLD int row_axes(plane_ref<Space> const& p, view_axis* axes) {
  if (p.type == dtype::opaque) {
    axes[0] = {"row_bytes", p.row_bytes, 1};
    return 1;
  }
  index_t const tile = p.features.tile > 0 && p.features.tile < p.dim ? p.features.tile : p.dim;
  axes[0] = {"features.inner", tile, p.features.inner};
  if (tile == p.dim) return 1;
  axes[1] = {"features.outer", (p.dim + tile - 1) / tile, p.features.outer};
  return 2;
}

KVKEEP_COLD inline void check_table(std::string const& plane, paged_layout const& l,
                                    index_t max_slots) {
  auto const field = [&](char const* f) { return plane + ".layout." + f; };
  KVKEEP_EXPECTS(l.table != nullptr, field("table").c_str(), "null", "a block table");
  KVKEEP_EXPECTS(l.block_size >= 1, field("block_size").c_str(), l.block_size, ">= 1");
  KVKEEP_EXPECTS(l.n_blocks >= 1, field("n_blocks").c_str(), l.n_blocks, ">= 1");
  offset_t const slots = static_cast<offset_t>(l.blocks_per_table) * l.block_size;
  KVKEEP_EXPECTS(l.blocks_per_table >= 1 && slots >= max_slots, field("blocks_per_table").c_str(),
                 l.blocks_per_table, "enough blocks for max_slots = " + std::to_string(max_slots));
  KVKEEP_EXPECTS(slots <= std::numeric_limits<index_t>::max(), field("blocks_per_table").c_str(),
                 l.blocks_per_table, "fewer than 2^31 slots");
  KVKEEP_EXPECTS(l.table_seq_stride >= 0, field("table_seq_stride").c_str(), l.table_seq_stride,
                 ">= 0");
  KVKEEP_EXPECTS(l.table_head_stride >= 0, field("table_head_stride").c_str(), l.table_head_stride,
                 ">= 0");
}

template <class Space>
KVKEEP_COLD void check_plane(std::string const& name, plane_ref<Space> const& p,
                             cache_shape const& s) {
  auto const field = [&](char const* f) { return name + "." + f; };
  KVKEEP_EXPECTS(p.data != nullptr, field("data").c_str(), "null", "a pointer");
  KVKEEP_EXPECTS(p.row_bytes >= 1, field("row_bytes").c_str(), p.row_bytes, ">= 1");
  KVKEEP_EXPECTS(p.features.tile >= 0, field("features.tile").c_str(), p.features.tile, ">= 0");
  offset_t const bytes = dtype_bytes(p.type);
  view_axis axes[6];
  int n = row_axes(p, axes);
  if (p.layout.kind == layout_kind::strided) {
    auto const& l = p.layout.strided;
    KVKEEP_EXPECTS(l.slots >= s.max_slots, field("layout.slots").c_str(), l.slots,
                   ">= max_slots = " + std::to_string(s.max_slots));
    axes[n++] = {"layout.slot_stride", l.slots, l.slot_stride};
    axes[n++] = {"layout.head_stride", s.n_kv_heads, l.head_stride};
    axes[n++] = {"layout.seq_stride", s.n_seq, l.seq_stride};
  } else if (p.layout.kind == layout_kind::paged) {
    auto const& l = p.layout.paged;
    check_table(name, l, s.max_slots);
    axes[n++] = {"layout.slot_stride", l.block_size, l.slot_stride};
    // With a table per head a block may belong to one head alone: [slot, dim].
    bool const own_blocks = l.table_head_stride > 0 && l.head_stride == 0;
    if (!own_blocks) axes[n++] = {"layout.head_stride", s.n_kv_heads, l.head_stride};
    axes[n++] = {"layout.block_stride", l.n_blocks, l.block_stride};
  } else if (p.layout.kind == layout_kind::ragged) {
    auto const& l = p.layout.ragged;
    KVKEEP_EXPECTS(l.base != nullptr && l.slots != nullptr, field("layout.base").c_str(), "null",
                   "offsets and capacities per sequence and KV head");
    KVKEEP_EXPECTS(l.n_kv_heads == s.n_kv_heads, field("layout.n_kv_heads").c_str(), l.n_kv_heads,
                   std::to_string(s.n_kv_heads));
    axes[n++] = {"layout.slot_stride", s.max_slots, l.slot_stride};
  } else {
    auto const& l = p.layout.custom;
    KVKEEP_EXPECTS(l.object != nullptr && l.offset_of != nullptr && l.capacity_of != nullptr,
                   field("layout.custom").c_str(), "null", "a slot_layout (see erase_layout)");
  }
  check_axes(name, axes, n, bytes);
}

/// Ranges of a ragged host plane may not overlap; empty ranges are legal.
template <class Space>
KVKEEP_COLD void check_ragged_ranges(std::string const& name, plane_ref<Space> const& p,
                                     cache_shape const& s) {
  auto const& l = p.layout.ragged;
  offset_t const n = static_cast<offset_t>(s.n_seq) * s.n_kv_heads;
  offset_t row = 1;  // elements that one row reaches
  for (index_t d = 0; d < (p.type == dtype::opaque ? 0 : p.dim); ++d)
    row = std::max(row, p.features(d) + 1);
  if (p.type == dtype::opaque) row = p.row_bytes;
  for (offset_t i = 0; i < n; ++i) {
    KVKEEP_EXPECTS(l.slots[i] >= 0 && l.slots[i] <= s.max_slots, (name + ".layout.slots").c_str(),
                   l.slots[i], "0.." + std::to_string(s.max_slots));
    offset_t const limit = std::numeric_limits<offset_t>::max() / dtype_bytes(p.type) - row -
                           std::max(l.slots[i] - 1, 0) * l.slot_stride;
    KVKEEP_EXPECTS(l.base[i] >= 0 && l.base[i] <= limit, (name + ".layout.base").c_str(), l.base[i],
                   ">= 0, and offsets below 2^63 bytes");
  }
  for (offset_t i = 0; i < n; ++i)
    for (offset_t j = 0; j < n; ++j) {
      if (i == j || l.slots[i] == 0 || l.slots[j] == 0 || l.base[j] < l.base[i]) continue;
      offset_t const end = l.base[i] + (l.slots[i] - 1) * l.slot_stride + row;
      KVKEEP_EXPECTS(
          l.base[j] >= end || l.base[j] + row <= l.base[i], (name + ".layout.base").c_str(),
          l.base[j],
          "ranges that do not overlap (another head ends at " + std::to_string(end) + ")");
    }
}

}  // namespace detail

/// Checks a shape. @throws std::invalid_argument naming the field
KVKEEP_COLD inline void check_shape(cache_shape const& s) {
  auto const at_least_1 = [](char const* field, index_t v) {
    KVKEEP_EXPECTS(v >= 1, field, v, ">= 1");
  };
  at_least_1("shape.n_seq", s.n_seq);
  at_least_1("shape.n_q_heads", s.n_q_heads);
  at_least_1("shape.n_kv_heads", s.n_kv_heads);
  at_least_1("shape.dim_k", s.dim_k);
  at_least_1("shape.dim_v", s.dim_v);
  at_least_1("shape.max_slots", s.max_slots);
  KVKEEP_EXPECTS(s.n_q_heads % s.n_kv_heads == 0, "shape.n_q_heads", s.n_q_heads,
                 "a multiple of n_kv_heads = " + std::to_string(s.n_kv_heads));
}

/// Checks shape, strides, tables and ranges of a view. Reads index arrays only in host memory.
/// @throws std::invalid_argument naming field, value and allowed range
template <class Space>
KVKEEP_COLD void check_view(kv_ref<Space> const& kv, std::string const& name = "view") {
  check_shape(kv.shape);
  KVKEEP_EXPECTS(kv.k.dim == kv.shape.dim_k, (name + ".k.dim").c_str(), kv.k.dim,
                 std::to_string(kv.shape.dim_k));
  KVKEEP_EXPECTS(kv.v.dim == kv.shape.dim_v, (name + ".v.dim").c_str(), kv.v.dim,
                 std::to_string(kv.shape.dim_v));
  KVKEEP_EXPECTS(kv.scale > 0 && kv.scale <= std::numeric_limits<float>::max(),
                 (name + ".scale").c_str(), kv.scale, "> 0 and finite");
  KVKEEP_EXPECTS(kv.softcap >= 0 && kv.softcap <= std::numeric_limits<float>::max(),
                 (name + ".softcap").c_str(), kv.softcap, ">= 0 and finite");
  detail::check_plane(name + ".k", kv.k, kv.shape);
  detail::check_plane(name + ".v", kv.v, kv.shape);
  if constexpr (std::is_same_v<Space, host_space>) {
    if (kv.k.layout.kind == layout_kind::ragged)
      detail::check_ragged_ranges(name + ".k", kv.k, kv.shape);
    if (kv.v.layout.kind == layout_kind::ragged)
      detail::check_ragged_ranges(name + ".v", kv.v, kv.shape);
  }
}

}  // namespace kvkeep
