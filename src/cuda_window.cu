// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Scoring by query rows of the CUDA backend, compiled once (target kvkeep::cuda_ops).
#include <kvkeep/backend/cuda/ring_score.cuh>
