// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CUDA: the definitions of all ops that are no templates.
#pragma once

#include "attend.cuh"
#include "compact.cuh"
#include "fused_rows.cuh"
#include "key_geometry.cuh"
#include "layer_counts.cuh"
#include "lazy_rows.cuh"
#include "pool.cuh"
#include "query_moments.cuh"
#include "ring_score.cuh"
#include "select_k.cuh"
#include "slot_ops.cuh"
#include "window_score.cuh"
