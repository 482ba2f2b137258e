// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// What kvkeep::cuda_engine contains, in emulation.
#include "../../src/cuda_engine.cu"
