// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CUDA: decode attention as a stage of a chain.
#pragma once

#include "kernels/attend_merge.cuh"
#include "launch.cuh"

namespace kvkeep::cuda {

/// fp32 rows as queries of any type.
template <int R>
queries as_queries(tensor_ref<float const, R, device_space> const& q) noexcept {
  queries r;
  r.data = q.data;
  r.entry_stride = q.stride[0];
  r.head_stride = q.stride[1];
  if constexpr (R == 4) r.row_stride = q.stride[2];
  return r;
}

/// Splits of all heads: by the fast kernels where they can, by the plain one elsewhere.
KVKEEP_CUDA_OP status launch_splits(context const& c, attend_plan const& plan,
                                    attend_task const& t) noexcept;

/// After the splits: what their last blocks have not done of their merge, and of the weights if somebody wants them.
KVKEEP_CUDA_OP status launch_merge(context const& c, attend_plan const& plan,
                                   attend_task const& t) noexcept;

/// Takes the scratch of a task.
inline void take_scratch(attend_task& t, attend_plan const& plan, workspace& ws) noexcept {
  t.splits = plan.splits;
  t.tile = plan.tile;
  t.tiles = plan.tiles;
  t.all = ws.take<softmax_part>(plan.pieces());
  t.shown = ws.take<softmax_part>(plan.pieces());
  t.totals = ws.take<row_scale>(plan.rows());
  t.values = ws.take<float>(asked(t.out) ? plan.pieces() * product(t.kv.shape.dim_v) : 0);
  bool const wants_logits = asked(t.fold.out) && !asked(t.weights);
  float* const logits =
      ws.take<float>(wants_logits ? plan.rows() * product(t.kv.shape.max_slots) : 0);
  if (t.fold.out.data != nullptr && t.weights.data == nullptr) t.logits = logits;
}

/// The task of an op whose arrays are such that the kernels can read them.
inline status make_task(op::attend<device_space> const& o, attend_task& t) noexcept {
  kv_ref<device_space> const& kv = o.layer.kv;
  if (!readable(kv.k) || (o.out.data != nullptr && !readable(kv.v)) || !is_query(o.raw.type))
    return status::unsupported;
  if (!slots_contiguous(o.q) || !slots_contiguous(o.out) || !slots_contiguous(o.weights) ||
      !slots_contiguous(o.visible) || !slots_contiguous(o.fold.out))
    return status::bad_argument;
  t.batch = o.batch;
  t.kv = kv;
  t.lengths = o.layer.slots.lengths;
  t.q = o.raw.n_rows > 0 ? o.raw : as_queries(o.q);
  t.weight_row = o.weight_row;
  t.out = o.out;
  t.lse = o.lse;
  t.weights = o.weights;
  t.weight_sum = o.weight_sum;
  t.weight_max = o.weight_max;
  t.ring_stride = o.ring_stride;
  t.fold = o.fold;
  t.visible = o.visible;
  t.usual_slots = o.usual_slots;
  attend_plan const plan(kv.shape, o.batch.n, 1, o.usual_slots);
  if (plan.last_merges()) t.tickets = reinterpret_cast<unsigned*>(o.tickets);
  t.last_weighs = t.tickets != nullptr && plan.last_weighs();
  return status::ok;
}

/// In a chain: the splits by a kernel of their own, the rest by their last blocks, or by the block of a head, if that
/// is not too much.
inline planned<attend_stage> stage_of(context const& c, op::attend<device_space> const& o,
                                      workspace& ws) noexcept {
  planned<attend_stage> p;
  p.result = make_task(o, p.stage.t);
  if (p.result != status::ok) return p;
  bool const asks = asked(o.out) || asked(o.lse) || asked(o.weights) || asked(o.weight_sum) ||
                    asked(o.weight_max) || asked(o.fold.out);
  if (!asks) {
    p.stage.merge = merge_by::nobody;
    return p;
  }
  attend_plan const plan(o.layer.kv.shape, o.batch.n, 1, o.usual_slots);
  take_scratch(p.stage.t, plan, ws);
  bool const by_last = p.stage.t.tickets != nullptr;
  bool const by_block = plan.one_block_merges(c.n_sm);
  p.stage.merge = by_last ? merge_by::last : by_block ? merge_by::block : merge_by::kernels;
  return p;
}
inline status begin(context const& c, attend_stage& s) noexcept {
  attend_plan const plan(s.t.kv.shape, s.t.batch.n, 1, s.t.usual_slots);
  if (s.merge == merge_by::nobody) return status::ok;
  KVKEEP_TRY(launch_splits(c, plan, s.t));
  return s.merge == merge_by::kernels ? launch_merge(c, plan, s.t) : status::ok;
}

}  // namespace kvkeep::cuda
