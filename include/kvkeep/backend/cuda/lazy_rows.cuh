// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CUDA: MorphKV's lazy evaluation.
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

/// One block per head.
inline grid lazy_grid(index_t n_entries, cache_shape const& s, int most_threads) noexcept {
  return head_grid(n_entries, s.n_kv_heads, 1, std::min(threads_for(s.max_slots), most_threads));
}

/// Takes rows into the state. Scratch: 4 * group bytes per slot.
inline status enqueue(context& c, op::lazy_enter<device_space> const& o, workspace& ws) noexcept {
  kv_ref<device_space> const& kv = o.layer.kv;
  if (!readable(kv.k)) return status::unsupported;
  if (!lazy_readable(o) || !slots_contiguous(o.weights)) return status::bad_argument;
  workspace::frame const frame(ws);
  index_t const n_slots = kv.shape.max_slots;
  lazy_enter_kernel kernel{o, nullptr, n_slots};
  kernel.weights =
      ws.take<float>(product(o.batch.n, kv.shape.n_kv_heads, o.state.shape.group, n_slots));
  if (!placed(ws)) return not_placed(ws);
  return launch(c, lazy_grid(o.batch.n, kv.shape, kernel.most_threads), kernel.bytes(), kernel);
}

/// Victims. Scratch: 4 * (group + 1) bytes per slot.
inline status enqueue(context& c, op::lazy_victim<device_space> const& o, workspace& ws) noexcept {
  kv_ref<device_space> const& kv = o.layer.kv;
  if (!readable(kv.k)) return status::unsupported;
  if (!lazy_readable(o)) return status::bad_argument;
  workspace::frame const frame(ws);
  index_t const n_slots = kv.shape.max_slots;
  std::size_t const all = product(o.batch.n, kv.shape.n_kv_heads, n_slots);
  lazy_victim_kernel kernel{o, nullptr, nullptr, n_slots};
  kernel.weights = ws.take<float>(product(all, o.state.shape.group));
  kernel.scores = ws.take<float>(all);
  if (!placed(ws)) return not_placed(ws);
  return launch(c, lazy_grid(o.batch.n, kv.shape, kernel.most_threads),
                victim_boxes::bytes(o.state.shape, kv.k.dim), kernel);
}

}  // namespace kvkeep::cuda
