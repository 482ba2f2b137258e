// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The CPU backend, compiled by the host's compiler, for the checks before anything is timed.
#pragma once

#include <kvkeep/op/attend.hpp>
#include <kvkeep/op/compact.hpp>
#include <kvkeep/op/query_moments.hpp>
#include <kvkeep/op/select_k.hpp>
#include <kvkeep/op/window_score.hpp>

namespace bench {

void run_on_cpu(kvkeep::op::column_moments<> const& o);
void run_on_cpu(kvkeep::op::column_sums<> const& o);
void run_on_cpu(kvkeep::op::fused_rows<> const& o);
void run_on_cpu(kvkeep::op::select_k<> const& o);
void run_on_cpu(kvkeep::op::compact<> const& o);
void run_on_cpu(kvkeep::op::attend<> const& o);
void run_on_cpu(kvkeep::op::query_moments<> const& o);
void run_on_cpu(kvkeep::op::quadratic_logits<> const& o);

}  // namespace bench
