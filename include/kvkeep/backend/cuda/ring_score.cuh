// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CUDA: MorphKV's scores from cached weights.
#pragma once

#include "fused_rows.cuh"
#include "kernels/ring.cuh"

namespace kvkeep::cuda {

/// MorphKV's scores from cached weights. The kernels of the direct form are always launched; they leave
/// heads alone that the cached weights serve, which is known on the device. Scratch as the direct form's
/// without matrix products, and 4 bytes per query.
KVKEEP_CUDA_OP status enqueue(context& c, op::ring_score<device_space> const& o,
                              workspace& ws) noexcept {
  if (!readable(o.layer.kv.k)) return status::unsupported;
  if (!slots_contiguous(o.weights) || !slots_contiguous(o.q) || !slots_contiguous(o.out) ||
      !slots_contiguous(o.layer.slots.positions) || o.ring < 1 || o.fuse == reduction::mean)
    return status::bad_argument;
  workspace::frame const frame(ws);
  window_job job{o.batch, o.layer, {o.q, o.positions, {}, true, false, o.q.extent[2]}};
  job.n_rows = o.positions.extent[1];
  job.slice_slots = fused_slice_slots;
  take_norms(job, job.n_rows, ws);
  window_sizes const s = sizes_of(job);
  auto* const limit = ws.take<index_t>(product(s.heads()));
  auto* const skipped = ws.take<index_t>(product(s.heads()));
  auto* const inverse = ws.take<float>(product(s.heads(), job.n_queries()));
  job.limit = limit;
  job.skipped = skipped;
  if (!ws.ok()) return status::workspace_too_small;
  context const on = launching(c, ws);
  constexpr int threads = ring_kernel::most_threads;
  ring_kernel const ring{o, limit, inverse, skipped};
  KVKEEP_TRY(launch_limits(on, job, {o.batch, o.layer.slots, o.recent, limit}));
  KVKEEP_TRY(launch(on, head_grid(s.n_entries, s.n_heads, job.n_queries(), threads),
                    shared_pieces::bytes<float>(warp_size), ring_sums_kernel{ring}));
  grid strips = strip_grid(s, threads, threads);
  strips.y = parts_in_turn(strips.x, strips.y, c.n_sm);
  KVKEEP_TRY(launch(on, strips, shared_pieces::bytes<float>(warp_size), ring_fuse_kernel{ring}));
  return launch_plain_fused(on, job, o.fuse, o.out, {});
}

}  // namespace kvkeep::cuda
