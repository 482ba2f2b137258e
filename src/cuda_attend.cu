// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Attention of the CUDA backend, compiled once (target kvkeep::cuda_ops): all but what depends on the type of keys.
// Each type has a unit of its own, because these take longest.
#include <kvkeep/backend/cuda/attend_rows.cuh>

namespace kvkeep::cuda {
#define KVKEEP_OTHER_UNIT(T)                                                \
  extern template status launch_rows<T>(context const&, attend_plan const&, \
                                        attend_task const&) noexcept
KVKEEP_OTHER_UNIT(float);
KVKEEP_OTHER_UNIT(fp16);
KVKEEP_OTHER_UNIT(bf16);
KVKEEP_OTHER_UNIT(fp8_e4m3);
}  // namespace kvkeep::cuda

#include <kvkeep/backend/cuda/attend.cuh>
