// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CPU: the ops that the library kvkeep::cpu contains.
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
#include "context.hpp"

namespace kvkeep::cpu {
inline namespace KVKEEP_CPU_ISA {

KVKEEP_CPU_OP status enqueue(context&, op::accumulate<host_space> const&, workspace&) noexcept;
KVKEEP_CPU_OP status enqueue(context&, op::attend<host_space> const&, workspace&) noexcept;
KVKEEP_CPU_OP status enqueue(context&, op::column_moments<host_space> const&, workspace&) noexcept;
KVKEEP_CPU_OP status enqueue(context&, op::column_sums<host_space> const&, workspace&) noexcept;
KVKEEP_CPU_OP status enqueue(context&, op::compact<host_space> const&, workspace&) noexcept;
KVKEEP_CPU_OP status enqueue(context&, op::evict_one<host_space> const&, workspace&) noexcept;
KVKEEP_CPU_OP status enqueue(context&, op::fused_rows<host_space> const&, workspace&) noexcept;
KVKEEP_CPU_OP status enqueue(context&, op::key_diff<host_space> const&, workspace&) noexcept;
KVKEEP_CPU_OP status enqueue(context&, op::lag_score<host_space> const&, workspace&) noexcept;
KVKEEP_CPU_OP status enqueue(context&, op::layer_counts<host_space> const&, workspace&) noexcept;
KVKEEP_CPU_OP status enqueue(context&, op::lazy_enter<host_space> const&, workspace&) noexcept;
KVKEEP_CPU_OP status enqueue(context&, op::lazy_victim<host_space> const&, workspace&) noexcept;
KVKEEP_CPU_OP status enqueue(context&, op::mean_heads<host_space> const&, workspace&) noexcept;
KVKEEP_CPU_OP status enqueue(context&, op::mean_layers<host_space> const&, workspace&) noexcept;
KVKEEP_CPU_OP status enqueue(context&, op::pool_rows<host_space> const&, workspace&) noexcept;
KVKEEP_CPU_OP status enqueue(context&, op::quadratic_logits<host_space> const&,
                             workspace&) noexcept;
KVKEEP_CPU_OP status enqueue(context&, op::query_moments<host_space> const&, workspace&) noexcept;
KVKEEP_CPU_OP status enqueue(context&, op::reduce_rows<host_space> const&, workspace&) noexcept;
KVKEEP_CPU_OP status enqueue(context&, op::ring_score<host_space> const&, workspace&) noexcept;
KVKEEP_CPU_OP status enqueue(context&, op::row_weights<host_space> const&, workspace&) noexcept;
KVKEEP_CPU_OP status enqueue(context&, op::select_blocks<host_space> const&, workspace&) noexcept;
KVKEEP_CPU_OP status enqueue(context&, op::select_k<host_space> const&, workspace&) noexcept;

}  // namespace KVKEEP_CPU_ISA
}  // namespace kvkeep::cpu
