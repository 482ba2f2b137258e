// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CUDA: joint top-k counts over several score maps.
#pragma once

#include "kernels/layer_counts.cuh"
#include "launch.cuh"

namespace kvkeep::cuda {

/// The joint limit by counting 11, 11 and 10 bits, and how many of each part lie above it.
inline status count_joint(context const& c, joint_part const& part, index_t n_entries,
                          index_t parts, index_t n_slots) noexcept {
  constexpr std::size_t bins = shared_pieces::bytes<unsigned>(select_bins);
  constexpr std::size_t box = shared_pieces::bytes<long long>(warp_size);
  index_t const stretch = std::min(n_slots, joint_stretch::stretch);
  grid const heads = head_grid(n_entries, parts, ceil_div(n_slots, joint_stretch::stretch),
                               std::min(threads_for(stretch), joint_stretch::most_threads));
  grid const entries = head_grid(n_entries, 1, 1, joint_start_kernel::most_threads);
  struct digit {
    unsigned above, keep;
    int shift;
  };
  // Ten bits are left at the end: the bin's highest bit is the last one above.
  for (digit const d :
       {digit{0u, 0x7ffu, 21}, digit{0xffe00000u, 0x7ffu, 10}, digit{0xfffffc00u, 0x3ffu, 0}}) {
    KVKEEP_TRY(launch(c, heads, bins, joint_bins_kernel{{part}, d.above, d.shift}));
    KVKEEP_TRY(launch(c, entries, box, joint_digit_kernel{part, d.keep, d.shift}));
  }
  return launch(c, heads, box, joint_tally_kernel{{part}});
}

/// Joint counts. Scratch: 8 KB per entry, 8 to 20 bytes per entry, map and KV head. `unsupported` where an
/// entry's candidates may be more than 32 bits count.
KVKEEP_CUDA_OP status enqueue(context& c, op::layer_counts<device_space> const& o,
                              workspace& ws) noexcept {
  if (!slots_contiguous(o.scores) || (o.normalize && o.n_maps != 1) || o.skip < 0)
    return status::bad_argument;
  workspace::frame const frame(ws);
  index_t const heads = o.candidates.extent[1], n_slots = o.scores.extent[3];
  index_t const parts = o.n_maps * heads;
  if (product(parts, n_slots) > 0xffffffffu) return status::unsupported;
  std::size_t const all = product(o.batch.n, parts);
  joint_part part{o, heads, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
  if (o.normalize) part.factor = ws.take<float>(all);
  if (o.safe > 0) part.safe = ws.take<uint2>(all);
  part.bins = ws.take<unsigned>(product(o.batch.n, select_bins));
  part.above = ws.take<unsigned>(all);
  part.equal = ws.take<unsigned>(all);
  part.rank = ws.take<joint_rank>(product(o.batch.n));
  if (!ws.ok()) return status::workspace_too_small;
  context const on = launching(c, ws);
  grid const entries = head_grid(o.batch.n, 1, 1, joint_start_kernel::most_threads);
  std::size_t const box = shared_pieces::bytes<long long>(warp_size);
  if (o.normalize || o.safe > 0)
    KVKEEP_TRY(launch(on, head_grid(o.batch.n, parts, 1, threads_for(n_slots)),
                      joint_head_kernel::bytes(), joint_head_kernel{{}, part}));
  KVKEEP_TRY(launch(on, entries, box, joint_start_kernel{part}));
  KVKEEP_TRY(count_joint(on, part, o.batch.n, parts, n_slots));
  return launch(on, entries, box, joint_finish_kernel{part});
}

}  // namespace kvkeep::cuda
