// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The one slot of a head that ranks last, found by one block.
#pragma once

#include "select.cuh"

namespace kvkeep::cuda {

/// A thread's candidate for the last rank: lowest key, of equal ones the highest position.
struct last_slot {
  static constexpr unsigned long long none = ~0ull;
  unsigned long long rank = none;
  index_t slot = -1;

  __device__ void look(float score, index_t position, index_t j) {
    unsigned long long const own =
        static_cast<unsigned long long>(order_key(score)) << 32 | ~static_cast<unsigned>(position);
    if (own < rank) *this = {own, j};
  }
};

/// Of the slots that the thread takes. @param score(j) of a slot
template <class Score>
__device__ last_slot last_of_thread(index_t n, Score const& score, index_t const* positions,
                                    open_range const& open) {
  last_slot r;
  for (index_t j = thread_of_block(); j < n; j += threads_of_block())
    if (open.has(positions[j])) r.look(score(j), positions[j], j);
  return r;
}

struct evict_one_stage {
  static constexpr int most_threads = 1024;
  op::evict_one<device_space> o;

  static constexpr std::size_t shared_bytes() {
    return shared_pieces::bytes<int>(guard_box_size) +
           shared_pieces::bytes<unsigned long long>(warp_size);
  }
  __device__ void operator()(block_head const& at) const {
    shared_pieces shared;
    int* const box = shared.take<int>(guard_box_size);
    auto* const wide = shared.take<unsigned long long>(warp_size);
    index_t const id = o.batch.id_of(at.entry), n = o.slots.lengths(id, at.head);
    index_t const* const positions = o.slots.positions.at(id, at.head, 0);
    float const* const scores = o.scores.at(at.entry, at.head, 0);
    guard_search search(positions, n, counts_of(o.guard, id), box);
    // The victim is sought, and what was supposed of the guard confirmed, in one pass over the slots.
    guard_search::counts counts;
    last_slot own;
    for (index_t j = thread_of_block(); j < n; j += threads_of_block()) {
      index_t const position = positions[j];
      search.count(position, counts);
      if (search.open().has(position)) own.look(scores[j], position, j);
    }
    __syncthreads();
    search.leave(counts);
    leave_for_block(own.rank, wide, smaller{});
    __syncthreads();
    unsigned long long victim = take_of_block(wide, smaller{});
    if (!search.certain() && !search.confirm()) {
      own = last_of_thread(
          n, [&](index_t j) { return scores[j]; }, positions, search.open());
      victim = block_reduce(own.rank, wide, smaller{});
    }
    if (victim == last_slot::none ? thread_of_block() == 0 : victim == own.rank)
      o.victim(id, at.head) = own.slot;
  }
};

}  // namespace kvkeep::cuda
