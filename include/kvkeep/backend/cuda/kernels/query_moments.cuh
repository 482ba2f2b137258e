// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Moments of query rows: rows turned back and summed up by parts, the mean, products of features by tiles.
#pragma once

#include "../../../op/query_moments.hpp"
#include "features.cuh"

namespace kvkeep::cuda {

/// Scratch of the op: what one kernel leaves for the next. Blocks are for query heads, but for the last kernel.
struct moment_parts {
  static constexpr index_t part_rows = 64;  ///< rows of one partial sum
  op::query_moments<device_space> o;
  index_t n_parts;
  float* x;        ///< [entry, q_head, row, dim] turned back, where the row counts
  float* sums;     ///< [entry, q_head, part, dim]
  float* counts;   ///< [entry, part] rows that count
  float* mean;     ///< [entry, q_head, dim] of this call's rows
  float* weights;  ///< [entry, 2] rows before this call, and in it

  __device__ index_t dim() const { return o.layout.dim; }
  __device__ index_t q_heads() const { return o.rows.q.extent[1]; }
  __device__ index_t n_rows() const { return o.rows.q.extent[2]; }
  __device__ bool counts_row(index_t entry, index_t r) const {
    index_t const p = o.rows.position(entry, r);
    return p >= 0 && p >= o.first;
  }
  /// Row r of the block's query head.
  __device__ float* row(block_head const& at, index_t r) const {
    return x + (static_cast<offset_t>(at.place) * n_rows() + r) * dim();
  }
  __device__ float* part_of(block_head const& at, index_t part) const {
    return sums + (static_cast<offset_t>(at.place) * n_parts + part) * dim();
  }
  __device__ float* mean_of(block_head const& at) const {
    return mean + static_cast<offset_t>(at.place) * dim();
  }
  __device__ float* gathered(index_t entry, index_t kv_head) const {
    return o.to.at(o.batch.id_of(entry), kv_head);
  }
};

/// Turns the rows of a part back and adds them up. Cost: the rows once (twice from the first-level cache), written
/// once.
struct moment_rows_kernel : moment_parts {
  static constexpr int most_threads = 128, blocks_per_sm = 8;

  __device__ void operator()() const {
    block_head const at(q_heads());
    index_t const part = static_cast<index_t>(blockIdx.y), first = part * part_rows;
    index_t const last = min(n_rows(), first + part_rows);
    index_t const turned = o.turns.data != nullptr ? o.pairs.dims : 0;
    for (index_t d = thread_of_block(); d < dim(); d += threads_of_block()) {
      index_t const pair = d < turned ? o.pairs.pair_of(d) : 0;
      index_t const partner = d < turned ? o.pairs.partner(d) : d;
      float const sign = d < turned && o.pairs.first(d) ? 1.0f : -1.0f;
      float sum = 0;
      for (index_t r = first; r < last; ++r) {
        if (!counts_row(at.entry, r)) continue;
        float const* const q = o.rows.q.at(at.entry, at.head, r);
        float y = q[d];
        if (d < turned) {
          float const* const t = o.turns.at(at.entry, r, 0, pair);
          y = __fmaf_rn(y, t[0], __fmul_rn(sign, __fmul_rn(q[partner], t[o.turns.stride[2]])));
        }
        row(at, r)[d] = y;
        sum = __fadd_rn(sum, y);
      }
      part_of(at, part)[d] = sum;
    }
    if (at.head > 0 || thread_of_block() > 0) return;
    float n = 0;
    for (index_t r = first; r < last; ++r) n += counts_row(at.entry, r) ? 1.0f : 0.0f;
    counts[static_cast<offset_t>(at.entry) * n_parts + part] = n;
  }
};

/// Mean of a query head's rows.
struct moment_mean_kernel : moment_parts {
  static constexpr int most_threads = 128, blocks_per_sm = 8;

  __device__ void operator()() const {
    block_head const at(q_heads());
    float n = 0;
    for (index_t p = 0; p < n_parts; ++p)
      n += counts[static_cast<offset_t>(at.entry) * n_parts + p];
    for (index_t d = thread_of_block(); d < dim(); d += threads_of_block()) {
      float sum = 0;
      for (index_t p = 0; p < n_parts; ++p) sum = __fadd_rn(sum, part_of(at, p)[d]);
      mean_of(at)[d] = n > 0 ? __fdiv_rn(sum, n) : 0.0f;
    }
    if (at.head > 0 || thread_of_block() > 0) return;
    bool const begins = o.rows.position(at.entry, 0) == 0;
    weights[2 * at.entry] = begins ? 0.0f : gathered(at.entry, 0)[0];
    weights[2 * at.entry + 1] = n;
  }
};

/// Adds the products of 64 features with 64 others, and those of the distance from the rows before (Chan et al.). Grid:
/// query heads, tiles on and below the diagonal. Cost: the rows once per tile and side.
struct moment_products_kernel : moment_parts {
  static constexpr int most_threads = 256, blocks_per_sm = 3;
  static constexpr index_t tile = 64, stage = 32, stride = tile + 4;

