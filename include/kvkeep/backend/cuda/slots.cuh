// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CUDA: ops that work slot by slot, as templates and as stages.
#pragma once

#include "kernels/slots.cuh"
#include "launch.cuh"

namespace kvkeep::cuda {

inline constexpr int slot_threads = 256;

/// A thread per slot of every head.
inline grid slot_grid(index_t n_entries, index_t n_heads, index_t slots) noexcept {
  return head_grid(n_entries, n_heads, ceil_div(slots, slot_threads), slot_threads);
}

/// Every slot of every head.
template <class Work>
status launch_slots(context const& c, index_t n_entries, index_t n_heads, index_t slots,
                    Work const& work) noexcept {
  grid g = slot_grid(n_entries, n_heads, slots);
  g.y = parts_in_turn(g.x, g.y, c.n_sm);
  return launch(c, g, 0, each_slot_kernel<Work>{{}, work, n_heads});
}

inline planned<each_slot_stage<mean_heads_slots>> stage_of(context const&,
                                                           op::mean_heads<device_space> const& o,
                                                           workspace&) noexcept {
  if (!slots_contiguous(o.scores)) return {status::bad_argument, {}};
  return {status::ok, {{o}}};
}
inline planned<each_slot_stage<reduce_rows_slots>> stage_of(context const&,
                                                            op::reduce_rows<device_space> const& o,
                                                            workspace& ws) noexcept {
  if (!slots_contiguous(o.in) || !slots_contiguous(o.out) ||
      (o.by_age && o.seen == nullptr && !ws.measuring()) || !slots_contiguous(o.slots.positions))
    return {status::bad_argument, {}};
  return {status::ok, {{o}}};
}
/// Whether a functor reads the plane's rows where they lie.
inline bool as_floats(plane_ref<device_space> const& p) noexcept {
  return p.type == dtype::f32 && p.contiguous();
}

template <class Fn>
planned<each_slot_stage<functor_slots<Fn>>> stage_of(context const&,
                                                     op::score_slots<Fn, device_space> const& o,
                                                     workspace& ws) noexcept {
  kv_ref<device_space> const& kv = o.layer.kv;
  if ((Fn::reads_k && !readable(kv.k)) || (Fn::reads_v && !readable(kv.v)))
    return {status::unsupported, {}};
  if (!slots_contiguous(o.out) || !slots_contiguous(o.layer.slots.positions) || o.first_slot < 0)
    return {status::bad_argument, {}};
  functor_slots<Fn> work{o, nullptr, Fn::reads_k && !as_floats(kv.k),
                         Fn::reads_v && !as_floats(kv.v)};
  if (work.copy_k || work.copy_v)
    work.copies =
        ws.take<float>(product(o.batch.n, kv.shape.n_kv_heads, kv.shape.max_slots, work.floats()));
  return {status::ok, {work}};
}
/// Scores every slot by a functor. Scratch: rows as floats, where they are not.
template <class Fn>
status enqueue(context& c, op::score_slots<Fn, device_space> const& o, workspace& ws) noexcept {
  workspace::frame const frame(ws);
  auto const p = stage_of(c, o, ws);
  if (p.result != status::ok) return p.result;
  if (!ws.ok()) return status::workspace_too_small;
  cache_shape const& s = o.layer.kv.shape;
  return launch_slots(launching(c, ws), o.batch.n, s.n_kv_heads, s.max_slots, p.stage.work);
}

/// In a chain: the indices of a place by its block.
template <class Fn>
planned<for_each_stage<Fn>> stage_of(context const&, op::for_each<Fn, device_space> const& o,
                                     workspace&) noexcept {
  return {status::ok, {o}};
}
/// fn(0), fn(1), ... in any order, at once: a functor writes what no other index touches.
template <class Fn>
status enqueue(context& c, op::for_each<Fn, device_space> const& o, workspace& ws) noexcept {
  if (!ws.ok()) return status::workspace_too_small;
  return launch(launching(c, ws), flat_grid(o.n, slot_threads), 0, for_each_kernel<Fn>{o});
}

}  // namespace kvkeep::cuda
