// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The guard of one head as two thresholds on positions, found by a block.
#pragma once

#include "block.cuh"

namespace kvkeep::cuda {

inline constexpr index_t no_position = -0x7fffffff - 1;  ///< below every position

/// A slot is open to eviction if its position lies in [from, to).
struct open_range {
  index_t from = 0;
  index_t to = 0x7fffffff;

  __device__ bool has(index_t position) const { return position >= from && position < to; }
};

/// What a guard protects, in numbers.
struct guard_counts {
  index_t sinks = 0;
  index_t recent = 0;
  index_t frozen = 0;  ///< positions below it stay
};

/// f(j) summed over the slots of a head. @param box [warps] shared
template <class F>
__device__ index_t count_slots(index_t n, int* box, F f) {
  index_t count = 0;
  for (index_t j = thread_of_block(); j < n; j += threads_of_block()) count += f(j) ? 1 : 0;
  return block_reduce(count, box, add{});
}

/// The largest threshold with at least `rank` positions not below it; 1 <= rank <= n. Only where live
/// positions near an end have gaps: halves the interval some 30 times.
__device__ inline index_t threshold_of_rank(index_t const* positions, index_t n, index_t rank,
                                            index_t low, index_t high, int* box) {
  while (low < high) {
    index_t const middle = low + (high - low + 1) / 2;
    bool const enough =
        count_slots(n, box, [&](index_t j) { return positions[j] >= middle; }) >= rank;
    low = enough ? middle : low;
    high = enough ? high : middle - 1;
  }
  return low;
}

/// Thresholds of a guard; every thread gets them. Positions are distinct, in any order.
/// @param positions [n], device  @param box [warps] shared
/// Cost: 12 bytes read per slot, more where positions have gaps.
__device__ inline open_range find_open(index_t const* positions, index_t n, guard_counts const& g,
                                       int* box) {
  open_range r;
  r.from = g.frozen;
  if (n == 0) return r;
  if (g.sinks >= n || g.recent >= n) return {0, no_position};
  if (g.sinks <= 0 && g.recent <= 0) return r;
  index_t low = 0x7fffffff, high = -1;
  for (index_t j = thread_of_block(); j < n; j += threads_of_block()) {
    low = min(low, positions[j]);
    high = max(high, positions[j]);
  }
  low = block_reduce(low, box, smaller{});
  high = block_reduce(high, box, larger{});
  if (g.recent > 0) {
    r.to = high - g.recent + 1;
    if (count_slots(n, box, [&](index_t j) { return positions[j] >= r.to; }) != g.recent)
      r.to = threshold_of_rank(positions, n, g.recent, low, high, box);
  }
  if (g.sinks > 0) {
    index_t from = low + g.sinks;
    if (count_slots(n, box, [&](index_t j) { return positions[j] < from; }) != g.sinks)
      from = threshold_of_rank(positions, n, n - g.sinks, low, high, box);
    r.from = max(r.from, from);
  }
  return r;
}

}  // namespace kvkeep::cuda
