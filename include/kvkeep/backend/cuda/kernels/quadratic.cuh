// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Quadratic forms of 64 keys at a time, in fp32 on any rows.
#pragma once

#include "../../../op/query_moments.hpp"
#include "features.cuh"

namespace kvkeep::cuda {

/// Logits of 64 slots by the forms of a group. Grid: KV heads, strips of slots. A thread has 4 rows of a form by 4
/// slots.
/// Cost: per query head the keys once per 64 features, the form's lower triangle by tiles of 64 by 32.
struct quadratic_kernel {
  static constexpr int most_threads = 256, blocks_per_sm = 3;
  static constexpr index_t tile = 64, stage = 32, stride = tile + 4, lines = 16;
  op::quadratic_logits<device_space> o;

  static constexpr std::size_t bytes() {
    return 2 * shared_pieces::bytes<float>(stage * stride) +
           shared_pieces::bytes<float>(lines * tile) + shared_pieces::bytes<std::byte const*>(tile);
  }

  __device__ void operator()() const {
    cache_shape const& shape = o.layer.kv.shape;
    block_head const at(shape.n_kv_heads);
    index_t const id = o.batch.id_of(at.entry), n = o.layer.slots.lengths(id, at.head);
    index_t const first = static_cast<index_t>(blockIdx.y) * tile;
    if (first >= n) return;
    pieces const p;
    head_rows const keys(o.layer.kv.k, o.batch.row_of(at.entry), at.head);
    for (index_t j = thread_of_block(); j < tile; j += threads_of_block())
      p.rows[j] = first + j < n ? keys.bytes(first + j) : nullptr;
    index_t const group = shape.group(), slot = thread_of_block();
    for (index_t g = 0; g < group; ++g) {
      index_t const head = at.head * group + g;
      add_form(p, at.entry, head);
      __syncthreads();
      if (slot >= min(tile, n - first)) continue;
      float sum = 0;
      for (index_t i = 0; i < lines; ++i) sum = __fadd_rn(sum, p.sums[i * tile + slot]);
      bool const old = o.layer.slots.positions(id, at.head, first + slot) < o.first;
      o.out(at.entry, head, first + slot) = old ? __uint_as_float(0xff800000u) : sanitise(sum);
    }
  }

 private:
  struct pieces {
    float *keys, *form;      ///< [stage][stride] features of keys, of rows of a form
    float* sums;             ///< [lines][tile] of the lines' rows
    std::byte const** rows;  ///< [tile] keys, null where there is none

    __device__ pieces() {
      shared_pieces s;
      keys = s.take<float>(stage * stride);
      form = s.take<float>(stage * stride);
      sums = s.take<float>(lines * tile);
      rows = s.take<std::byte const*>(tile);
    }
  };

  /// Leaves each line's part of a query head's logits in `sums`.
  __device__ void add_form(pieces const& p, index_t entry, index_t head) const {
    index_t const dim = o.layer.kv.k.dim;
    index_t const row = thread_of_block() / 16 * 4, column = thread_of_block() % 16 * 4;
    float logit[4] = {};
    for (index_t d0 = 0; d0 < dim; d0 += tile) {
      float sum[4][4] = {}, own[4][4] = {};
      for (index_t e0 = o.spreads ? 0 : d0; e0 < min(dim, d0 + tile); e0 += stage) {
        __syncthreads();
        take(p, entry, head, d0, e0);
        __syncthreads();
        index_t const mine = d0 + row - e0;  // the rows' own features come last
        if (mine >= 0 && mine < stage)
          for (int i = 0; i < 4; ++i)
            for (int j = 0; j < 4; ++j) own[i][j] = p.keys[(mine + i) * stride + column + j];
        for (index_t e = 0; o.spreads && e < stage; ++e) {
          auto const a = *reinterpret_cast<four_floats const*>(p.form + e * stride + row);
          auto const b = *reinterpret_cast<four_floats const*>(p.keys + e * stride + column);
          for (int i = 0; i < 4; ++i)
            for (int j = 0; j < 4; ++j) sum[i][j] = __fmaf_rn(a.x[i], b.x[j], sum[i][j]);
        }
      }
      for (int i = 0; i < 4; ++i) {
        float const linear = d0 + row + i < dim ? o.form(entry, head, d0 + row + i, 0) : 0.0f;
        for (int j = 0; j < 4; ++j)
          logit[j] = __fmaf_rn(own[i][j], __fadd_rn(linear, sum[i][j]), logit[j]);
      }
    }
    for (int j = 0; j < 4; ++j) p.sums[row / 4 * tile + column + j] = logit[j];
  }
  /// Features [e0, e0 + 32) of the keys, and of rows [d0, d0 + 64) of a form; zeros where there is none.
  __device__ void take(pieces const& p, index_t entry, index_t head, index_t d0, index_t e0) const {
    plane_ref<device_space> const& plane = o.layer.kv.k;
    each_staged<stage>(tile, [&](index_t e, index_t j) {
      bool const there = e0 + e < plane.dim && p.rows[j] != nullptr;
      p.keys[e * stride + j] = there ? feature(plane, p.rows[j], e0 + e) : 0.0f;
    });
    if (!o.spreads) return;
    each_staged<stage>(tile, [&](index_t e, index_t i) {
      bool const there = e0 + e <= d0 + i && d0 + i < plane.dim;
      p.form[e * stride + i] = there ? o.form(entry, head, d0 + i, 1 + e0 + e) : 0.0f;
    });
  }
};

}  // namespace kvkeep::cuda
