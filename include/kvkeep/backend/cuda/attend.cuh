// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CUDA: decode attention, and attention weights of query rows.
#pragma once

#include "kernels/attend_rows.cuh"
#include "launch.cuh"

namespace kvkeep::cuda {

inline constexpr int weight_threads = 256;

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

/// Which heads the kernels for rows can take: contiguous features, of K and V alike.
inline alignment rows_of(attend_task const& t) noexcept {
  plane_ref<device_space> const& k = t.kv.k;
  plane_ref<device_space> const& v = t.kv.v;
  if ((k.dim != 64 && k.dim != 128 && k.dim != 256) || !k.contiguous()) return alignment::none;
  if (t.out.data == nullptr) return alignment_of(k);
  if (v.type != k.type || v.dim != k.dim || !v.contiguous()) return alignment::none;
  return std::min(alignment_of(k), alignment_of(v));
}

template <class T, int D>
status launch_rows(context const& c, attend_plan const& plan, attend_task const& t) noexcept {
  auto const start = [&](auto const& kernel) {
    return launch(c, plan.split_grid(), kernel.shared_bytes(), kernel);
  };
  switch (plan.tile) {
    case 1:
      return start(attend_rows_kernel<T, D, 1>{t});
    case 4:
      return start(attend_rows_kernel<T, D, 4>{t});
    default:
      return start(attend_rows_kernel<T, D, most_tile_heads>{t});
  }
}
template <class T>
status launch_rows(context const& c, attend_plan const& plan, attend_task const& t) noexcept {
  return t.kv.k.dim == 64    ? launch_rows<T, 64>(c, plan, t)
         : t.kv.k.dim == 128 ? launch_rows<T, 128>(c, plan, t)
                             : launch_rows<T, 256>(c, plan, t);
}

/// Splits of all heads: by the fast kernels where they can, by the plain one elsewhere.
inline status launch_splits(context const& c, attend_plan const& plan,
                            attend_task const& t) noexcept {
  alignment const rows = rows_of(t);
  if (rows != alignment::none)
    KVKEEP_TRY(t.kv.k.type == dtype::f32   ? launch_rows<float>(c, plan, t)
               : t.kv.k.type == dtype::f16 ? launch_rows<fp16>(c, plan, t)
                                           : launch_rows<bf16>(c, plan, t));
  if (rows == alignment::all) return status::ok;
  attend_plain_kernel const plain{t,
                                  rows == alignment::none ? rows_taken::all : rows_taken::others};
  return launch(c, plan.split_grid(), plain.shared_bytes(), plain);
}

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

/// After the splits: what their last blocks have not done of their merge, and of the weights if somebody wants them.
inline status launch_merge(context const& c, attend_plan const& plan,
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
  if (!placed(ws)) return not_placed(ws);
  if (!asks) return status::ok;
  KVKEEP_TRY(launch_splits(c, plan, t));
  return launch_merge(c, plan, t);
}

/// The task of an op whose arrays are such that the kernels can read them.
inline status make_task(op::attend<device_space> const& o, attend_task& t) noexcept {
  kv_ref<device_space> const& kv = o.layer.kv;
  if (!readable(kv.k) || (o.out.data != nullptr && !readable(kv.v)) || o.raw.type == dtype::opaque)
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

/// Attention of every entry and KV head. With tickets and up to 4352 slots one launch (two where rows of some heads alone
/// are aligned; one more for weights of more than 1280 slots or of groups above 8), else one more, or two with weights.
/// Scratch: 16 bytes per query head and split of 256 slots, 4 per value feature of those, and 4 per query head and slot
/// if weights are folded and not kept.
inline status enqueue(context& c, op::attend<device_space> const& o, workspace& ws) noexcept {
  attend_task t;
  KVKEEP_TRY(make_task(o, t));
  return run_attention(c, t, o.batch.n, o.asks(), ws);
}

/// In a chain: the splits by a kernel of their own, the rest by their last blocks, or by the block of a head, if that is
/// not too much.
inline planned<attend_stage> plan(context const& c, op::attend<device_space> const& o,
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

/// Weights of query rows. Keys are read once per row, after the first from the L2.
inline status enqueue(context& c, op::row_weights<device_space> const& o, workspace& ws) noexcept {
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