  static constexpr std::size_t bytes() { return 2 * shared_pieces::bytes<float>(stage * stride); }
  static constexpr offset_t tiles(offset_t dim) {
    offset_t const n = (dim + tile - 1) / tile;
    return n * (n + 1) / 2;
  }

  __device__ void operator()() const {
    shared_pieces shared;
    float* const a = shared.take<float>(stage * stride);
    float* const other = shared.take<float>(stage * stride);
    block_head const at(q_heads());
    if (!(weights[2 * at.entry + 1] > 0)) return;
    index_t line = 0, column = static_cast<index_t>(blockIdx.y);
    while (column > line) column -= ++line;
    float* const b = line == column ? a : other;
    index_t const d = thread_of_block() / 16 * 4, e = thread_of_block() % 16 * 4;
    float sum[4][4] = {};
    for (index_t r = 0; r < n_rows(); r += stage) {
      __syncthreads();
      take(at, r, line * tile, a);
      if (b != a) take(at, r, column * tile, b);
      __syncthreads();
      for (index_t i = 0; i < stage; ++i) {
        auto const u = *reinterpret_cast<four_floats const*>(a + i * stride + d);
        auto const v = *reinterpret_cast<four_floats const*>(b + i * stride + e);
        for (int j = 0; j < 4; ++j)
          for (int k = 0; k < 4; ++k) sum[j][k] = __fmaf_rn(u.x[j], v.x[k], sum[j][k]);
      }
    }
    unrolled<4>([&](int j) {
      unrolled<4>(
          [&](int k) { add_product(at, line * tile + d + j, column * tile + e + k, sum[j][k]); });
    });
  }

 private:
  /// What features [d0, d0 + 64) of rows [r0, r0 + 32) deviate from the mean by, 0 where there is none.
  __device__ void take(block_head const& at, index_t r0, index_t d0, float* out) const {
    float const* const middle = mean_of(at);
    for (index_t i = thread_of_block(); i < stage * tile; i += threads_of_block()) {
      index_t const r = r0 + i / tile, d = d0 + i % tile;
      bool const there = r < n_rows() && d < dim() && counts_row(at.entry, r);
      out[i / tile * stride + i % tile] = there ? __fadd_rn(row(at, r)[d], -middle[d]) : 0.0f;
    }
  }
  __device__ void add_product(block_head const& at, index_t d, index_t e, float sum) const {
    if (d >= dim() || e > d) return;
    index_t const group = o.layout.group, g = at.head % group;
    float* const head = gathered(at.entry, at.head / group);
    float& out = o.layout.spread(head, g, d)[e];
    float const before = weights[2 * at.entry], now = weights[2 * at.entry + 1];
    if (before > 0) {
      float const *const was = o.layout.mean(head, g), *const own = mean_of(at);
      float const share = __fmul_rn(before, __fdiv_rn(now, __fadd_rn(before, now)));
      float const apart = __fmul_rn(__fadd_rn(own[d], -was[d]), share);
      sum = __fadd_rn(__fmaf_rn(apart, __fadd_rn(own[e], -was[e]), sum), out);
    }
    out = sum;
  }
};

/// The mean with that of the rows before, and how many there are now. A block per KV head.
struct moment_join_kernel : moment_parts {
  static constexpr int most_threads = 128, blocks_per_sm = 8;

  __device__ void operator()() const {
    index_t const group = o.layout.group;
    block_head const at(q_heads() / group);
    float const before = weights[2 * at.entry], now = weights[2 * at.entry + 1];
    float const share = now > 0 ? __fdiv_rn(now, __fadd_rn(before, now)) : 0.0f;
    float* const head = gathered(at.entry, at.head);
    float const* const own = mean + static_cast<offset_t>(at.place) * group * dim();
    float* const to = o.layout.mean(head, 0);
    for (index_t i = thread_of_block(); i < group * dim(); i += threads_of_block()) {
      float const was = before > 0 ? to[i] : 0.0f;
      to[i] = __fmaf_rn(__fadd_rn(own[i], -was), share, was);
    }
    if (thread_of_block() == 0) head[0] = __fadd_rn(before, now);
  }
};

}  // namespace kvkeep::cuda
