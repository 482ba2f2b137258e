// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CUDA: the fast kernels of decode attention, by element type and size of a head.
#pragma once

#include "kernels/attend_rows.cuh"
#include "launch.cuh"

namespace kvkeep::cuda {

/// Precondition: heads of 64, 128 or 256 features of type T.
template <class T, int D>
status launch_rows(context const& c, attend_plan const& plan, attend_task const& t) noexcept {
  auto const start = [&](auto const& kernel) {
    return launch(c, plan.split_grid(), kernel.shared_bytes(), kernel);
  };
  switch (plan.tile) {
    case 1:
      return start(attend_rows_kernel<T, D, 1>{t});
    case 4:
      return start(attend_rows_kernel<T, D, 4>{t});
    default:
      return start(attend_rows_kernel<T, D, most_tile_heads>{t});
  }
}
template <class T>
status launch_rows(context const& c, attend_plan const& plan, attend_task const& t) noexcept {
  return t.kv.k.dim == 64    ? launch_rows<T, 64>(c, plan, t)
         : t.kv.k.dim == 128 ? launch_rows<T, 128>(c, plan, t)
                             : launch_rows<T, 256>(c, plan, t);
}

}  // namespace kvkeep::cuda
