// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Typed views that users write, and the makers of common ones. A typed view converts to kv_ref.
#pragma once

#include <cmath>

#include "kv_ref.hpp"

namespace kvkeep {

/// One layer's K and V with element type, memory space and layouts in the type. A K view and a V view
/// may have different layouts, element types and dimensions.
template <class T, class Space = host_space, slot_layout KL = strided_layout, slot_layout VL = KL,
          class TV = T>
struct kv_view {
  using space = Space;

  cache_shape shape{};
  T* k = nullptr;
  TV* v = nullptr;
  KL k_layout{};
  VL v_layout{};
  feature_map k_features{};
  feature_map v_features{};
  float scale = 0;  ///< 0: 1/sqrt(dim_k)
  float softcap = 0;
  float const* sink_logits = nullptr;
  index_t k_row_bytes = 0;  ///< opaque rows only
  index_t v_row_bytes = 0;  ///< opaque rows only
  row_reader k_reader{};    ///< opaque rows only
  row_reader v_reader{};    ///< opaque rows only

  /// The tagged form. A layout type that is not one of the library's is referred to, so the view must
  /// outlive the result.
  kv_ref<Space> ref() const noexcept {
    kv_ref<Space> r;
    r.shape = shape;
    r.k = plane(k, shape.dim_k, k_layout, k_features, k_row_bytes, k_reader);
    r.v = plane(v, shape.dim_v, v_layout, v_features, v_row_bytes, v_reader);
    r.scale = scale != 0 ? scale : 1.0F / std::sqrt(static_cast<float>(shape.dim_k));
    r.softcap = softcap;
    r.sink_logits = sink_logits;
    return r;
  }
  operator kv_ref<Space>() const noexcept { return ref(); }

