// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "../../examples/replay/cuda_backend.cu"
