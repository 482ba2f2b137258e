// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Attention over fp16 keys and values, compiled once (target kvkeep::cuda_ops).
#include <kvkeep/backend/cuda/attend_rows.cuh>

namespace kvkeep::cuda {
template status launch_rows<fp16>(context const&, attend_plan const&, attend_task const&) noexcept;
}
