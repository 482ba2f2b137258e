// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// A prompt's tokens, and their scores without a session: the pieces below it, called alone.
#pragma once

#include <kvkeep/engine/policy_table.hpp>

#include "arrays.hpp"
#include "support/cache.hpp"

namespace kvkeep::replay {

using policy_type = any_policy<cpu::context>;

/// The tokens of B prompts of equal length in one layer. Arrays are the case's, row-major.
struct prompt_data {
  cache_shape shape{};       ///< n_seq = B, max_slots = tokens
  index_t tokens = 0;        ///< T
  float const* k = nullptr;  ///< [B, kv_head, T, dim_k], or null: zeros
  float const* v = nullptr;  ///< [B, kv_head, T, dim_v], or null: zeros
  float const* q = nullptr;  ///< [B, q_head, q_rows, dim_k] of the last q_rows tokens, or null
  index_t q_rows = 0;
};

/// The first `slots` tokens (at most T) in a cache of the given layout.
inline tools::kv_cache make_cache(prompt_data const& p, layout_kind layout, index_t slots) {
  cache_shape s = p.shape;
  s.max_slots = slots;
  tools::kv_cache cache(s, layout);
  if (p.k == nullptr) return cache;
  offset_t row = 0;
  for (index_t b = 0; b < s.n_seq; ++b)
    for (index_t h = 0; h < s.n_kv_heads; ++h)
      for (index_t t = 0; t < p.tokens; ++t, ++row)
        if (t < slots)
          cache.write(b, h, t, p.k + row * s.dim_k, p.v == nullptr ? nullptr : p.v + row * s.dim_v);
  return cache;
}

/// Measures the scratch of `f(workspace&)`, then runs it.
template <class F>
void run_measured(char const* call, F&& f) {
  workspace counting;
  expect(f(counting), call);
  std::vector<std::byte> memory(counting.peak() + workspace::alignment);
  workspace placed(memory);
  expect(f(placed), call);
}

/// Scores `[B, kv_head, T]` of a policy at the end of the prompt, from its scorer alone; joined
/// over the heads where one set serves a layer.
std::vector<float> prompt_scores(policy_type const& policy, prompt_data const& p,
                                 layout_kind layout);

}  // namespace kvkeep::replay
