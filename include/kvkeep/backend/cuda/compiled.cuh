// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CUDA: the ops that the library kvkeep::cuda_ops contains.
#pragma once

#include "../../op/accumulate.hpp"
#include "../../op/attend.hpp"
#include "../../op/compact.hpp"
#include "../../op/key_geometry.hpp"
#include "../../op/layer_counts.hpp"
#include "../../op/lazy_rows.hpp"
#include "../../op/query_moments.hpp"
#include "../../op/reduce.hpp"
#include "../../op/select_k.hpp"
#include "../../op/window_score.hpp"
#include "context.cuh"

namespace kvkeep::cuda {

KVKEEP_CUDA_OP status enqueue(context&, op::accumulate<device_space> const&, workspace&) noexcept;
KVKEEP_CUDA_OP status enqueue(context&, op::attend<device_space> const&, workspace&) noexcept;
KVKEEP_CUDA_OP status enqueue(context&, op::column_moments<device_space> const&,
                              workspace&) noexcept;
KVKEEP_CUDA_OP status enqueue(context&, op::column_sums<device_space> const&, workspace&) noexcept;
KVKEEP_CUDA_OP status enqueue(context&, op::compact<device_space> const&, workspace&) noexcept;
KVKEEP_CUDA_OP status enqueue(context&, op::evict_one<device_space> const&, workspace&) noexcept;
KVKEEP_CUDA_OP status enqueue(context&, op::fused_rows<device_space> const&, workspace&) noexcept;
KVKEEP_CUDA_OP status enqueue(context&, op::key_diff<device_space> const&, workspace&) noexcept;
KVKEEP_CUDA_OP status enqueue(context&, op::lag_score<device_space> const&, workspace&) noexcept;
KVKEEP_CUDA_OP status enqueue(context&, op::layer_counts<device_space> const&, workspace&) noexcept;
KVKEEP_CUDA_OP status enqueue(context&, op::lazy_enter<device_space> const&, workspace&) noexcept;
KVKEEP_CUDA_OP status enqueue(context&, op::lazy_victim<device_space> const&, workspace&) noexcept;
KVKEEP_CUDA_OP status enqueue(context&, op::mean_heads<device_space> const&, workspace&) noexcept;
KVKEEP_CUDA_OP status enqueue(context&, op::mean_layers<device_space> const&, workspace&) noexcept;
KVKEEP_CUDA_OP status enqueue(context&, op::pool_rows<device_space> const&, workspace&) noexcept;
KVKEEP_CUDA_OP status enqueue(context&, op::quadratic_logits<device_space> const&,
                              workspace&) noexcept;
KVKEEP_CUDA_OP status enqueue(context&, op::query_moments<device_space> const&,
                              workspace&) noexcept;
KVKEEP_CUDA_OP status enqueue(context&, op::reduce_rows<device_space> const&, workspace&) noexcept;
KVKEEP_CUDA_OP status enqueue(context&, op::ring_score<device_space> const&, workspace&) noexcept;
KVKEEP_CUDA_OP status enqueue(context&, op::row_weights<device_space> const&, workspace&) noexcept;
KVKEEP_CUDA_OP status enqueue(context&, op::select_blocks<device_space> const&,
                              workspace&) noexcept;
KVKEEP_CUDA_OP status enqueue(context&, op::select_k<device_space> const&, workspace&) noexcept;

}  // namespace kvkeep::cuda
