// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Where a slot lies: the slot_layout concept, the feature map and the run-time tag over layouts.
#pragma once

#include <concepts>
#include <type_traits>

#include "../core/types.hpp"

namespace kvkeep {

/// A layout maps (sequence row, KV head, slot) to the offset of that row's feature 0, in elements.
/// `capacity` bounds the slots of one sequence and head. Trivially copyable, usable in device code.
template <class L>
concept slot_layout = std::is_trivially_copyable_v<L> && requires(L const l, index_t i) {
  { l.offset(i, i, i) } -> std::same_as<offset_t>;  // seq, kv_head, slot
  { l.capacity(i, i) } -> std::same_as<index_t>;    // seq, kv_head
};

/// Offset of feature d from a row's start: `d / tile * outer + d % tile * inner`, in elements. The
/// default is contiguous. Serves keys tiled by x features (`tile = x`, `outer` = one tile of a block)
/// and transposed values (`inner` = the slot count).
struct feature_map {
  index_t tile = 0;  ///< features per tile; 0: all of them
  offset_t inner = 1;
  offset_t outer = 0;

  KVKEEP_HD constexpr offset_t operator()(index_t d) const noexcept {
    return tile == 0 ? d * inner : d / tile * outer + d % tile * inner;
  }
  KVKEEP_HD constexpr bool contiguous(index_t dim) const noexcept {
    return inner == 1 && (tile == 0 || tile >= dim || outer == tile);
  }
};

/// Any strides; HND and NHD are two of them.
struct strided_layout {
  offset_t seq_stride = 0;   ///< elements between sequence rows
  offset_t head_stride = 0;  ///< elements between KV heads
  offset_t slot_stride = 0;  ///< elements between slots
  index_t slots = 0;         ///< slots per sequence and KV head

  KVKEEP_HD offset_t offset(index_t seq, index_t head, index_t slot) const noexcept {
    return seq * seq_stride + head * head_stride + slot * slot_stride;
  }
  KVKEEP_HD index_t capacity(index_t, index_t) const noexcept { return slots; }
};

/// vLLM-like pages: slot s of a sequence lies in block `table[seq, head, s / block_size]`, row
/// `s % block_size`. `table_head_stride = 0` shares one table among the KV heads.
struct paged_layout {
  index_t const* table = nullptr;  ///< [seq, (head,) block] block numbers, in the view's space
  offset_t table_seq_stride = 0;   ///< table entries between sequence rows
  offset_t table_head_stride = 0;  ///< table entries between KV heads
  index_t blocks_per_table = 0;    ///< entries per sequence (and head)
  index_t block_size = 0;          ///< slots per block
  index_t n_blocks = 0;            ///< blocks of the pool; entries lie in [0, n_blocks)
  offset_t block_stride = 0;       ///< elements between blocks
  offset_t head_stride = 0;        ///< elements between KV heads inside a block
  offset_t slot_stride = 0;        ///< elements between slots inside a block

  KVKEEP_HD index_t entry(index_t seq, index_t head, index_t block) const noexcept {
    return table[seq * table_seq_stride + head * table_head_stride + block];
  }
  KVKEEP_HD offset_t offset(index_t seq, index_t head, index_t slot) const noexcept {
    return entry(seq, head, slot / block_size) * block_stride + head * head_stride +
           slot % block_size * slot_stride;
  }
  KVKEEP_HD index_t capacity(index_t, index_t) const noexcept {
    return blocks_per_table * block_size;
  }
};

/// Every sequence and KV head has its own range of rows in one pool.
struct ragged_layout {
  offset_t const* base = nullptr;  ///< [seq, head] offset of slot 0, in elements
  index_t const* slots = nullptr;  ///< [seq, head] capacity
  index_t n_kv_heads = 0;
  offset_t slot_stride = 0;  ///< elements between slots

  KVKEEP_HD offset_t offset(index_t seq, index_t head, index_t slot) const noexcept {
    return base[static_cast<offset_t>(seq) * n_kv_heads + head] + slot * slot_stride;
  }
  KVKEEP_HD index_t capacity(index_t seq, index_t head) const noexcept {
    return slots[static_cast<offset_t>(seq) * n_kv_heads + head];
  }
};

/// A layout type of the engine's own, on the host, behind two functions (see `erase_layout`).
struct custom_layout {
  void const* object = nullptr;  ///< the engine's slot_layout; outlives the view
  offset_t (*offset_of)(void const*, index_t seq, index_t head, index_t slot) = nullptr;
  index_t (*capacity_of)(void const*, index_t seq, index_t head) = nullptr;

  offset_t offset(index_t seq, index_t head, index_t slot) const noexcept {
    return offset_of(object, seq, head, slot);
  }
  index_t capacity(index_t seq, index_t head) const noexcept {
    return capacity_of(object, seq, head);
  }
};

enum class layout_kind : std::uint8_t { strided, paged, ragged, custom };

constexpr char const* to_string(layout_kind k) noexcept {
  return k == layout_kind::strided  ? "strided"
         : k == layout_kind::paged  ? "paged"
         : k == layout_kind::ragged ? "ragged"
                                    : "custom";
}

/// Run-time tag over the layouts. Backends open it with `visit_layout`; nobody else looks inside.
struct any_layout {
  layout_kind kind = layout_kind::strided;
  union {
    strided_layout strided;
    paged_layout paged;
    ragged_layout ragged;
    custom_layout custom;
  };

  any_layout() noexcept : strided() {}
  any_layout(strided_layout l) noexcept : kind(layout_kind::strided), strided(l) {}
  any_layout(paged_layout l) noexcept : kind(layout_kind::paged), paged(l) {}
  any_layout(ragged_layout l) noexcept : kind(layout_kind::ragged), ragged(l) {}
  any_layout(custom_layout l) noexcept : kind(layout_kind::custom), custom(l) {}
};
static_assert(std::is_trivially_copyable_v<any_layout>);

/// Calls `f(layout)` with the concrete layout.
template <class F>
decltype(auto) visit_layout(any_layout const& l, F&& f) {
  switch (l.kind) {
    case layout_kind::paged:
      return f(l.paged);
    case layout_kind::ragged:
      return f(l.ragged);
    case layout_kind::custom:
      return f(l.custom);
    case layout_kind::strided:
      break;
  }
  return f(l.strided);
}

/// The engine's own layout as a custom_layout. Host only; `l` must outlive the result.
template <slot_layout L>
custom_layout erase_layout(L const& l) noexcept {
  return {
      &l,
      [](void const* o, index_t s, index_t h, index_t t) {
        return static_cast<L const*>(o)->offset(s, h, t);
      },
      [](void const* o, index_t s, index_t h) { return static_cast<L const*>(o)->capacity(s, h); }};
}

}  // namespace kvkeep
