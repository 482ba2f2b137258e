// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CUDA: the victim, as a stage.
#pragma once

#include "kernels/evict.cuh"
#include "launch.cuh"

namespace kvkeep::cuda {

inline planned<evict_one_stage> stage_of(context const&, op::evict_one<device_space> const& o,
                                         workspace&) noexcept {
  if (!slots_contiguous(o.scores) || !slots_contiguous(o.slots.positions))
    return {status::bad_argument, {}};
  return {status::ok, {o}};
}

}  // namespace kvkeep::cuda
