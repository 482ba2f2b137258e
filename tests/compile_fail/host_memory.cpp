// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// EXPECT: call to .run(.kvkeep::cuda::context&, const kvkeep::op::mean_heads<>&|.$)
// An op on host memory does not run on a device's context.
#include <kvkeep/cuda.cuh>

kvkeep::status run_it(kvkeep::cuda::context& c) {
  kvkeep::workspace w;
  kvkeep::op::mean_heads<> const o{};
  return kvkeep::run(c, o, w);
}
