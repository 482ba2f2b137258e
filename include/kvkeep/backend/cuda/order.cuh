// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CUDA: the order of positions, for the ops that need it.
#pragma once

#include "kernels/order.cuh"
#include "slots.cuh"

namespace kvkeep::cuda {

/// Takes the scratch for the orders of a batch: 4 bytes per slot and head.
inline slot_orders take_orders(workspace& ws, batch_ref<device_space> const& batch,
                               slot_state<device_space> const& slots) noexcept {
  index_t const heads = slots.lengths.extent[1], n_slots = slots.positions.extent[2];
  slot_orders r;
  r.in_order = ws.take<int>(product(batch.n, heads));
  r.lists = ws.take<index_t>(product(batch.n, heads, n_slots));
  r.n_slots = n_slots;
  return r;
}

/// Finds them. Precondition: positions lie side by side.
inline status find_orders(context const& c, batch_ref<device_space> const& batch,
                          slot_state<device_space> const& slots,
                          slot_orders const& orders) noexcept {
  index_t const heads = slots.lengths.extent[1];
  KVKEEP_TRY(launch(c, head_grid(batch.n, heads, 1, threads_for(orders.n_slots)), 0,
                    in_order_kernel{batch, slots, orders}));
  constexpr int threads = order_kernel::most_threads;
  offset_t const parts = parts_in_turn(static_cast<offset_t>(batch.n) * heads,
                                       ceil_div(orders.n_slots, threads), c.n_sm);
  return launch(c, head_grid(batch.n, heads, parts, threads),
                shared_pieces::bytes<unsigned>(order_kernel::tile),
                order_kernel{batch, slots, orders});
}

}  // namespace kvkeep::cuda
