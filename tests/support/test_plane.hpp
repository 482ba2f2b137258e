// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Memory of K or V in every layout and element type. All bytes that belong to no slot hold a
/// canary (0xff: NaN in every type), so that reads show and writes are found.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <memory>
#include <span>
#include <vector>

#include "cache_options.hpp"
#include "random.hpp"

namespace kvkeep::test {

/// Owns K or V. Addresses are listed one by one and do not come from the library's layouts.
class test_plane {
 public:
  test_plane(cache_options const& o, index_t dim, bool is_key)
      : type_(o.type),
        dim_(dim),
        shape_(o.shape),
        element_(uz(dtype_bytes(o.type))),
        aligned_(o.aligned),
        lead_(uz(spaced(3))) {
    generator g(o.seed * 2 + (is_key ? 0 : 1));
    row_ = type_ == dtype::opaque ? dim + 4 : dim;
    for (offset_t d = 0; d < row_; ++d) feature_at_.push_back(d);
    layout_id id = o.layout;
    if (id == layout_id::mixed) id = is_key ? layout_id::ragged : layout_id::padded;
    if (id == layout_id::tiled && type_ == dtype::opaque) id = layout_id::paged;
    switch (id) {
      case layout_id::hnd:
        strided(row_, 0, 0, false);
        break;
      case layout_id::nhd:
        strided(row_, 0, 0, true);
        break;
      case layout_id::padded:
        strided(row_ + spaced(3), spaced(5), spaced(7), false);
        break;
      case layout_id::ragged:
        ragged(o, g);
        break;
      case layout_id::custom:
        custom(g);
        break;
      default:
        paged(o, g, id, is_key);
        break;
    }
    mark_rows(id == layout_id::hnd || id == layout_id::nhd ? 0 : 11);
  }

  test_plane(test_plane&&) = default;
  test_plane& operator=(test_plane&&) = default;

  plane_ref<> ref() const {
    plane_ref<> p = custom_;
    p.data = data();
    p.type = type_;
    p.dim = dim_;
    p.row_bytes = static_cast<index_t>(uz(row_) * element_);
    p.features = features_;
    if (type_ == dtype::opaque) p.reader = {read_int8_row, nullptr};
    if (!custom_view_) p.layout = layout_;
    return p;
  }
  index_t capacity(index_t seq, index_t head) const { return slots_[range(seq, head)]; }
  /// Offset of feature 0, in elements.
  offset_t row_offset(index_t seq, index_t head, index_t slot) const {
    return row_at_[range(seq, head) * uz(shape_.max_slots) + uz(slot)];
  }
  /// Offset of feature d (byte d of opaque rows) from feature 0, in elements.
  offset_t feature_offset(index_t d) const { return feature_at_[uz(d)]; }

  void set(index_t seq, index_t head, index_t slot, std::span<float const> x) {
    std::vector<std::byte> row(uz(row_) * element_);
    if (type_ == dtype::opaque) {
      pack_int8(x, row);
    } else {
      for (std::size_t d = 0; d < uz(dim_); ++d) store(x[d], &row[d * element_]);
    }
    set_raw(seq, head, slot, row);
  }
  std::vector<float> get(index_t seq, index_t head, index_t slot) const {
    std::vector<std::byte> const row = raw(seq, head, slot);
    std::vector<float> x(uz(dim_));
    if (type_ == dtype::opaque) {
      read_int8_row(nullptr, row.data(), dim_, x.data());
    } else {
      for (std::size_t d = 0; d < x.size(); ++d) x[d] = load(&row[d * element_]);
    }
    return x;
  }
  /// The row's bytes in feature order.
  std::vector<std::byte> raw(index_t seq, index_t head, index_t slot) const {
    std::vector<std::byte> row(uz(row_) * element_);
    for (std::size_t d = 0; d < uz(row_); ++d)
      std::memcpy(&row[d * element_], element_at(seq, head, slot, d), element_);
    return row;
  }
  void set_raw(index_t seq, index_t head, index_t slot, std::vector<std::byte> const& row) {
    for (std::size_t d = 0; d < uz(row_); ++d)
      std::memcpy(element_at(seq, head, slot, d), &row[d * element_], element_);
  }
  /// Gaps, guards, unused blocks and index arrays are as they were made.
  bool intact() const {
    for (std::size_t i = 0; i < bytes_.size(); ++i)
      if (!owned_[i] && bytes_[i] != std::byte{0xff}) return false;
    return table_ == table_copy_ && base_ == base_copy_ && slots_ == slots_copy_;
  }
  std::vector<std::byte> const& bytes() const { return bytes_; }

