// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CUDA: the best slots of each head, the best whole blocks, the victim.
#pragma once

#include "evict.cuh"

namespace kvkeep::cuda {

/// Every plan must have room for all slots: what is kept is known on the device alone.
inline bool room_in(keep_plan<device_space> const& plan,
                    slot_state<device_space> const& s) noexcept {
  return plan.slots.extent[2] >= s.positions.extent[2];
}

/// One block per head.
inline grid select_grid(index_t n_entries, slot_state<device_space> const& s) noexcept {
  return head_grid(n_entries, s.lengths.extent[1], 1, threads_for(s.positions.extent[2]));
}

/// Keep plans. `bad_argument` if a plan has fewer places than there are slots.
KVKEEP_CUDA_OP status enqueue(context& c, op::select_k<device_space> const& o,
                              workspace& ws) noexcept {
  if (!slots_contiguous(o.scores) || !slots_contiguous(o.slots.positions) ||
      !slots_contiguous(o.out.slots) || !room_in(o.out, o.slots))
    return status::bad_argument;
  if (!ws.ok()) return status::workspace_too_small;
  auto const start = [&]<bool Cached>(std::bool_constant<Cached>) {
    using kernel = select_k_kernel<Cached>;
    return launch(launching(c, ws), select_grid(o.batch.n, o.slots),
                  kernel::bytes(o.slots.positions.extent[2]), kernel{{}, o});
  };
  bool const fits = select_k_kernel<true>::bytes(o.slots.positions.extent[2]) <=
                    static_cast<std::size_t>(c.shared_bytes);
  return fits ? start(std::true_type{}) : start(std::false_type{});
}

/// Plans of whole blocks and the open tail. Scratch: 8 bytes per block.
KVKEEP_CUDA_OP status enqueue(context& c, op::select_blocks<device_space> const& o,
                              workspace& ws) noexcept {
  if (!slots_contiguous(o.scores) || !slots_contiguous(o.slots.positions) ||
      !slots_contiguous(o.out.slots) || o.block < 1 || o.how == reduction::mean ||
      !room_in(o.out, o.slots))
    return status::bad_argument;
  workspace::frame const frame(ws);
  index_t const heads = o.slots.lengths.extent[1];
  index_t const most_blocks = o.slots.positions.extent[2] / o.block + 1;
  auto* const blocks = ws.take<uint2>(product(o.batch.n, heads, most_blocks));
  if (!ws.ok()) return status::workspace_too_small;
  return launch(launching(c, ws), select_grid(o.batch.n, o.slots), select_box::bytes(),
                select_blocks_kernel{{}, o, blocks, most_blocks});
}

/// Victims.
KVKEEP_CUDA_OP status enqueue(context& c, op::evict_one<device_space> const& o,
                              workspace& ws) noexcept {
  return run_stage(c, o, o.batch.n, o.slots.lengths.extent[1], o.slots.positions.extent[2], ws);
}

}  // namespace kvkeep::cuda
