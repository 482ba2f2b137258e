// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Attention over FP8 (e4m3) keys and values, compiled once (target kvkeep::cuda_ops).
#include <kvkeep/backend/cuda/attend_rows.cuh>

namespace kvkeep::cuda {
template status launch_rows<fp8_e4m3>(context const&, attend_plan const&,
                                      attend_task const&) noexcept;
}
