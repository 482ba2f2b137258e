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

/// Integers of shared memory that finding a guard takes.
inline constexpr int guard_box_size = 2 * warp_size;

/// Finds the thresholds of a guard: supposes that live positions near both ends have no gaps, which counts
/// over all slots then confirm, along with whatever else the caller looks for in them.
class guard_search {
 public:
  /// How many of the slots that a thread looks at are protected for being the first, or the last.
  struct counts {
    index_t sinks = 0, recent = 0;
  };

  /// By all threads. @param positions [n], device, distinct, in any order  @param box [guard_box_size] shared
  __device__ guard_search(index_t const* positions, index_t n, guard_counts const& g, int* box)
      : positions_(positions), n_(n), g_(g), box_(box) {
    open_.from = g.frozen;
    if (n > 0 && (g.sinks >= n || g.recent >= n)) open_ = {0, no_position};
    certain_ = n == 0 || open_.to == no_position || (g.sinks <= 0 && g.recent <= 0);
    if (!certain_) suppose();
  }

  __device__ open_range const& open() const { return open_; }  ///< as supposed, later as found
  __device__ bool certain() const { return certain_; }         ///< nothing needs to be counted
  __device__ void count(index_t position, counts& own) const {
    own.sinks += position < sinks_to_ ? 1 : 0;
    own.recent += position >= open_.to ? 1 : 0;
  }
  /// Between two barriers,
  __device__ void leave(counts const& own) const {
    leave_for_block(own.sinks, box_, add{});
    leave_for_block(own.recent, box_ + warp_size, add{});
  }
  /// and after the second one. @return whether `open` was right; it is now
  __device__ bool confirm() {
    bool const sinks = take_of_block(box_, add{}) == max(g_.sinks, 0);
    bool const recent = take_of_block(box_ + warp_size, add{}) == max(g_.recent, 0);
    certain_ = true;
    if (!sinks) sinks_to_ = threshold_of_rank(positions_, n_, n_ - g_.sinks, low_, high_, box_);
    if (!recent) open_.to = threshold_of_rank(positions_, n_, g_.recent, low_, high_, box_);
    open_.from = max(g_.frozen, sinks_to_);
    return sinks && recent;
  }

 private:
  __device__ void suppose() {
    for (index_t j = thread_of_block(); j < n_; j += threads_of_block()) {
      low_ = min(low_, positions_[j]);
      high_ = max(high_, positions_[j]);
    }
    __syncthreads();  // the box may still be read
    leave_for_block(low_, box_, smaller{});
    leave_for_block(high_, box_ + warp_size, larger{});
    __syncthreads();
    low_ = take_of_block(box_, smaller{});
    high_ = take_of_block(box_ + warp_size, larger{});
    if (g_.recent > 0) open_.to = high_ - g_.recent + 1;
    sinks_to_ = g_.sinks > 0 ? low_ + g_.sinks : no_position;
    open_.from = max(g_.frozen, sinks_to_);
  }

  index_t const* positions_;
  index_t n_;
  guard_counts g_;
  int* box_;
  open_range open_;
  index_t sinks_to_ = no_position;
  index_t low_ = 0x7fffffff, high_ = -1;
  bool certain_ = false;
};

/// Thresholds of a guard; every thread gets them. Parameters as of guard_search.
/// Cost: 8 bytes read per slot, more where positions have gaps.
__device__ inline open_range find_open(index_t const* positions, index_t n, guard_counts const& g,
                                       int* box) {
  guard_search search(positions, n, g, box);
  if (search.certain()) return search.open();
  guard_search::counts own;
  for (index_t j = thread_of_block(); j < n; j += threads_of_block())
    search.count(positions[j], own);
  __syncthreads();
  search.leave(own);
  __syncthreads();
  search.confirm();
  return search.open();
}

}  // namespace kvkeep::cuda
