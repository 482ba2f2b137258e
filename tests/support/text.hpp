// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Random token streams: queries, keys and values of every position, as a cache stores them.
#pragma once

#include <stdexcept>
#include <string>

#include "any_layout.hpp"
#include "oracle_morph.hpp"

namespace kvkeep::test {

/// All tokens of one sequence, per layer, with K and V as the cache's element type rounds them.
struct text {
  std::vector<oracle::tokens> layer;

  index_t size() const { return layer[0].k.extent(1); }
};

/// Content depends on generator, shape and type, not on the layout. `edit(l, k row, position)` may
/// change
/// a key before it is rounded.
template <class F>
text make_text(generator& g, cache_shape shape, index_t n_layers, index_t n, dtype type,
               float scale, F&& edit) {
  text t;
  index_t const heads = shape.n_kv_heads;
  shape.n_seq = shape.max_slots = 1;
  test_cache cell = test_cache::make(layout_id::hnd, type, shape);
  for (index_t l = 0; l < n_layers; ++l) {
    oracle::tokens x{oracle::array({shape.n_q_heads, n, shape.dim_k}),
                     oracle::array({heads, n, shape.dim_k}),
                     oracle::array({heads, n, shape.dim_v})};
    for (double& e : x.q.data) e = static_cast<double>(scale * g.normal());
    for (index_t p = 0; p < n; ++p)
      for (index_t h = 0; h < heads; ++h) {
        auto k = g.normals(uz(shape.dim_k), scale);
        edit(l, k, p);
        cell.set_k(0, 0, 0, k);
        cell.set_v(0, 0, 0, g.normals(uz(shape.dim_v)));
        auto const rk = cell.get_k(0, 0, 0), rv = cell.get_v(0, 0, 0);
        for (index_t d = 0; d < shape.dim_k; ++d) x.k.at(h, p, d) = static_cast<double>(rk[uz(d)]);
        for (index_t d = 0; d < shape.dim_v; ++d) x.v.at(h, p, d) = static_cast<double>(rv[uz(d)]);
      }
    t.layer.push_back(std::move(x));
  }
  return t;
}
inline text make_text(generator& g, cache_shape const& shape, index_t n_layers, index_t n,
                      dtype type = dtype::f32, float scale = 1) {
  return make_text(g, shape, n_layers, n, type, scale,
                   [](index_t, std::vector<float>&, index_t) {});
}

/// Message of the exception that f throws, or "accepted".
template <class F>
std::string refusal(F&& f) {
  try {
    f();
  } catch (std::invalid_argument const& e) {
    return e.what();
  }
  return "accepted";
}

}  // namespace kvkeep::test
