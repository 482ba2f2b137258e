// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CUDA: MorphKV's lazy evaluation.
#pragma once

#include "lazy_stages.cuh"

namespace kvkeep::cuda {

/// Takes rows into the state. Scratch: 4 * group bytes per slot.
KVKEEP_CUDA_OP status enqueue(context& c, op::lazy_enter<device_space> const& o,
                              workspace& ws) noexcept {
  cache_shape const& s = o.layer.kv.shape;
  return run_stage(c, o, o.batch.n, s.n_kv_heads, s.max_slots, ws);
}

/// Victims. Scratch: 4 * (group + 1) bytes per slot.
KVKEEP_CUDA_OP status enqueue(context& c, op::lazy_victim<device_space> const& o,
                              workspace& ws) noexcept {
  cache_shape const& s = o.layer.kv.shape;
  return run_stage(c, o, o.batch.n, s.n_kv_heads, s.max_slots, ws);
}

}  // namespace kvkeep::cuda
