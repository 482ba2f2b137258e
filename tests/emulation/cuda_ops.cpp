// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// What kvkeep::cuda_ops contains, in emulation.
#include "../../src/cuda_attend.cu"
#include "../../src/cuda_attend_bf16.cu"
#include "../../src/cuda_attend_e4m3.cu"
#include "../../src/cuda_attend_f16.cu"
#include "../../src/cuda_attend_f32.cu"
#include "../../src/cuda_slots.cu"
#include "../../src/cuda_window.cu"
