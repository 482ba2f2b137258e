// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// The other ops of the CUDA backend, compiled once (target kvkeep::cuda_ops).
#include <kvkeep/backend/cuda/compact.cuh>
#include <kvkeep/backend/cuda/key_geometry.cuh>
#include <kvkeep/backend/cuda/layer_counts.cuh>
#include <kvkeep/backend/cuda/lazy_rows.cuh>
#include <kvkeep/backend/cuda/pool.cuh>
#include <kvkeep/backend/cuda/query_moments.cuh>
#include <kvkeep/backend/cuda/select_k.cuh>
#include <kvkeep/backend/cuda/slot_ops.cuh>
