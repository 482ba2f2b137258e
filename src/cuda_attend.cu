// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Attention of the CUDA backend, compiled once (target kvkeep::cuda_ops): all but what depends on the type of keys.
#include <kvkeep/backend/cuda/attend.cuh>
