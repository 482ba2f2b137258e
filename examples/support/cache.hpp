// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// One layer's fp32 K and V, owned, in the layout that the command line names.
#pragma once

#include <kvkeep/view/kv_view.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <string_view>
#include <utility>
#include <vector>

namespace kvkeep::tools {

/// Block numbers and ranges are shuffled: nothing may depend on the order of memory.
template <class Vector>
void shuffle(Vector& v) {
  std::uint64_t state = 0x9e3779b97f4a7c15ULL;
  for (std::size_t i = v.size(); i > 1; --i) {
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    std::swap(v[i - 1], v[(state >> 33) % i]);
  }
}

/// Owns K and V of one layer for all sequence rows; zeros at first. May be moved, not copied: the
/// view points into its arrays, which stay where they are.
/// @tparam Allocator  of memory that the host writes, whatever `Space` says of who else reads it
template <class Space, template <class> class Allocator>
class kv_cache_in {
 public:
  static constexpr index_t block_size = 16;

  /// @param layout  strided (`[seq, kv_head, slot, dim]`), paged (blocks of 16 slots, a table per
  ///   sequence) or ragged (a range per sequence and head)
  kv_cache_in(cache_shape const& s, layout_kind layout) : view_{} {
    auto const rows = static_cast<std::size_t>(s.n_seq) * static_cast<std::size_t>(s.n_kv_heads);
    index_t const blocks = (s.max_slots + block_size - 1) / block_size;
    index_t const slots = layout == layout_kind::paged ? blocks * block_size : s.max_slots;
    k_.resize(rows * static_cast<std::size_t>(slots) * static_cast<std::size_t>(s.dim_k));
    v_.resize(rows * static_cast<std::size_t>(slots) * static_cast<std::size_t>(s.dim_v));
    if (layout == layout_kind::strided) {
      view_ = contiguous_view<Space>(k_.data(), v_.data(), s);
    } else if (layout == layout_kind::paged) {
      index_.resize(static_cast<std::size_t>(s.n_seq) * static_cast<std::size_t>(blocks));
      std::iota(index_.begin(), index_.end(), 0);
      shuffle(index_);
      view_ = paged_view<Space>(k_.data(), v_.data(), s,
                                {block_size, s.n_seq * blocks, index_.data(), blocks});
    } else if (layout == layout_kind::ragged) {
      std::vector<index_t> order(rows);
      std::iota(order.begin(), order.end(), 0);
      shuffle(order);
      for (index_t const at : order) {
        k_base_.push_back(offset_t{at} * slots * s.dim_k);
        v_base_.push_back(offset_t{at} * slots * s.dim_v);
      }
      index_.assign(rows, slots);
      view_ = ragged_view<Space>(k_.data(), v_.data(), s, k_base_.data(), v_base_.data(),
                                 index_.data());
    } else {
      throw std::invalid_argument("a kv_cache is strided, paged or ragged");
    }
  }
  kv_cache_in(kv_cache_in const&) = delete;
  kv_cache_in& operator=(kv_cache_in const&) = delete;
  kv_cache_in(kv_cache_in&&) = default;
  kv_cache_in& operator=(kv_cache_in&&) = default;

  kv_ref<Space> const& view() const { return view_; }

  /// Writes one slot. @param k  `[dim_k]`  @param v  `[dim_v]`, or null: V stays
  void write(index_t seq, index_t head, index_t slot, float const* k, float const* v) {
    std::copy_n(k, view_.shape.dim_k, k_.begin() + offset(view_.k, seq, head, slot));
    if (v != nullptr)
      std::copy_n(v, view_.shape.dim_v, v_.begin() + offset(view_.v, seq, head, slot));
  }

 private:
  static std::ptrdiff_t offset(plane_ref<Space> const& p, index_t seq, index_t head, index_t slot) {
    return visit_layout(p.layout, [&](auto const& l) { return l.offset(seq, head, slot); });
  }

  template <class T>
  using array = std::vector<T, Allocator<T>>;

  array<float> k_, v_;
  array<index_t> index_;  ///< block table, or capacities of ragged ranges
  array<offset_t> k_base_, v_base_;
  kv_ref<Space> view_;
};

}  // namespace kvkeep::tools
