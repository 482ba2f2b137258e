// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CUDA: MorphKV's lazy evaluation, as stages.
#pragma once

#include "kernels/lazy_enter.cuh"
#include "kernels/lazy_victim.cuh"
#include "launch.cuh"

namespace kvkeep::cuda {

/// Whether the arrays of a lazy op are such that the kernels can read them.
template <class Op>
bool lazy_readable(Op const& o) noexcept {
  lazy_shape const& s = o.state.shape;
  return slots_contiguous(o.state.ring_q) && slots_contiguous(o.state.rows) &&
         slots_contiguous(o.state.head) && slots_contiguous(o.layer.slots.positions) &&
         o.fuse != reduction::mean && s.n_rows >= 1 && s.n_rows <= s.window &&
         s.n_rows <= lazy_shape::most_rows && s.window >= lazy_shape::ahead &&
         s.group == o.layer.kv.shape.group();
}

inline planned<lazy_enter_stage> stage_of(context const&, op::lazy_enter<device_space> const& o,
                                          workspace& ws) noexcept {
  cache_shape const& s = o.layer.kv.shape;
  if (!readable(o.layer.kv.k)) return {status::unsupported, {}};
  if (!lazy_readable(o) || !slots_contiguous(o.weights)) return {status::bad_argument, {}};
  std::size_t const all = product(o.batch.n, s.n_kv_heads, s.max_slots);
  return {status::ok, {o, ws.take<float>(product(all, o.state.shape.group)), s.max_slots}};
}

inline planned<lazy_victim_stage> stage_of(context const&, op::lazy_victim<device_space> const& o,
                                           workspace& ws) noexcept {
  cache_shape const& s = o.layer.kv.shape;
  if (!readable(o.layer.kv.k)) return {status::unsupported, {}};
  if (!lazy_readable(o)) return {status::bad_argument, {}};
  std::size_t const all = product(o.batch.n, s.n_kv_heads, s.max_slots);
  float* const weights = ws.take<float>(product(all, o.state.shape.group));
  return {status::ok, {o, weights, ws.take<float>(all), s.max_slots}};
}

}  // namespace kvkeep::cuda
