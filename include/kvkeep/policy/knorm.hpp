// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// KNorm (L2Norm): keep the keys with the smallest norm.
#pragma once

#include <cmath>

#include "policy.hpp"

namespace kvkeep {

/// -||k||_2 of a key (RoPE does not change it).
struct key_norm_fn {
  static constexpr char const* name = "key_norm";
  static constexpr bool reads_k = true;
  static constexpr bool reads_v = false;

  KVKEEP_HD float operator()(slot_values const& s) const noexcept {
    float sum = 0;
    for (index_t d = 0; d < s.dim_k; ++d) sum += s.k[d] * s.k[d];
    return -std::sqrt(sum);
  }
};

/// Spec 3.6; arXiv 2406.11430, KVCache-Factory L2NormCluster, kvpress KnormPress. Works for the prompt and
/// while decoding (evict the largest norm). Norms are taken when a token arrives: a decision reads no keys.
/// Deviation: sinks and a window can be protected; the published code protects nothing.
/// Layers to leave alone (`skip_layers` of KVCache-Factory) are skipped when a session is bound.
using knorm = policy<slot_score<key_norm_fn>>;

struct knorm_options {
  index_t capacity = 1024;
  index_t sinks = 0;
  index_t window = 0;
  double evict_after = 1;  ///< bursts
};

inline knorm make_knorm(knorm_options const& o) {
  return {"knorm", {}, {o.capacity}, {}, {o.sinks, o.window}, scope::head, {o.evict_after}};
}

}  // namespace kvkeep
