// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Pooling over the order of positions. One thread per candidate.
#pragma once

#include "order.cuh"

namespace kvkeep::cuda {

/// What both kernels know. A block's threads take ranks, not slots.
struct pool_part : slot_kernel {
  op::pool_rows<device_space> o;
  slot_orders orders;
  float* pooled;  ///< [head][row][rank]

  /// Candidates: all but the `recent` largest positions, so the lowest ranks.
  __device__ index_t candidates(block_head const& at) const {
    return o.slots.lengths(o.batch.id_of(at.entry), at.head) - max(o.recent, 0);
  }
  __device__ float* pooled_row(index_t r) const {
    return pooled + (static_cast<offset_t>(blockIdx.x) * o.values.extent[2] + r) * orders.n_slots;
  }
};

struct pool_kernel : pool_part {
  __device__ void operator()() const {
    block_head const at(o.slots.lengths.extent[1]);
    index_t const m = candidates(at), i = slot(), side = o.kernel / 2;
    if (i >= m) return;
    slot_order const order = orders.of_block();
    // Zeros outside do not change a sum, and a maximum ignores what is outside.
    index_t const first = max(i - side, 0), last = i < m - side ? i + side : m - 1;
    bool const average = o.kind == op::pooling::average;
    for (index_t r = 0; r < o.values.extent[2]; ++r) {
      float const* const row = o.values.at(at.entry, at.head, r, 0);
      float acc = average ? 0.0f : __uint_as_float(0xff800000u);
      for (index_t k = first; k <= last; ++k) {
        float const x = row[order(k)];
        acc = average ? __fadd_rn(acc, x) : x > acc ? x : acc;
      }
      pooled_row(r)[i] = average ? __fdiv_rn(acc, static_cast<float>(o.kernel)) : acc;
    }
  }
};

/// Writes the pooled values back to their slots.
struct pool_back_kernel : pool_part {
  __device__ void operator()() const {
    block_head const at(o.slots.lengths.extent[1]);
    index_t const i = slot();
    if (i >= candidates(at)) return;
    index_t const j = orders.of_block()(i);
    for (index_t r = 0; r < o.values.extent[2]; ++r)
      o.values(at.entry, at.head, r, j) = pooled_row(r)[i];
  }
};

}  // namespace kvkeep::cuda
