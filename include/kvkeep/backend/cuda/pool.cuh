// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CUDA: rows of scores pooled over positions.
#pragma once

#include "kernels/pool.cuh"
#include "order.cuh"

namespace kvkeep::cuda {

/// Pools rows in place. Scratch: 4 bytes per value, 4 per slot.
KVKEEP_CUDA_OP status enqueue(context& c, op::pool_rows<device_space> const& o,
                              workspace& ws) noexcept {
  if (!slots_contiguous(o.values) || !slots_contiguous(o.slots.positions) || o.kernel < 1 ||
      o.kernel % 2 == 0)
    return status::bad_argument;
  workspace::frame const frame(ws);
  index_t const heads = o.slots.lengths.extent[1], n_slots = o.slots.positions.extent[2];
  slot_orders const orders = take_orders(ws, o.batch, o.slots);
  auto* const pooled = ws.take<float>(product(o.batch.n, heads, o.values.extent[2], n_slots));
  if (!ws.ok()) return status::workspace_too_small;
  context const on = launching(c, ws);
  if (o.kind == op::pooling::none || o.kernel == 1) return status::ok;
  pool_part const part{{}, o, orders, pooled};
  grid const g = slot_grid(o.batch.n, heads, n_slots);
  KVKEEP_TRY(find_orders(on, o.batch, o.slots, orders));
  KVKEEP_TRY(launch(on, g, 0, pool_kernel{part}));
  return launch(on, g, 0, pool_back_kernel{part});
}

}  // namespace kvkeep::cuda
