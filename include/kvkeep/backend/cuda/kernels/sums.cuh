// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Sums over a head's slots in an order that does not depend on the launch.
#pragma once

#include "block.cuh"

namespace kvkeep::cuda {

inline constexpr int sum_strands = 32;

/// Shared memory for `count` sums at once.
struct sum_box {
  double* strands;  ///< [count][sum_strands]
  double* sums;     ///< [count] the results

  __device__ sum_box(shared_pieces& s, int count)
      : strands(s.take<double>(count * sum_strands)), sums(s.take<double>(count)) {}
  static constexpr std::size_t bytes(int count) {
    return shared_pieces::bytes<double>(count * sum_strands) + shared_pieces::bytes<double>(count);
  }
};

/// sums[i] = the sum of f(i, j) over j < n, in double, for i < count. A sum consists of 32 strands of
/// 32 lanes whatever the number of threads, so that blocks of any size give the same bits.
template <class F>
__device__ void sum_slots(int count, index_t n, sum_box const& box, F const& f) {
  __syncthreads();  // the box may still be read for an earlier sum
  for (int task = warp_of_block(); task < count * sum_strands; task += warps_of_block()) {
    int const which = task / sum_strands, first = task % sum_strands * warp_size;
    double x = 0;
    if (first < n) {
      for (index_t j = first + lane_of_warp(); j < n; j += sum_strands * warp_size)
        x += static_cast<double>(f(which, j));
      x = warp_reduce(x, add{});
    }
    if (lane_of_warp() == 0) box.strands[task] = x;
  }
  __syncthreads();
  for (int i = thread_of_block(); i < count; i += threads_of_block()) {
    double x = 0;
    for (int s = 0; s < sum_strands; ++s) x += box.strands[i * sum_strands + s];
    box.sums[i] = x;
  }
  __syncthreads();
}

}  // namespace kvkeep::cuda
