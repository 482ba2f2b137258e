// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CUDA: moments of query rows, and the logits of keys by them.
#pragma once

#include "kernels/quadratic.cuh"
#include "kernels/query_moments.cuh"
#include "launch.cuh"

namespace kvkeep::cuda {

/// Moments of query rows. Scratch: the rows turned back, 1/64 of it for partial sums.
KVKEEP_CUDA_OP status enqueue(context& c, op::query_moments<device_space> const& o,
                              workspace& ws) noexcept {
  if (o.rows.by_id || !slots_contiguous(o.rows.q) || !slots_contiguous(o.turns))
    return status::bad_argument;
  workspace::frame const frame(ws);
  index_t const entries = o.batch.n, heads = o.rows.q.extent[1], n_rows = o.rows.q.extent[2];
  index_t const dim = o.layout.dim;
  offset_t const n_parts = ceil_div(n_rows, moment_parts::part_rows);
  moment_parts p{o, static_cast<index_t>(n_parts), nullptr, nullptr, nullptr, nullptr, nullptr};
  p.x = ws.take<float>(product(entries, heads, n_rows, dim));
  p.sums = ws.take<float>(product(entries, heads, n_parts, dim));
  p.counts = ws.take<float>(product(entries, n_parts));
  p.mean = ws.take<float>(product(entries, heads, dim));
  p.weights = ws.take<float>(product(entries, 2));
  if (!ws.ok()) return status::workspace_too_small;
  if (n_rows == 0) return status::ok;
  context const on = launching(c, ws);
  auto const start = [&](auto const& kernel, index_t n_heads, offset_t parts, std::size_t shared) {
    return launch(on, head_grid(entries, n_heads, parts, kernel.most_threads), shared, kernel);
  };
  KVKEEP_TRY(start(moment_rows_kernel{p}, heads, n_parts, 0));
  KVKEEP_TRY(start(moment_mean_kernel{p}, heads, 1, 0));
  if (o.layout.spreads) {
    using products = moment_products_kernel;
    KVKEEP_TRY(start(products{p}, heads, products::tiles(dim), products::bytes()));
  }
  return start(moment_join_kernel{p}, heads / o.layout.group, 1, 0);
}

/// Quadratic logits. No scratch.
KVKEEP_CUDA_OP status enqueue(context& c, op::quadratic_logits<device_space> const& o,
                              workspace& ws) noexcept {
  cache_shape const& s = o.layer.kv.shape;
  if (!readable(o.layer.kv.k)) return status::unsupported;
  if (!slots_contiguous(o.form) || !slots_contiguous(o.out) ||
      !slots_contiguous(o.layer.slots.positions))
    return status::bad_argument;
  if (!ws.ok()) return status::workspace_too_small;
  using kernel = quadratic_kernel;
  return launch(
      launching(c, ws),
      head_grid(o.batch.n, s.n_kv_heads, ceil_div(s.max_slots, kernel::tile), kernel::most_threads),
      kernel::bytes(), kernel{o});
}

}  // namespace kvkeep::cuda
