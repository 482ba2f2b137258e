// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The CUDA backend's ops.
#pragma once

#include "backend/cuda/attend.cuh"
#include "backend/cuda/compact.cuh"
#include "backend/cuda/fused_rows.cuh"
#include "backend/cuda/head_chain.cuh"
#include "backend/cuda/key_geometry.cuh"
#include "backend/cuda/layer_counts.cuh"
#include "backend/cuda/lazy_rows.cuh"
#include "backend/cuda/pool.cuh"
#include "backend/cuda/ring_score.cuh"
#include "backend/cuda/select_k.cuh"
#include "backend/cuda/slots.cuh"
#include "backend/cuda/window_score.cuh"
