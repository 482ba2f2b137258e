// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Kernels of which a block works on one head (or on all heads of an entry), stage after stage.
/// A stage is what a block does of one op, a copyable struct:
///   static constexpr int most_threads;                    of a block, any number of warps up to that
///   static constexpr int threads_per_sm;                  that registers suffice for; 1024 where there is none
///   std::size_t shared_bytes() const;                     dynamic shared memory
///   __device__ void operator()(block_head const&) const;  by all threads
/// One of them may have `bool has_beside() const` and `__device__ void beside(block_head const&) const`: what a
/// second block of the head does of it, while the first one goes on with the others. It depends on nothing that
/// stages in front of it do.
/// A stage's results are the same bits whatever the number of threads, and whatever runs before and after it.
#pragma once

#include "../../../op/head_chain.hpp"
#include "../plan.hpp"
#include "block.cuh"

namespace kvkeep::cuda {

template <class Stage>
concept works_beside = requires(Stage const& s) {
  s.has_beside();
};

template <class Stage>
concept without_shared_memory = (Stage::shared_bytes() == 0);

template <class First, class... Rest>
__device__ void run_stages(sequence<First, Rest...> const& stages, block_head const& at) {
  stages.first(at);
  if constexpr (sizeof...(Rest) > 0) {
    // For what the next one reads, and for the shared memory, which it takes over.
    constexpr bool apart =
        works_beside<decltype(stages.rest.first)> && without_shared_memory<First>;
    if constexpr (!apart) __syncthreads();
    run_stages(stages.rest, at);
  }
}

/// Whether a second block has work beside.
template <class First, class... Rest>
bool has_beside(sequence<First, Rest...> const& stages) {
  if constexpr (works_beside<First>)
    return stages.first.has_beside();
  else if constexpr (sizeof...(Rest) > 0)
    return has_beside(stages.rest);
  else
    return false;
}
/// Its work.
template <class First, class... Rest>
__device__ void run_beside(sequence<First, Rest...> const& stages, block_head const& at) {
  if constexpr (works_beside<First>)
    stages.first.beside(at);
  else if constexpr (sizeof...(Rest) > 0)
    run_beside(stages.rest, at);
}

template <class Stage>
constexpr int threads_per_sm_of() {
  if constexpr (requires { Stage::threads_per_sm; })
    return Stage::threads_per_sm;
  else
    return 1024;
}

/// One block per entry and head: `blockIdx.x = entry * n_heads + head`; those of `blockIdx.y` 1 work beside.
template <class... Stages>
struct head_kernel {
  static constexpr int most_threads = min_of(Stages::most_threads...);
  static constexpr int threads_per_sm = min_of(threads_per_sm_of<Stages>()...);
  static constexpr int blocks_per_sm = threads_per_sm / most_threads;
  sequence<Stages...> stages;
  index_t n_heads;

  /// Blocks of a head.
  int blocks() const { return has_beside(stages) ? 2 : 1; }
  __device__ void operator()() const {
    block_head const at(n_heads);
    if (blockIdx.y == 0)
      run_stages(stages, at);
    else
      run_beside(stages, at);
  }
};

/// The same, and then the entry's stages by that block of its heads which comes last.
template <class Heads, class Entries>
struct joined_kernel;
template <class... OfHead, class... OfEntry>
struct joined_kernel<sequence<OfHead...>, sequence<OfEntry...>> {
  using heads_kernel = head_kernel<OfHead...>;
  static constexpr int most_threads = min_of(heads_kernel::most_threads, OfEntry::most_threads...);
  static constexpr int threads_per_sm =
      min_of(heads_kernel::threads_per_sm, threads_per_sm_of<OfEntry>()...);
  static constexpr int blocks_per_sm = threads_per_sm / most_threads;
  heads_kernel heads;
  sequence<OfEntry...> entries;
  unsigned* tickets;  ///< [entry]

  int blocks() const { return heads.blocks(); }
  __device__ void operator()() const {
    heads();
    if (blockIdx.y != 0) return;
    block_head const at(heads.n_heads);
    if (last_to_come(tickets + at.entry, heads.n_heads))
      run_stages(entries, at.whole_entry(heads.n_heads));
  }
};

/// A block takes 256 slots of a head (grid: heads, strides of slots).
struct slot_kernel {
  static constexpr int most_threads = 256, blocks_per_sm = 1;
  __device__ static index_t slot() {
    return static_cast<index_t>(blockIdx.y) * threads_of_block() + thread_of_block();
  }
};

/// What an op does with each slot by itself: `count(at)` slots, `(at, j)` for one.
/// As a kernel of its own, spread over all multiprocessors: the blocks of a head take its slots in turns,
template <class Work>
struct each_slot_kernel : slot_kernel {
  Work work;
  index_t n_heads;

  __device__ void operator()() const {
    block_head const at(n_heads);
    index_t const n = work.count(at);
    index_t const step = static_cast<index_t>(gridDim.y) * threads_of_block();
    for (index_t j = slot(); j < n; j += step) work(at, j);
  }
};
/// and as a stage.
template <class Work>
struct each_slot_stage {
  static constexpr int most_threads = 1024;
  Work work;

  static constexpr std::size_t shared_bytes() { return 0; }
  __device__ void operator()(block_head const& at) const {
    index_t const n = work.count(at);
    for (index_t j = thread_of_block(); j < n; j += threads_of_block()) work(at, j);
  }
};

}  // namespace kvkeep::cuda
