// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// All rows of the CUDA benchmarks in emulation: takes long to compile, so it is a target of its own.
#include "cuda_rows.hpp"

#include "../../bench/cuda/attention.cu"
#include "../../bench/cuda/calibration.cu"
#include "../../bench/cuda/choice.cu"
#include "../../bench/cuda/expected.cu"
#include "../../bench/cuda/rates.cu"
#include "../../bench/cuda/scoring.cu"
#include "../../bench/cuda/steps_h2o.cu"
#include "../../bench/cuda/steps_morphkv.cu"
#include "../../bench/cuda/steps_streamingllm.cu"
#include "../../bench/cuda/steps_tova.cu"

TEST_CASE("every row of the CUDA benchmarks runs, writes its outputs and has a floor") {
  bench::check_rows(bench::all_parts(), 35);
}
