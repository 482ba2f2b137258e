// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CUDA: survivors move, in place or into another cache.
#pragma once

#include "kernels/compact.cuh"
#include "launch.cuh"

namespace kvkeep::cuda {

/// Applies a keep plan. Counts, rows and ids lie on the device: a head whose plan does not fit into the
/// destination stays as it is, where the host's backend refuses the call. Precondition: other than by
/// `pack`, source and destination are the same rows and ids.
KVKEEP_CUDA_OP status enqueue(context& c, op::compact<device_space> const& o,
                              workspace& ws) noexcept {
  kv_ref<device_space> const& a = o.from.kv;
  kv_ref<device_space> const& b = o.to.kv;
  bool const same = a.k.data == b.k.data && a.v.data == b.v.data;
  if (!op::same_rows(a.k, b.k) || !op::same_rows(a.v, b.v) || o.batch.n != o.to_batch.n ||
      a.shape.n_kv_heads != b.shape.n_kv_heads || !slots_contiguous(o.plan.slots) ||
      !slots_contiguous(o.from.slots.positions) || !slots_contiguous(o.to.slots.positions) ||
      !slots_contiguous(o.from.slots.rows) || !slots_contiguous(o.to.slots.rows) ||
      (o.how != op::move_kind::pack && !same))
    return status::bad_argument;
  if (!movable(a.k) || !movable(a.v) || !movable(b.k) || !movable(b.v)) return status::unsupported;
  if (!ws.ok()) return status::workspace_too_small;
  bool const rows = o.from.slots.rows.data != nullptr && o.to.slots.rows.data != nullptr;
  compact_kernel const kernel{
      o, rows ? std::min(o.from.slots.rows.extent[2], o.to.slots.rows.extent[2]) : 0};
  return launch(launching(c, ws), head_grid(o.batch.n, a.shape.n_kv_heads, kernel.parts(), 256), 0,
                kernel);
}

}  // namespace kvkeep::cuda
