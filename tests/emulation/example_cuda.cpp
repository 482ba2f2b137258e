// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "../../examples/05_cuda.cu"
