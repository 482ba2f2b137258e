// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The layers that the tests of attention and scoring ops run over.
#pragma once

#include "../support/run_op.hpp"

namespace kvkeep::test {

/// Calls f(layer, generator) for layers of random shape, layout and element type, whose batches hold some of
/// their sequences.
template <class F>
void for_layers(int seeds, index_t max_slots, index_t max_group, F&& f) {
  for_seeds(seeds, [&](generator& g) {
    layer_options o;
    o.cache.shape = random_shape(g, max_slots, max_group);
    o.n_batch = g.integer(1, o.cache.shape.n_seq);
    o.cache.seed = g.next();
    o.cache.layout = g.one_of(all_layouts());
    o.cache.type = g.one_of(readable_dtypes());
    INFO(o.cache.layout << " " << o.cache.type);
    test_layer const l(o);
    f(l, g);
    CHECK(l.cache.canaries_intact());
  });
}

/// One layer in every layout: `results(layer)` are rows of floats whose bits do not depend on it, for each
/// element type.
template <class F>
void same_in_every_layout(cache_options cache, F&& results) {
  cache.block_size = 8;
  cache.seed = 5;
  for (dtype const type : readable_dtypes()) {
    std::vector<std::vector<float>> first;
    for (layout_id const layout : all_layouts()) {
      INFO(layout << " " << type << " dim " << cache.shape.dim_k);
      cache.layout = layout;
      cache.type = type;
      layer_options o;
      o.cache = cache;
      test_layer const l(o);
      std::vector<std::vector<float>> const got = results(l);
      CHECK(l.cache.canaries_intact());
      if (first.empty()) first = got;
      REQUIRE(got.size() == first.size());
      for (std::size_t i = 0; i < got.size(); ++i) CHECK(same_bits(first[i], got[i]));
    }
  }
}

template <class F>
void same_in_every_layout(cache_shape const& shape, F&& results) {
  cache_options cache;
  cache.shape = shape;
  same_in_every_layout(cache, std::forward<F>(results));
}

/// A softcap and sink logits on some views.
class random_logits {
 public:
  random_logits(generator& g, kv_ref<>& kv) : sinks_(g.normals(uz(kv.shape.n_q_heads), 2)) {
    if (g.chance(0.3F)) kv.softcap = g.uniform(0.5F, 5);
    if (g.chance(0.3F)) kv.sink_logits = sinks_.data();
  }
  random_logits(random_logits const&) = delete;
  random_logits& operator=(random_logits const&) = delete;

 private:
  std::vector<float> sinks_;
};

/// Where copied keys begin, in elements.
struct key_place {
  offset_t shift = 0;  ///< of the first one
  offset_t apart = 0;  ///< between heads
};

/// The layer with its keys copied to rows that begin at multiples of 16 bytes where their size and place allow it.
class aligned_keys {
 public:
  explicit aligned_keys(test_layer const& l, key_place const& at = {})
      : layer_(l.ref()), block_(bytes_of(l, at)) {
    cache_shape const& s = l.shape();
    plane_ref<>& k = layer_.kv.k;
    offset_t const size = dtype_bytes(k.type), row = k.row_bytes / size;
    offset_t const head = s.max_slots * row + at.apart;
    strided_layout const to{s.n_kv_heads * head, head, row, s.max_slots};
    std::byte* const first = block_.span().data() + at.shift * size;
    for (index_t q = 0; q < s.n_seq; ++q)
      for (index_t h = 0; h < s.n_kv_heads; ++h)
        for (index_t t = 0; t < l.cache.capacity(q, h); ++t) {
          auto const from = l.cache.k().raw(q, h, t);
          std::copy(from.begin(), from.end(), first + to.offset(q, h, t) * size);
        }
    k.data = first;
    k.features = {};
    k.layout = to;
  }
  layer_ref<> const& ref() const { return layer_; }

 private:
  static std::size_t bytes_of(test_layer const& l, key_place const& at) {
    cache_shape const& s = l.shape();
    plane_ref<> const k = l.ref().kv.k;
    std::size_t const heads = uz(s.n_seq) * uz(s.n_kv_heads), size = uz(dtype_bytes(k.type));
    return heads * (uz(s.max_slots) * uz(k.row_bytes) + uz(at.apart) * size) + uz(at.shift) * size;
  }

  layer_ref<> layer_;
  aligned_block block_;
};

}  // namespace kvkeep::test
