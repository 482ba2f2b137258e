// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CUDA: MorphKV's fused rows.
#pragma once

#include "kernels/fuse_mma.cuh"
#include "window_score.cuh"

namespace kvkeep::cuda {

/// The direct form of the heads that are not skipped. `job` has its rows and limits.
inline status launch_plain_fused(context const& c, window_job const& job, reduction fuse,
                                 score_map<device_space> const& out,
                                 tensor_ref<float, 3, device_space> const& out_heads) noexcept {
  KVKEEP_TRY(launch_plain_slices(c, job));
  KVKEEP_TRY(launch_join(c, job, nullptr));
  return launch(c, strip_grid(sizes_of(job), plain_slots, plain_threads), plain_tile::bytes(),
                plain_fuse_kernel{{}, job, {fuse}, out, out_heads});
}

/// The last old position of every head.
inline status launch_limits(context const& c, window_job const& job,
                            old_limits const& limits) noexcept {
  window_sizes const s = sizes_of(job);
  int const threads = head_threads(s.max_slots, s.heads(), c.n_sm);
  return launch(c, head_grid(s.n_entries, s.n_heads, 1, threads), old_limits::shared_bytes(),
                old_limit_kernel{limits});
}

/// All of the direct form for 16-bit keys.
inline status launch_mma_fused(context const& c, window_job const& job, old_limits const& limits,
                               reduction fuse, score_map<device_space> const& out) noexcept {
  plane_ref<device_space> const& k = job.layer.kv.k;
  window_sizes const s = sizes_of(job);
  KVKEEP_TRY(with_mma(k, [&]<class S>(S) {
    using kernel = split_old_kernel<typename S::type, S::blocks>;
    // A warp has a query at a time.
    offset_t const work = std::max<offset_t>(s.max_slots, offset_t{16} * job.n_queries());
    return launch(c, head_grid(s.n_entries, s.n_heads, 1, head_threads(work, s.heads(), c.n_sm)),
                  old_limits::shared_bytes(), kernel{{job}, limits});
  }));
  KVKEEP_TRY(launch_mma_slices(c, job));
  KVKEEP_TRY(launch_join(c, job, nullptr));
  return with_mma(k, [&]<class S>(S) {
    return for_both_kinds(k, [&]<class Whole>(Whole) {
      using kernel = mma_fuse_kernel<typename S::type, S::blocks, Whole::value>;
      fuse_plan const plan(job.n_rows, job.group());
      return launch_strips<kernel>(c, job, plan.turns() <= kernel::tile_turns, [&](index_t steps) {
        return kernel{job, {fuse}, out, plan, steps};
      });
    });
  });
}

/// MorphKV's direct form: by matrix products where keys are 16-bit numbers, unless somebody wants query heads apart.
/// Scratch for all queries at once: 8 bytes per query, and as much per query and 256 slots; with matrix products also
/// twice the bytes of 16-bit queries.
KVKEEP_CUDA_OP status enqueue(context& c, op::fused_rows<device_space> const& o,
                              workspace& ws) noexcept {
  plane_ref<device_space> const& k = o.layer.kv.k;
  if (!readable(k)) return status::unsupported;
  if (!slots_contiguous(o.rows.q) || !slots_contiguous(o.out) || !slots_contiguous(o.out_heads) ||
      !slots_contiguous(o.layer.slots.positions) || o.fuse == reduction::mean)
    return status::bad_argument;
  workspace::frame const frame(ws);
  window_job job{o.batch, o.layer, row_source::of(o.rows)};
  job.rows.lse = {};
  job.n_rows = o.rows.q.extent[2];
  job.slice_slots = fused_slice_slots;
  bool const mma = fits_mma(k) && !asked(o.out_heads);
  take_norms(job, job.n_rows, ws);
  if (mma) take_split(job, job.n_rows, ws);
  auto* const limit = ws.take<index_t>(product(sizes_of(job).heads()));
  job.limit = limit;
  if (!ws.ok()) return status::workspace_too_small;
  context const on = launching(c, ws);
  old_limits const limits{o.batch, o.layer.slots, o.recent, limit};
  if (mma) return launch_mma_fused(on, job, limits, o.fuse, o.out);
  KVKEEP_TRY(launch_limits(on, job, limits));
  return launch_plain_fused(on, job, o.fuse, o.out, o.out_heads);
}

}  // namespace kvkeep::cuda
