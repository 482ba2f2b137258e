// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// One layer's K and V with the same logical content in every layout and element type.
#pragma once

#include "test_plane.hpp"

namespace kvkeep::test {

/// Owns K and V of one layer. May be moved, not copied: index arrays are referred to.
class test_cache {
 public:
  explicit test_cache(cache_options const& o)
      : shape_(o.shape), k_(o, o.shape.dim_k, true), v_(o, o.shape.dim_v, false) {}
  test_cache(test_cache&&) = default;
  test_cache& operator=(test_cache&&) = default;

  static test_cache make(layout_id layout, dtype type, cache_shape shape, std::uint64_t seed = 1) {
    cache_options o;
    o.layout = layout;
    o.type = type;
    o.shape = shape;
    o.seed = seed;
    return test_cache(o);
  }

  cache_shape const& shape() const { return shape_; }
  test_plane const& k() const { return k_; }
  test_plane const& v() const { return v_; }
  test_plane& k() { return k_; }
  test_plane& v() { return v_; }
  index_t capacity(index_t seq, index_t head) const {
    return std::min(k_.capacity(seq, head), v_.capacity(seq, head));
  }

  void set_k(index_t seq, index_t head, index_t slot, std::span<float const> x) {
    k_.set(seq, head, slot, x);
  }
  void set_v(index_t seq, index_t head, index_t slot, std::span<float const> x) {
    v_.set(seq, head, slot, x);
  }
  /// Values as stored, after rounding to the element type.
  std::vector<float> get_k(index_t seq, index_t head, index_t slot) const {
    return k_.get(seq, head, slot);
  }
  std::vector<float> get_v(index_t seq, index_t head, index_t slot) const {
    return v_.get(seq, head, slot);
  }
  /// Normal values in every slot, the same for every layout.
  void fill(std::uint64_t seed, float k_scale = 1, float v_scale = 1) {
    generator g(seed);
    for (index_t s = 0; s < shape_.n_seq; ++s)
      for (index_t h = 0; h < shape_.n_kv_heads; ++h)
        for (index_t t = 0; t < shape_.max_slots; ++t) {
          auto const k = g.normals(uz(shape_.dim_k), k_scale);
          auto const v = g.normals(uz(shape_.dim_v), v_scale);
          if (t >= capacity(s, h)) continue;
          set_k(s, h, t, k);
          set_v(s, h, t, v);
        }
  }

  /// One slot's bytes of K then V, in feature order: what compaction must not change.
  std::vector<std::byte> raw(index_t seq, index_t head, index_t slot) const {
    std::vector<std::byte> row = k_.raw(seq, head, slot);
    std::vector<std::byte> const v = v_.raw(seq, head, slot);
    row.insert(row.end(), v.begin(), v.end());
    return row;
  }
  bool canaries_intact() const { return k_.intact() && v_.intact(); }

  /// Softmax scale 1/sqrt(dim_k), no softcap, no sink logits. Valid while the cache lives.
  kv_ref<> ref() const {
    kv_ref<> r;
    r.shape = shape_;
    r.k = k_.ref();
    r.v = v_.ref();
    r.scale = 1 / std::sqrt(static_cast<float>(shape_.dim_k));
    return r;
  }

 private:
  cache_shape shape_;
  test_plane k_, v_;
};

}  // namespace kvkeep::test
