// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CPU: means of scores over KV heads and over layers.
#pragma once

#include "../../op/reduce.hpp"
#include "context.hpp"
#include "simd.hpp"

namespace kvkeep::cpu {
inline namespace KVKEEP_CPU_ISA {

/// Mean over the KV heads, written back to each. Cost: 8 bytes per score.
KVKEEP_CPU_OP status enqueue(context& c, op::mean_heads<host_space> const& o,
                             workspace& ws) noexcept {
  if (!slots_contiguous(o.scores)) return status::bad_argument;
  if (!placed(ws)) return not_placed(ws);
  index_t const heads = o.slots.lengths.extent[1];
  vf const divisor = splat(static_cast<float>(heads));
  for_heads(c, o.batch.n, 1, [&](index_t b, index_t, int) {
    index_t const n = o.slots.lengths(o.batch.id_of(b), 0);
    for (index_t j = 0; j < n; j += lanes) {
      vf sum = load_some(o.scores.at(b, 0, j), n - j);
      for (index_t h = 1; h < heads; ++h) sum = sum + load_some(o.scores.at(b, h, j), n - j);
      vf const mean = sum / divisor;
      for (index_t h = 0; h < heads; ++h) store_some(o.scores.at(b, h, j), mean, n - j);
    }
  });
  return status::ok;
}

/// Running sum over layers, and the mean at the last one. Cost: 12 bytes per score.
KVKEEP_CPU_OP status enqueue(context& c, op::mean_layers<host_space> const& o,
                             workspace& ws) noexcept {
  if (!slots_contiguous(o.scores) || !slots_contiguous(o.sum) || o.n_layers < 1)
    return status::bad_argument;
  if (!placed(ws)) return not_placed(ws);
  vf const divisor = splat(static_cast<float>(o.n_layers));
  for_heads(c, o.batch.n, o.slots.lengths.extent[1], [&](index_t b, index_t h, int) {
    index_t const n = o.slots.lengths(o.batch.id_of(b), h);
    for (index_t j = 0; j < n; j += lanes) {
      float* const to = o.sum.at(b, h, j);
      vf sum = load_some(o.scores.at(b, h, j), n - j);
      if (!o.first) sum = load_some(static_cast<float const*>(to), n - j) + sum;
      store_some(to, o.last ? sum / divisor : sum, n - j);
    }
  });
  return status::ok;
}

}  // namespace KVKEEP_CPU_ISA
}  // namespace kvkeep::cpu
