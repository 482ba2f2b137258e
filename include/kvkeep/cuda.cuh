// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The CUDA backend's ops.
#pragma once

#include "backend/cuda/attend_stage.cuh"
#include "backend/cuda/evict.cuh"
#include "backend/cuda/head_chain.cuh"
#include "backend/cuda/lazy_stages.cuh"
#include "backend/cuda/slots.cuh"
#if defined(KVKEEP_CUDA_COMPILED)
#include "backend/cuda/compiled.cuh"
#else
#include "backend/cuda/ops.cuh"
#endif
