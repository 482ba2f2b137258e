// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The slots of each head in the order of their positions.
#pragma once

#include "slots.cuh"

namespace kvkeep::cuda {

/// The slot of each rank, the lowest position first.
struct slot_order {
  index_t const* list = nullptr;  ///< [n]; null: the slots are in order already

  __device__ index_t operator()(index_t rank) const { return list != nullptr ? list[rank] : rank; }
};

/// Orders of all heads of a batch, as the kernels below leave them.
struct slot_orders {
  int* in_order = nullptr;   ///< [head] whether the slots are in order already
  index_t* lists = nullptr;  ///< [head][n_slots]; not written where they are
  index_t n_slots = 0;       ///< most slots of a head

  __device__ index_t* list(offset_t head) const { return lists + head * n_slots; }
  /// Of the block's head (grid: heads in x).
  __device__ slot_order of_block() const {
    return {in_order[blockIdx.x] != 0 ? nullptr : list(blockIdx.x)};
  }
};

/// One block per head. Cost: 8 bytes read per slot.
struct in_order_kernel {
  static constexpr int most_threads = 1024, blocks_per_sm = 1;
  batch_ref<device_space> batch;
  slot_state<device_space> slots;
  slot_orders orders;

  __device__ void operator()() const {
    block_head const at(slots.lengths.extent[1]);
    index_t const id = batch.id_of(at.entry), n = slots.lengths(id, at.head);
    index_t const* const positions = slots.positions.at(id, at.head, 0);
    bool falls = false;
    for (index_t j = thread_of_block(); j + 1 < n; j += threads_of_block())
      falls = falls || positions[j] > positions[j + 1];
    bool const any = __syncthreads_or(falls ? 1 : 0) != 0;
    if (thread_of_block() == 0) orders.in_order[blockIdx.x] = any ? 0 : 1;
  }
};

/// A slot's rank is the number of smaller positions. One thread per slot, where they are not in order; blocks take a
/// head's slots in turns. Cost: n comparisons per slot, four to a reading of shared memory.
struct order_kernel {
  static constexpr int most_threads = 256, blocks_per_sm = 1;
  static constexpr index_t tile = 1024;  ///< positions in shared memory
  batch_ref<device_space> batch;
  slot_state<device_space> slots;
  slot_orders orders;

  __device__ void operator()() const {
    shared_pieces shared;
    unsigned* const some = shared.take<unsigned>(tile);
    block_head const at(slots.lengths.extent[1]);
    index_t const id = batch.id_of(at.entry), n = slots.lengths(id, at.head);
    if (orders.in_order[blockIdx.x] != 0) return;
    index_t const* const positions = slots.positions.at(id, at.head, 0);
    index_t const step = static_cast<index_t>(gridDim.y) * threads_of_block();
    for (index_t from = static_cast<index_t>(blockIdx.y) * threads_of_block(); from < n;
         from += step)
      rank_slot(positions, n, from + thread_of_block(), some);
  }

 private:
  /// Lists slot j, if there is one. By all threads of the block, a slot each. @param some  shared
  __device__ void rank_slot(index_t const* positions, index_t n, index_t j, unsigned* some) const {
    auto const* const fours = reinterpret_cast<uint4 const*>(some);
    unsigned const own = j < n ? static_cast<unsigned>(positions[j]) : 0u;
    index_t rank = 0;
    for (index_t first = 0; first < n; first += tile) {
      index_t const count = (min(n - first, tile) + 3) / 4;
      __syncthreads();
      for (index_t i = thread_of_block(); i < count * 4; i += threads_of_block())
        some[i] = first + i < n ? static_cast<unsigned>(positions[first + i]) : 0xffffffffu;
      __syncthreads();
      for (index_t i = 0; i < count; ++i) {
        uint4 const p = fours[i];
        rank +=
            (p.x < own ? 1 : 0) + (p.y < own ? 1 : 0) + (p.z < own ? 1 : 0) + (p.w < own ? 1 : 0);
      }
    }
    if (j < n) orders.list(blockIdx.x)[rank] = j;
  }
};

}  // namespace kvkeep::cuda