 private:
  template <class E, class L>
  static plane_ref<Space> plane(E* data, index_t dim, L const& layout, feature_map map,
                                index_t row_bytes, row_reader reader) noexcept {
    plane_ref<Space> p;
    p.data = reinterpret_cast<std::byte*>(data);
    p.type = dtype_of<E>::value;
    p.dim = dim;
    p.row_bytes = p.type == dtype::opaque ? row_bytes : dim * dtype_bytes(p.type);
    p.features = map;
    p.reader = reader;
    if constexpr (std::is_constructible_v<any_layout, L>)
      p.layout = any_layout(layout);
    else
      p.layout = any_layout(erase_layout(layout));
    return p;
  }
};

/// Axis order of a contiguous cache, outermost first (the feature axis is always innermost).
enum class axis_order : std::uint8_t {
  hnd,  ///< [seq, kv_head, slot, dim]
  nhd   ///< [seq, slot, kv_head, dim]
};

/// Contiguous layout of rows of `row` elements (dim, or row bytes for opaque rows).
inline strided_layout contiguous_layout(cache_shape const& s, index_t row, axis_order order) {
  offset_t const r = row;
  offset_t const plane = r * s.n_kv_heads * s.max_slots;
  if (order == axis_order::hnd) return {plane, r * s.max_slots, r, s.max_slots};
  return {plane, r, r * s.n_kv_heads, s.max_slots};
}

/// Elements of which a row holds one per feature. Opaque rows do not, so views of them are told their bytes.
template <class T>
concept feature_element = !std::is_same_v<T, std::byte>;

/// Bytes of an opaque row, of K and of V.
struct opaque_rows {
  index_t k = 0;
  index_t v = 0;
};

namespace detail {

/// A view of planes with such layouts.
template <class Space, class T, class L>
kv_view<T, Space, L> view_of(T* k, T* v, cache_shape const& s, L const& k_layout, L const& v_layout,
                             opaque_rows const& bytes = {}) {
  kv_view<T, Space, L> r;
  r.shape = s;
  r.k = k;
  r.v = v;
  r.k_layout = k_layout;
  r.v_layout = v_layout;
  r.k_row_bytes = bytes.k;
  r.v_row_bytes = bytes.v;
  return r;
}

}  // namespace detail

/// View of contiguous K `[seq, kv_head, slot, dim_k]` and V `[.., dim_v]` (or NHD order).
template <class Space = host_space, feature_element T>
kv_view<T, Space> contiguous_view(T* k, T* v, cache_shape const& s,
                                  axis_order order = axis_order::hnd) {
  return detail::view_of<Space>(k, v, s, contiguous_layout(s, s.dim_k, order),
                                contiguous_layout(s, s.dim_v, order));
}
/// The same of opaque rows.
template <class Space = host_space>
kv_view<std::byte, Space> contiguous_view(std::byte* k, std::byte* v, cache_shape const& s,
                                          opaque_rows const& bytes,
                                          axis_order order = axis_order::hnd) {
  return detail::view_of<Space>(k, v, s, contiguous_layout(s, bytes.k, order),
                                contiguous_layout(s, bytes.v, order), bytes);
}

/// Pages of a pool and the tables into it.
struct page_geometry {
  index_t block_size = 0;
  index_t n_blocks = 0;            ///< blocks of the pool
  index_t const* table = nullptr;  ///< [seq, block] or, per_head, [seq, kv_head, block]
  index_t blocks_per_table = 0;
  bool table_per_head = false;
  axis_order order = axis_order::nhd;  ///< inside a block: [slot, head, dim] or [head, slot, dim]
};

/// Layout of one plane of pages with rows of `row` elements.
inline paged_layout make_paged_layout(cache_shape const& s, index_t row, page_geometry const& g) {
  paged_layout l;
  l.table = g.table;
  l.blocks_per_table = g.blocks_per_table;
  l.table_head_stride = g.table_per_head ? g.blocks_per_table : 0;
  l.table_seq_stride =
      static_cast<offset_t>(g.blocks_per_table) * (g.table_per_head ? s.n_kv_heads : 1);
  l.block_size = g.block_size;
  l.n_blocks = g.n_blocks;
  offset_t const r = row;
  l.block_stride = r * s.n_kv_heads * g.block_size;
  l.head_stride = g.order == axis_order::nhd ? r : r * g.block_size;
  l.slot_stride = g.order == axis_order::nhd ? r * s.n_kv_heads : r;
  return l;
}

/// View of vLLM-like pages: K pool `[block, slot, kv_head, dim_k]` (NHD) or `[block, kv_head, slot,
/// dim_k]` (HND), V likewise.
template <class Space = host_space, feature_element T>
kv_view<T, Space, paged_layout> paged_view(T* k, T* v, cache_shape const& s,
                                           page_geometry const& g) {
  return detail::view_of<Space>(k, v, s, make_paged_layout(s, s.dim_k, g),
                                make_paged_layout(s, s.dim_v, g));
}
/// The same of opaque rows.
template <class Space = host_space>
kv_view<std::byte, Space, paged_layout> paged_view(std::byte* k, std::byte* v, cache_shape const& s,
                                                   page_geometry const& g,
                                                   opaque_rows const& bytes) {
  return detail::view_of<Space>(k, v, s, make_paged_layout(s, bytes.k, g),
                                make_paged_layout(s, bytes.v, g), bytes);
}

/// View of ragged rows: head (seq, h) owns rows `base_row[seq, h] .. + slots[seq, h])` of pools K
/// `[row, dim_k]` and V `[row, dim_v]`. The arrays of element offsets are the caller's: `k_base` and
/// `v_base` are `[seq, kv_head]`, in elements.
template <class Space = host_space, feature_element T>
kv_view<T, Space, ragged_layout> ragged_view(T* k, T* v, cache_shape const& s,
                                             offset_t const* k_base, offset_t const* v_base,
                                             index_t const* slots) {
  ragged_layout const k_layout{k_base, slots, s.n_kv_heads, s.dim_k};
  ragged_layout const v_layout{v_base, slots, s.n_kv_heads, s.dim_v};
  return detail::view_of<Space>(k, v, s, k_layout, v_layout);
}
/// The same of opaque rows; offsets in bytes.
template <class Space = host_space>
kv_view<std::byte, Space, ragged_layout> ragged_view(std::byte* k, std::byte* v,
                                                     cache_shape const& s, offset_t const* k_base,
                                                     offset_t const* v_base, index_t const* slots,
                                                     opaque_rows const& bytes) {
  ragged_layout const k_layout{k_base, slots, s.n_kv_heads, bytes.k};
  ragged_layout const v_layout{v_base, slots, s.n_kv_heads, bytes.v};
  return detail::view_of<Space>(k, v, s, k_layout, v_layout, bytes);
}

}  // namespace kvkeep
