// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// MorphKV's scores from cached weights: sums of rows over the old slots, then the slots' scores.
#pragma once

#include "../../../op/accumulate.hpp"
#include "window.cuh"

namespace kvkeep::cuda {

struct ring_kernel {
  static constexpr int most_threads = 128, blocks_per_sm = 1;
  op::ring_score<device_space> o;
  index_t const* limit;  ///< [head] the last old position
  float* inverse;        ///< [head][g][row] one over the row's sum; 0: absent, -1: of no use
  index_t* skipped;      ///< [head] whether the cached weights serve the head

  __device__ float const* weights(index_t id, index_t h, index_t g, index_t position) const {
    return o.weights.at(id, h, g, 0) + position % o.ring * o.ring_stride;
  }
  __device__ float* inverses() const {
    return inverse +
           static_cast<offset_t>(blockIdx.x) * o.layer.kv.shape.group() * o.positions.extent[1];
  }
};

/// A row that is dominated by slots which are protected now has hardly any mass on the old ones: dividing
/// by it would be meaningless. Grid: heads, rows of all query heads; the order of a sum is fixed by the
/// number of threads.
struct ring_sums_kernel : ring_kernel {
  __device__ void operator()() const {
    shared_pieces shared;
    auto* const box = shared.take<float>(warp_size);
    block_head const at(o.layer.kv.shape.n_kv_heads);
    index_t const id = o.batch.id_of(at.entry), n = o.layer.slots.lengths(id, at.head);
    index_t const n_rows = o.positions.extent[1], i = static_cast<index_t>(blockIdx.y);
    index_t const position = o.positions(at.entry, i % n_rows);
    index_t const* const positions = o.layer.slots.positions.at(id, at.head, 0);
    float sum = 0;
    if (position >= 0) {
      float const* const e = weights(id, at.head, i / n_rows, position);
      for (index_t j = thread_of_block(); j < n; j += threads_of_block())
        if (positions[j] <= limit[blockIdx.x]) sum = __fadd_rn(sum, e[j]);
    }
    sum = block_reduce(sum, box, add{});
    bool const usable = sum >= 1e-30f && sum <= largest_float;
    if (thread_of_block() != 0) return;
    inverses()[i] = position < 0 ? 0.0f : usable ? __fdiv_rn(1.0f, sum) : -1.0f;
    if (i == 0) skipped[blockIdx.x] = 1;  // until a slot's score says otherwise
  }
};

/// A thread per slot; the blocks of a head take them in turns. A weight below the least normal number is 0, and divided
/// by a small sum that is no longer nothing: where an old slot's score does not stand clear of it, the head is not
/// served.
struct ring_fuse_kernel : ring_kernel {
  /// Any number of threads may say so.
  __device__ void skip_none() const { atomicExch(&skipped[blockIdx.x], 0); }

  __device__ void operator()() const {
    shared_pieces shared;
    auto* const box = shared.take<float>(warp_size);
    block_head const at(o.layer.kv.shape.n_kv_heads);
    index_t const id = o.batch.id_of(at.entry), group = o.layer.kv.shape.group();
    index_t const n_rows = o.positions.extent[1];
    float const* const scale = inverses();
    bool useless = false, present = false;
    float largest = 0;
    for (index_t i = thread_of_block(); i < group * n_rows; i += threads_of_block()) {
      useless = useless || scale[i] < 0;
      largest = max(largest, scale[i]);
      present = present || o.positions(at.entry, i % n_rows) >= 0;
    }
    bool const direct = __syncthreads_or(useless ? 1 : 0) != 0;
    bool const any_row = __syncthreads_or(present ? 1 : 0) != 0;
    largest = block_reduce(largest, box, larger{});
    bool const served = any_row && !direct;
    if (!served && thread_of_block() == 0) skip_none();
    if (!served) return;
    index_t const n = o.layer.slots.lengths(id, at.head);
    index_t const step = static_cast<index_t>(gridDim.y) * threads_of_block();
    for (index_t j = static_cast<index_t>(blockIdx.y) * threads_of_block() + thread_of_block();
         j < n; j += step) {
      float score = 0;
      for (index_t r = 0; r < n_rows; ++r) {
        index_t const position = o.positions(at.entry, r);
        if (position < 0) continue;
        float top = 0;
        for (index_t g = 0; g < group; ++g)
          top = max(top, __fmul_rn(weights(id, at.head, g, position)[j], scale[g * n_rows + r]));
        score = o.fuse == reduction::max ? max(score, top) : __fadd_rn(score, top);
      }
      bool const old = o.layer.slots.positions(id, at.head, j) <= limit[blockIdx.x];
      o.out(at.entry, at.head, j) = old ? score : __uint_as_float(0x7f800000u);
      float const lost = 1e6f * static_cast<float>(n_rows) * (least_normal_float * largest);
      if (old && largest > 2 && score < lost) skip_none();
    }
  }
};

}  // namespace kvkeep::cuda