 private:
  offset_t spaced(offset_t n) const { return aligned_ ? (n + 15) / 16 * 16 : n; }
  std::size_t range(index_t seq, index_t head) const {
    return uz(seq) * uz(shape_.n_kv_heads) + uz(head);
  }
  std::byte* data() const { return const_cast<std::byte*>(bytes_.data()) + lead_ * element_; }
  std::byte* element_at(index_t seq, index_t head, index_t slot, std::size_t d) const {
    return data() + uz(row_offset(seq, head, slot) + feature_at_[d]) * element_;
  }
  template <class F>
  void place_rows(F&& offset_of) {
    slots_.resize(uz(shape_.n_seq) * uz(shape_.n_kv_heads), shape_.max_slots);
    for (index_t s = 0; s < shape_.n_seq; ++s)
      for (index_t h = 0; h < shape_.n_kv_heads; ++h)
        for (index_t t = 0; t < shape_.max_slots; ++t)
          row_at_.push_back(t < capacity(s, h) ? offset_of(s, h, t) : -1);
  }

  void strided(offset_t slot, offset_t head_gap, offset_t seq_gap, bool slots_outside) {
    strided_layout l{0, slot * shape_.max_slots + head_gap, slot, shape_.max_slots};
    if (slots_outside) l.head_stride = slot, l.slot_stride = slot * shape_.n_kv_heads;
    l.seq_stride = slots_outside ? l.slot_stride * shape_.max_slots + seq_gap
                                 : l.head_stride * shape_.n_kv_heads + seq_gap;
    layout_ = l;
    place_rows([&](offset_t s, offset_t h, offset_t t) {
      return s * l.seq_stride + h * l.head_stride + t * l.slot_stride;
    });
  }

  void paged(cache_options const& o, generator& g, layout_id id, bool is_key) {
    index_t const size = o.block_size, heads = shape_.n_kv_heads;
    bool const per_head = id == layout_id::paged_per_head;
    index_t const used = (shape_.max_slots + size - 1) / size, gap = 2;
    index_t const tables = shape_.n_seq * (per_head ? heads : 1);
    paged_layout l;
    l.blocks_per_table = used;
    l.block_size = size;
    l.n_blocks = shape_.n_seq * used + 3;
    l.table_head_stride = per_head ? used + gap : 0;
    l.table_seq_stride = (used + gap) * (per_head ? heads : 1);
    l.slot_stride = per_head ? row_ : row_ * heads;
    l.head_stride = per_head ? static_cast<offset_t>(row_) * size : row_;
    l.block_stride = static_cast<offset_t>(row_) * heads * size + (per_head ? spaced(5) : 0);
    if (id == layout_id::tiled) tile(l, is_key);
    table_.assign(uz(tables) * uz(used + gap), -1);
    // Entries beyond the table are -1: whoever reads them leaves the pool.
    for (index_t h = 0; h < (per_head ? heads : 1); ++h) {
      std::vector<index_t> const blocks = g.choose(shape_.n_seq * used, l.n_blocks);
      for (index_t s = 0; s < shape_.n_seq; ++s)
        for (index_t b = 0; b < used; ++b)
          table_[uz(s * l.table_seq_stride + h * l.table_head_stride + b)] =
              blocks[uz(s) * uz(used) + uz(b)];
    }
    l.table = table_.data();
    layout_ = l;
    place_rows([&](index_t s, index_t h, index_t t) {
      offset_t const block =
          table_[uz(s * l.table_seq_stride + h * l.table_head_stride + t / size)];
      return block * l.block_stride + h * l.head_stride + t % size * l.slot_stride;
    });
  }

  /// vLLM's blocks: keys in tiles of 16 bytes, values transposed.
  void tile(paged_layout& l, bool is_key) {
    offset_t const x = is_key ? 16 / dtype_bytes(type_) : 1, tiles = (dim_ + x - 1) / x;
    l.slot_stride = x;
    l.head_stride = tiles * l.block_size * x;
    l.block_stride = l.head_stride * shape_.n_kv_heads + spaced(5);
    features_ = is_key ? feature_map{static_cast<index_t>(x), 1, l.block_size * x}
                       : feature_map{0, l.block_size, 0};
    for (offset_t d = 0; d < dim_; ++d) feature_at_[uz(d)] = d / x * l.block_size * x + d % x;
  }

  void ragged(cache_options const& o, generator& g) {
    std::size_t const n = uz(shape_.n_seq) * uz(shape_.n_kv_heads);
    slots_ = o.capacities.empty() ? std::vector<index_t>(n, shape_.max_slots) : o.capacities;
    base_.resize(n);
    offset_t const stride = row_ + spaced(1);
    offset_t next = stride;  // one guard row before and after each range
    for (index_t i : g.permutation(static_cast<index_t>(n))) {
      base_[uz(i)] = next + (aligned_ && i % 3 == 2 ? 1 : 0);
      next += (slots_[uz(i)] + 1) * stride;
    }
    layout_ = ragged_layout{base_.data(), slots_.data(), shape_.n_kv_heads, stride};
    place_rows([&](index_t s, index_t h, index_t t) { return base_[range(s, h)] + t * stride; });
  }

