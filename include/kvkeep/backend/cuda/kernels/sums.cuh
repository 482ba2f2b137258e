// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Sums over a head's slots in an order that does not depend on the launch.
#pragma once

#include "block.cuh"

namespace kvkeep::cuda {

inline constexpr int sum_strands = 16;

/// Shared memory for `count` sums, at most eight of which are made at once.
struct sum_box {
  static constexpr int at_once = 8;
  double* strands;  ///< [at_once][sum_strands]
  double* sums;     ///< [count] the results

  __device__ sum_box(shared_pieces& s, index_t count)
      : strands(s.take<double>(at_once * sum_strands)), sums(s.take<double>(count)) {}
  static constexpr std::size_t bytes(index_t count) {
    return shared_pieces::bytes<double>(at_once * sum_strands) +
           shared_pieces::bytes<double>(count);
  }
};

/// sums[first + i] = the sum over j < n of what f(j, x) adds to x[i], for i < N; N 2, 4 or 8. A sum consists of 16
/// strands of 32 lanes whatever the number of threads, so that blocks of any size give the same bits.
template <int N, class F>
__device__ void sum_slots(index_t n, sum_box const& box, index_t first, F const& f) {
  static_assert(N == 2 || N == 4 || N == sum_box::at_once);
  constexpr int share = warp_size / sum_strands;
  __syncthreads();  // the box may still be read for earlier sums
  for (int strand = warp_of_block(); strand < sum_strands; strand += warps_of_block()) {
    double x[N] = {};
    for (index_t j = strand * warp_size + lane_of_warp(); j < n; j += sum_strands * warp_size)
      f(j, x);
    share_sums<warp_size / 2, 1, N>(x);
    if (lane_of_warp() % (warp_size / N) == 0)
      box.strands[lane_of_warp() / (warp_size / N) * sum_strands + strand] = x[0];
  }
  __syncthreads();
  for (int base = warp_of_block() * share; base < N; base += warps_of_block() * share) {
    int const which = base + lane_of_warp() / sum_strands;
    double x[1] = {box.strands[which * sum_strands + lane_of_warp() % sum_strands]};
    share_sums<sum_strands / 2, 1, 1>(x);
    if (lane_of_warp() % sum_strands == 0) box.sums[first + which] = x[0];
  }
  __syncthreads();
}

}  // namespace kvkeep::cuda
