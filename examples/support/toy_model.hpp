// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The engine side of the examples: a model whose queries, keys and values are made from their indices, so
/// that any token of any layer can be written again and checked.
#pragma once

#include <kvkeep/kvkeep.hpp>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace toy {

using kvkeep::index_t;

inline constexpr index_t n_layers = 2, n_q_heads = 8, n_kv_heads = 2, dim = 32;

/// Deterministic value in [-1, 1).
inline float value(std::uint64_t kind, std::uint64_t layer, std::uint64_t head,
                   std::uint64_t position, std::uint64_t d) {
  std::uint64_t x = (((kind * 64 + layer) * 64 + head) * 1048576 + position) * 512 + d;
  x += 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  x ^= x >> 31;
  return static_cast<float>(x >> 40) / 8388608.0F - 1.0F;
}

inline void fill(float* row, int kind, index_t layer, index_t head, index_t position) {
  for (index_t d = 0; d < dim; ++d)
    row[d] = 2 * value(static_cast<std::uint64_t>(kind), static_cast<std::uint64_t>(layer),
                       static_cast<std::uint64_t>(head), static_cast<std::uint64_t>(position),
                       static_cast<std::uint64_t>(d));
}

/// Key (kind 1) and value (kind 2) of one token into rows of a cache.
inline void write_token(float* k, float* v, index_t layer, index_t head, index_t position) {
  fill(k, 1, layer, head, position);
  fill(v, 2, layer, head, position);
}

/// Queries `[q_head, n, dim]` of positions first .. first + n.
inline std::vector<float> make_queries(index_t layer, index_t first, index_t n) {
  std::vector<float> q(kvkeep::product(n_q_heads, n, dim));
  for (index_t h = 0; h < n_q_heads; ++h)
    for (index_t t = 0; t < n; ++t)
      fill(q.data() + (static_cast<std::ptrdiff_t>(h) * n + t) * dim, 0, layer, h, first + t);
  return q;
}

/// Examples stop at the first call that is refused.
inline void expect(kvkeep::status s, char const* what) {
  if (s == kvkeep::status::ok) return;
  std::fprintf(stderr, "%s: %s\n", what, kvkeep::to_string(s));
  std::exit(1);
}

}  // namespace toy