  void custom(generator& g) {
    ring_layout const l{shape_.n_kv_heads, shape_.max_slots, g.integer(0, shape_.max_slots), row_};
    place_rows([&](index_t s, index_t h, index_t t) {
      index_t const back = shape_.max_slots - 1 - (t + l.turn) % shape_.max_slots;
      return (static_cast<offset_t>(range(s, h)) * shape_.max_slots + back) * row_;
    });
    if (type_ == dtype::f32) return custom_view<float>(l);
    if (type_ == dtype::f16) return custom_view<fp16>(l);
    if (type_ == dtype::bf16) return custom_view<bf16>(l);
    if (type_ == dtype::e4m3) return custom_view<fp8_e4m3>(l);
    if (type_ == dtype::e5m2) return custom_view<fp8_e5m2>(l);
    custom_view<std::byte>(l);
  }
  template <class T>
  void custom_view(ring_layout const& l) {
    auto view = std::make_shared<kv_view<T, host_space, ring_layout>>();
    view->k_layout = l;
    custom_ = view->ref().k;
    custom_view_ = view;  // the reference points to the layout inside
  }

  void mark_rows(std::size_t tail) {
    std::size_t end = 0;
    for (offset_t row : row_at_)
      for (offset_t d : feature_at_) end = std::max(end, row < 0 ? 0 : uz(row + d) + 1);
    if (auto const& l = layout_; !custom_view_ && l.kind == layout_kind::paged)
      end = uz(l.paged.n_blocks * l.paged.block_stride);
    bytes_.assign((lead_ + end + tail) * element_, std::byte{0xff});
    owned_.assign(bytes_.size(), 0);
    for (offset_t row : row_at_)
      for (offset_t d : feature_at_)
        if (row >= 0) std::fill_n(&owned_[(lead_ + uz(row + d)) * element_], element_, char{1});
    table_copy_ = table_;
    base_copy_ = base_;
    slots_copy_ = slots_;
  }

  static void pack_int8(std::span<float const> x, std::vector<std::byte>& row) {
    float largest = 0;
    for (float e : x) largest = std::isnan(e) ? e : std::max(largest, std::abs(e));
    float const scale = std::isfinite(largest) ? largest / 127 : largest;
    std::memcpy(row.data(), &scale, sizeof scale);
    for (std::size_t d = 0; d < x.size(); ++d) {
      float const q = scale == 0 || !std::isfinite(scale) ? 1 : std::round(x[d] / scale);
      row[sizeof scale + d] = static_cast<std::byte>(static_cast<signed char>(q));
    }
  }
  void store(float x, std::byte* to) const {
    std::uint32_t const bits = type_ == dtype::f32    ? bit_copy<std::uint32_t>(x)
                               : type_ == dtype::f16  ? to_fp16(x).bits
                               : type_ == dtype::bf16 ? to_bf16(x).bits
                               : type_ == dtype::e4m3 ? to_e4m3(x).bits
                                                      : to_e5m2(x).bits;
    std::memcpy(to, &bits, element_);
  }
  float load(std::byte const* from) const {
    std::uint32_t bits = 0;
    std::memcpy(&bits, from, element_);
    auto const low = static_cast<std::uint16_t>(bits);
    auto const byte = static_cast<std::uint8_t>(bits);
    return type_ == dtype::f32    ? bit_copy<float>(bits)
           : type_ == dtype::f16  ? to_float(fp16{low})
           : type_ == dtype::bf16 ? to_float(bf16{low})
           : type_ == dtype::e4m3 ? to_float(fp8_e4m3{byte})
                                  : to_float(fp8_e5m2{byte});
  }

  dtype type_;
  index_t dim_;
  cache_shape shape_;
  std::size_t element_;
  bool aligned_;
  std::size_t lead_;  // elements before the data
  index_t row_ = 0;   // elements of a row; bytes of an opaque one
  std::vector<std::byte> bytes_;
  std::vector<char> owned_;
  std::vector<offset_t> row_at_, feature_at_;
  feature_map features_{};
  any_layout layout_{};
  plane_ref<> custom_{};
  std::shared_ptr<void> custom_view_;
  std::vector<index_t> table_, table_copy_, slots_, slots_copy_;
  std::vector<offset_t> base_, base_copy_;
};

}  // namespace kvkeep::test
