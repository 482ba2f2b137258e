// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CUDA: ops that work slot by slot.
#pragma once

#include "slots.cuh"

namespace kvkeep::cuda {

/// Mean over the KV heads, written back to each.
KVKEEP_CUDA_OP status enqueue(context& c, op::mean_heads<device_space> const& o,
                              workspace& ws) noexcept {
  auto const p = stage_of(c, o, ws);
  if (p.result != status::ok) return p.result;
  if (!ws.ok()) return status::workspace_too_small;
  return launch_slots(launching(c, ws), o.batch.n, 1, o.scores.extent[2], p.stage.work);
}

/// Running sum over layers, and the mean at the last one.
KVKEEP_CUDA_OP status enqueue(context& c, op::mean_layers<device_space> const& o,
                              workspace& ws) noexcept {
  if (!slots_contiguous(o.scores) || !slots_contiguous(o.sum) || o.n_layers < 1)
    return status::bad_argument;
  if (!ws.ok()) return status::workspace_too_small;
  return launch_slots(launching(c, ws), o.batch.n, o.slots.lengths.extent[1], o.scores.extent[2],
                      mean_layers_slots{o});
}

/// Folds one token's weights into the slots' sums.
KVKEEP_CUDA_OP status enqueue(context& c, op::accumulate<device_space> const& o,
                              workspace& ws) noexcept {
  if (!slots_contiguous(o.weights) || !slots_contiguous(o.fold.out)) return status::bad_argument;
  if (!ws.ok()) return status::workspace_too_small;
  return launch_slots(launching(c, ws), o.batch.n, o.slots.lengths.extent[1], o.weights.extent[3],
                      accumulate_slots{o});
}

/// Reduces rows.
KVKEEP_CUDA_OP status enqueue(context& c, op::reduce_rows<device_space> const& o,
                              workspace& ws) noexcept {
  auto const p = stage_of(c, o, ws);
  if (p.result != status::ok) return p.result;
  if (!ws.ok()) return status::workspace_too_small;
  return launch_slots(launching(c, ws), o.batch.n, o.slots.lengths.extent[1], o.in.extent[3],
                      p.stage.work);
}

}  // namespace kvkeep::cuda
