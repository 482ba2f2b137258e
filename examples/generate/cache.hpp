// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The engine's cache: K and V of all layers and sequences in one of three layouts, with its allocator.
#pragma once

#include <kvkeep/core/workspace.hpp>
#include <kvkeep/view/kv_view.hpp>

#include <vector>

namespace kvkeep::generate {

/// Owns fp32 K and V. The library sees views; lengths and positions are the session's.
/// - strided: `[layer, seq, kv_head, slot, dim]`;
/// - paged: blocks `[slot, kv_head, dim]` from one pool, a table per layer and sequence;
/// - ragged: a range of rows of one pool per layer, sequence and KV head.
class kv_cache {
 public:
  struct layout_options {
    layout_kind kind = layout_kind::strided;
    index_t block_size = 16;  ///< slots per block (paged)
  };

  kv_cache(cache_shape const& shape, index_t n_layers, layout_options const& o);
  kv_cache(kv_cache const&) = delete;
  kv_cache& operator=(kv_cache const&) = delete;

  kv_ref<> const& view(index_t layer) const { return views_[static_cast<std::size_t>(layer)]; }
  cache_shape const& shape() const { return shape_; }

  /// Paged: makes the sequence's table cover exactly `slots` slots. The others have room for all.
  void resize(index_t layer, index_t seq, index_t slots);

  struct place {
    index_t layer = 0;
    index_t seq = 0;
    index_t head = 0;
    index_t slot = 0;
  };
  float* k(place const& p) { return at(view(p.layer).k, p); }
  float* v(place const& p) { return at(view(p.layer).v, p); }

  /// Paged: most blocks in use at a time, and bytes of one. Otherwise 0.
  std::size_t peak_blocks() const { return peak_blocks_; }
  std::size_t block_bytes() const;

 private:
  static float* at(plane_ref<> const& plane, place const& p);
  void make_pages(index_t block_size);
  void make_ranges();
  std::vector<index_t>& held(index_t layer, index_t seq) {
    return held_[static_cast<std::size_t>(layer) * static_cast<std::size_t>(shape_.n_seq) +
                 static_cast<std::size_t>(seq)];
  }

  cache_shape shape_;
  index_t n_layers_;
  std::vector<float> k_, v_;
  std::vector<kv_ref<>> views_;
  index_t block_size_ = 0;
  std::vector<index_t> free_;               ///< blocks
  std::vector<std::vector<index_t>> held_;  ///< [layer, seq] blocks of a table, in order
  std::vector<index_t> table_;              ///< [layer, seq, block]
  std::size_t peak_blocks_ = 0;
  std::vector<offset_t> base_;  ///< [layer, seq, kv_head] of ragged ranges
  std::vector<index_t> slots_;  ///< [seq, kv_head]
};

}  // namespace kvkeep::generate
