// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CUDA: decode attention, and attention weights of query rows.
#pragma once

#include "attend_rows.cuh"
#include "attend_stage.cuh"

namespace kvkeep::cuda {

inline constexpr int weight_threads = 256;

/// Which heads the kernels for rows can take: contiguous features, of K and V alike. There is none for e5m2.
inline alignment rows_of(attend_task const& t) noexcept {
  plane_ref<device_space> const& k = t.kv.k;
  plane_ref<device_space> const& v = t.kv.v;
  if ((k.dim != 64 && k.dim != 128 && k.dim != 256) || !k.contiguous() || k.type == dtype::e5m2)
    return alignment::none;
  if (t.out.data == nullptr) return alignment_of(k);
  if (v.type != k.type || v.dim != k.dim || !v.contiguous()) return alignment::none;
  return std::min(alignment_of(k), alignment_of(v));
}

/// Precondition: `rows_of(t)` is not none.
inline status launch_aligned(context const& c, attend_plan const& plan,
                             attend_task const& t) noexcept {
  switch (t.kv.k.type) {
    case dtype::f16:
      return launch_rows<fp16>(c, plan, t);
    case dtype::bf16:
      return launch_rows<bf16>(c, plan, t);
    case dtype::e4m3:
      return launch_rows<fp8_e4m3>(c, plan, t);
    default:
      return launch_rows<float>(c, plan, t);
  }
}

KVKEEP_CUDA_OP status launch_splits(context const& c, attend_plan const& plan,
                                    attend_task const& t) noexcept {
  alignment const rows = rows_of(t);
  if (rows != alignment::none) KVKEEP_TRY(launch_aligned(c, plan, t));
  if (rows == alignment::all) return status::ok;
  attend_plain_kernel const plain{t,
                                  rows == alignment::none ? rows_taken::all : rows_taken::others};
  return launch(c, plan.split_grid(), plain.shared_bytes(), plain);
}

KVKEEP_CUDA_OP status launch_merge(context const& c, attend_plan const& plan,
                                   attend_task const& t) noexcept {
  if (t.tickets == nullptr)
    KVKEEP_TRY(
        launch(c, plan.merge_grid(), attend_merge_kernel::shared_bytes(), attend_merge_kernel{t}));
  if (!t.weighs() || t.last_weighs) return status::ok;
  return launch(c, plan.weights_grid(t.kv.shape.max_slots, weight_threads), 0,
                attend_weights_kernel{{}, t});
}

/// All of it, by kernels of its own, if somebody asks for something.
inline status run_attention(context const& c, attend_task& t, index_t n_entries, bool asks,
                            workspace& ws) noexcept {
  attend_plan const plan(t.kv.shape, n_entries, t.n_rows, t.usual_slots);
  workspace::frame const frame(ws);
  take_scratch(t, plan, ws);
  if (!ws.ok()) return status::workspace_too_small;
  context const on = launching(c, ws);
  if (!asks) return status::ok;
  KVKEEP_TRY(launch_splits(on, plan, t));
  return launch_merge(on, plan, t);
}

/// Attention of every entry and KV head. With tickets and up to 4352 slots one launch (two where rows of some heads
/// alone are aligned; one more for weights of more than 1280 slots or of groups above 8), else one more, or two with
/// weights. Scratch: 16 bytes per query head and split of 256 slots, 4 per value feature of those, and 4 per query head
/// and slot if weights are folded and not kept.
KVKEEP_CUDA_OP status enqueue(context& c, op::attend<device_space> const& o,
                              workspace& ws) noexcept {
  attend_task t;
  KVKEEP_TRY(make_task(o, t));
  return run_attention(c, t, o.batch.n, o.asks(), ws);
}

/// Weights of query rows. Keys are read once per row, after the first from the L2.
KVKEEP_CUDA_OP status enqueue(context& c, op::row_weights<device_space> const& o,
                              workspace& ws) noexcept {
  if (!readable(o.layer.kv.k)) return status::unsupported;
  if (!slots_contiguous(o.rows.q) || !slots_contiguous(o.weights) || o.ring < 1)
    return status::bad_argument;
  attend_task t;
  t.batch = o.batch;
  t.kv = o.layer.kv;
  t.lengths = o.layer.slots.lengths;
  t.q = as_queries(o.rows.q);
  t.position = o.rows.position;
  t.rows_by_id = o.rows.by_id;
  t.n_rows = o.rows.q.extent[2];
  t.ring = o.ring;
  t.weights = o.weights;
  t.weight_sum = o.weight_sum;
  t.ring_stride = o.ring_stride;
  return run_attention(c, t, o.batch.n, true, ws);
}

}  // namespace kvkeep::cuda
