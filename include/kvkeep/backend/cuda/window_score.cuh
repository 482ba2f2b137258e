// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CUDA: attention mass per column.
#pragma once

#include "kernels/slices_mma.cuh"
#include "kernels/slices_wgmma.cuh"
#include "kernels/split.cuh"
#include "kernels/sums_mma.cuh"
#include "kernels/sums_wgmma.cuh"
#include "kernels/window_plain.cuh"
#include "launch.cuh"

namespace kvkeep::cuda {

inline window_sizes sizes_of(window_job const& job) noexcept {
  cache_shape const& s = job.layer.kv.shape;
  return {job.batch.n, s.n_kv_heads, s.group(), job.n_rows, s.max_slots, job.slice_slots};
}

/// Takes memory for the normalisers of `n_rows` rows at a time.
inline void take_norms(window_job& job, index_t n_rows, workspace& ws) noexcept {
  window_sizes const s = sizes_of(job);
  std::size_t const n = product(s.heads(), n_rows, s.group);
  job.norms = ws.take<row_norm>(n);
  if (job.rows.lse.data != nullptr) return;
  job.n_slices = static_cast<index_t>(s.slices());
  job.slices = ws.take<row_sum>(n * product(s.slices()));
}

/// An element type and a number of blocks of 32 features.
template <class T, int Blocks>
struct mma_shape {
  using type = T;
  static constexpr int blocks = Blocks;
};

/// Whether matrix products serve the keys: it depends on their type and size, never on the layout.
inline bool fits_mma(plane_ref<device_space> const& k) noexcept {
  return dtype_bytes(k.type) <= 2 && k.dim <= 256;
}
/// f(mma_shape) of the smallest shape that holds the keys. FP8 ones are multiplied as fp16, which holds them exactly.
template <class F>
status with_mma(plane_ref<device_space> const& k, F const& f) noexcept {
  auto const sized = [&]<class T>(T) {
    return k.dim <= 64    ? f(mma_shape<T, 2>{})
           : k.dim <= 128 ? f(mma_shape<T, 4>{})
                          : f(mma_shape<T, 8>{});
  };
  return k.type == dtype::bf16 ? sized(bf16{}) : sized(fp16{});
}

/// Which heads' keys are whole pieces of 16 bytes of 16-bit numbers.
inline alignment whole_pieces(plane_ref<device_space> const& k) noexcept {
  return dtype_bytes(k.type) == 2 && k.contiguous() && k.dim % 8 == 0 ? alignment_of(k)
                                                                      : alignment::none;
}

/// Takes memory for the split queries of `n_rows` rows at a time.
inline void take_split(window_job& job, index_t n_rows, workspace& ws) noexcept {
  window_sizes const s = sizes_of(job);
  std::size_t const n = product(s.heads(), n_rows, s.group);
  index_t const dim = job.layer.kv.k.dim;
  std::size_t const pieces = dim <= 64 ? 8 : dim <= 128 ? 16 : 32;
  job.split = {ws.take<uint4>(n * pieces), ws.take<uint4>(n * pieces), ws.take<split_query>(n)};
}
inline status launch_split(context const& c, window_job const& job) noexcept {
  return with_mma(job.layer.kv.k, [&]<class S>(S) {
    using kernel = split_kernel<typename S::type, S::blocks>;
    window_sizes const s = sizes_of(job);
    return launch(c,
                  head_grid(s.n_entries, s.n_heads, ceil_div(job.n_queries(), kernel::tile),
                            kernel::most_threads),
                  0, kernel{{job}});
  });
}

inline status launch_plain_slices(context const& c, window_job const& job) noexcept {
  return launch(c, slice_grid(sizes_of(job), job.n_rows, plain_queries, plain_threads),
                plain_tile::bytes(), plain_slices_kernel{{}, job});
}
template <class Kernel>
status launch_slices(context const& c, window_job const& job, index_t queries) noexcept {
  return launch(c, slice_grid(sizes_of(job), job.n_rows, queries, Kernel::most_threads),
                Kernel::bytes(), Kernel{job});
}
inline status launch_mma_slices(context const& c, window_job const& job) noexcept {
  return with_mma(job.layer.kv.k, [&]<class S>(S) {
    using T = typename S::type;
    if constexpr (has_sm90a_code && S::blocks <= 4) {
      using wide = wgmma_slices_kernel<T, S::blocks>;
      if (warpgroups_multiply(c.capability, job.layer.kv.k.dim))
        return launch_slices<wide>(c, job, wide::tile);
    }
    using kernel = mma_slices_kernel<T, S::blocks>;
    return launch_slices<kernel>(c, job, kernel::batches * batch_queries);
  });
}

/// Normalisers from the slices' shares.
inline status launch_join(context const& c, window_job const& job, float const* sinks) noexcept {
  window_sizes const s = sizes_of(job);
  constexpr int threads = join_slices_kernel::most_threads;
  return launch(c, head_grid(s.n_entries, s.n_heads, ceil_div(job.n_queries(), threads), threads),
                0, join_slices_kernel{job, sinks});
}

struct sums_output {
  tensor_ref<float, 4, device_space> const& out;
  bool by_id, per_query_head, clear;
};

inline status launch_plain_sums(context const& c, window_job const& job,
                                sums_output const& to) noexcept {
  return launch(c, strip_grid(sizes_of(job), plain_slots, plain_threads), plain_tile::bytes(),
                plain_sums_kernel{{}, job, to.out, to.by_id, to.per_query_head, to.clear});
}
/// @param stay  whether a head's queries stay in place for all strips  @param make  a kernel of some steps
template <class Kernel, class F>
status launch_strips(context const& c, window_job const& job, bool stay, F const& make) noexcept {
  constexpr index_t keys = Kernel::strip_keys;
  auto const steps = static_cast<index_t>(strip_steps(sizes_of(job), keys, stay, c.n_sm));
  return launch(c, strip_grid(sizes_of(job), keys * steps, Kernel::most_threads), Kernel::bytes(),
                make(steps));
}
template <class Kernel>
status launch_sum_strips(context const& c, window_job const& job, sums_output const& to) noexcept {
  chain_plan const plan(job.n_rows, job.group(), to.per_query_head);
  bool const stay = plan.sets == 1 && plan.turns() <= Kernel::tile_turns;
  return launch_strips<Kernel>(c, job, stay, [&](index_t steps) {
    return Kernel{job, to.out, to.by_id, to.per_query_head, to.clear, plan, steps};
  });
}
/// f of a kernel for heads whose keys are whole pieces of 16 bytes, and of one for the others, as far as there may be
/// such heads.
template <class F>
status for_both_kinds(plane_ref<device_space> const& k, F const& f) noexcept {
  alignment const whole = whole_pieces(k);
  if (whole != alignment::none) KVKEEP_TRY(f(std::true_type{}));
  return whole == alignment::all ? status::ok : f(std::false_type{});
}
inline status launch_mma_sums(context const& c, window_job const& job,
                              sums_output const& to) noexcept {
  plane_ref<device_space> const& k = job.layer.kv.k;
  return with_mma(k, [&]<class S>(S) {
    using T = typename S::type;
    if constexpr (has_sm90a_code && S::blocks <= 4)
      if (warpgroups_multiply(c.capability, k.dim))
        return launch_sum_strips<wgmma_sums_kernel<T, S::blocks>>(c, job, to);
    return for_both_kinds(k, [&]<class Whole>(Whole) {
      return launch_sum_strips<mma_sums_kernel<T, S::blocks, Whole::value>>(c, job, to);
    });
  });
}

/// Column sums of some rows. @param norms they have no log-sum-exp
inline status launch_sums(context const& c, window_job const& job, sums_output const& to,
                          bool norms) noexcept {
  bool const mma = fits_mma(job.layer.kv.k);
  if (mma) KVKEEP_TRY(launch_split(c, job));
  if (norms) {
    KVKEEP_TRY(mma ? launch_mma_slices(c, job) : launch_plain_slices(c, job));
    KVKEEP_TRY(launch_join(c, job, job.layer.kv.sink_logits));
  }
  return mma ? launch_mma_sums(c, job, to) : launch_plain_sums(c, job, to);
}

/// What ops on column statistics refuse.
template <class Op>
status check_columns(Op const& o) noexcept {
  if (!readable(o.layer.kv.k)) return status::unsupported;
  bool const rows = slots_contiguous(o.rows.q) && slots_contiguous(o.out) &&
                    slots_contiguous(o.layer.slots.positions);
  return rows ? status::ok : status::bad_argument;
}

/// f(job) for all rows of an op, so many at a time as there is scratch for.
/// @param mma  by matrix products, which want split queries
template <class Op, class F>
status for_window_rows(Op const& o, bool mma, workspace& ws, F const& f) noexcept {
  window_job job{o.batch, o.layer, row_source::of(o.rows)};
  index_t const n_rows = o.rows.q.extent[2];
  job.n_rows = n_rows;
  index_t const step = rows_at_once(sizes_of(job));
  if (o.rows.lse.data == nullptr || mma) take_norms(job, step, ws);
  if (mma) take_split(job, step, ws);
  if (!ws.ok()) return status::workspace_too_small;
  do {
    job.n_rows = std::min(step, n_rows - job.first_row);
    KVKEEP_TRY(f(job));
    job.first_row += job.n_rows;
  } while (job.first_row < n_rows);
  return status::ok;
}

/// Column sums. Scratch for up to 1024 queries of a head at a time: twice the bytes of 16-bit queries where
/// keys are 16-bit numbers; where rows have no log-sum-exp, 8 bytes per query and 1024 slots.
KVKEEP_CUDA_OP status enqueue(context& c, op::column_sums<device_space> const& o,
                              workspace& ws) noexcept {
  KVKEEP_TRY(check_columns(o));
  workspace::frame const frame(ws);
  context const on = launching(c, ws);
  return for_window_rows(o, fits_mma(o.layer.kv.k), ws, [&](window_job const& job) {
    bool const clear = o.clear && job.first_row == 0;
    return launch_sums(on, job, {o.out, o.out_by_id, o.per_query_head, clear},
                       o.rows.lse.data == nullptr);
  });
}

/// Column moments, in fp32 all through: a variance sees what normalisers by other products would be off by. Scratch
/// where rows have no log-sum-exp: as for column sums, without the queries.
KVKEEP_CUDA_OP status enqueue(context& c, op::column_moments<device_space> const& o,
                              workspace& ws) noexcept {
  KVKEEP_TRY(check_columns(o));
  workspace::frame const frame(ws);
  context const on = launching(c, ws);
  return for_window_rows(o, false, ws, [&](window_job const& job) {
    if (o.rows.lse.data == nullptr) {
      KVKEEP_TRY(launch_plain_slices(on, job));
      KVKEEP_TRY(launch_join(on, job, job.layer.kv.sink_logits));
    }
    return launch(on, strip_grid(sizes_of(job), plain_slots, plain_threads), plain_tile::bytes(),
                  plain_moments_kernel{{}, job, o.out, o.least_weight, job.first_row == 0});
  });
}

}  // namespace kvkeep::cuda
