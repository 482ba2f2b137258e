// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// LagKV: partitions of a head's tokens, each scored by the range of the next one.
#pragma once

#include "../../../op/key_geometry.hpp"
#include "features.cuh"
#include "order.cuh"
#include "select.cuh"

namespace kvkeep::cuda {

/// A block takes partitions of a head (grid: heads, strides of partitions). Cost: K and V twice, half of it
/// from the first-level cache; lag comparisons per slot.
struct lag_kernel {
  static constexpr int most_threads = 256, blocks_per_sm = 2;
  op::lag_score<device_space> o;
  slot_orders orders;
  index_t most_dim;  ///< of keys and values
  float* keys;       ///< [head][rank] scores by keys, then by both
  float* values;     ///< [head][rank] scores by values

  static std::size_t bytes(index_t most_dim) {
    return 2 * shared_pieces::bytes<float>(most_dim) + shared_pieces::bytes<float>(warp_size) +
           shared_pieces::bytes<double>(warp_size);
  }

  __device__ void operator()() const {
    shared_pieces shared;
    ranges const range{shared.take<float>(most_dim), shared.take<float>(most_dim),
                       shared.take<float>(warp_size), shared.take<double>(warp_size)};
    kv_ref<device_space> const& kv = o.layer.kv;
    block_head const at(kv.shape.n_kv_heads);
    index_t const n = o.layer.slots.lengths(o.batch.id_of(at.entry), at.head);
    index_t const parts = n > o.sinks ? (n - o.sinks) / o.lag : 0;
    index_t const scored_to = parts > 1 ? o.sinks + (parts - 1) * o.lag : o.sinks;
    slot_order const order = orders.of_block();
    float* const out = o.out.at(at.entry, at.head, 0);
    // Sinks, the last full partition and the tail.
    index_t const y = static_cast<index_t>(blockIdx.y);
    index_t const rows_of_grid = static_cast<index_t>(gridDim.y);
    for (index_t i = y * threads_of_block() + thread_of_block(); i < n;
         i += rows_of_grid * threads_of_block())
      if (i < o.sinks || i >= scored_to) out[order(i)] = 1;
    index_t const seq = o.batch.row_of(at.entry);
    head_rows const k(kv.k, seq, at.head), v(kv.v, seq, at.head);
    offset_t const own = static_cast<offset_t>(blockIdx.x) * orders.n_slots;
    for (index_t m = y; m + 1 < parts; m += rows_of_grid) {
      index_t const first = o.sinks + m * o.lag;
      deviation(kv.k, k, order, first, range, keys + own + first);
      deviation(kv.v, v, order, first, range, values + own + first);
      score_partition(order, first, keys + own + first, values + own + first, out);
    }
  }

 private:
  struct ranges {
    float* low;      ///< [most_dim]
    float* inverse;  ///< [most_dim] 1 / (high - low), 0 for a channel without range (spec 3.8)
    float* box;      ///< [warps]
    double* wide;    ///< [warps]
  };

  /// Range of each channel in the partition after the one at `first`. A thread per channel.
  __device__ void find_range(plane_ref<device_space> const& p, head_rows const& rows,
                             slot_order const& order, index_t first, ranges const& range) const {
    for (index_t d = thread_of_block(); d < p.dim; d += threads_of_block()) {
      float low = largest_float, high = -largest_float;
      for (index_t i = 0; i < o.lag; ++i) {
        float const x = feature(p, rows.bytes(order(first + o.lag + i)), d);
        low = x < low && x >= -largest_float ? x : low;  // an infinity says nothing of a range
        high = x > high && x <= largest_float ? x : high;
      }
      range.low[d] = low;
      range.inverse[d] = high > low ? __fdiv_rn(1.0f, high - low) : 0.0f;
    }
  }

  /// Softmax over one partition of the deviation of its rows. A warp per row. @param out [lag], device
  __device__ void deviation(plane_ref<device_space> const& p, head_rows const& rows,
                            slot_order const& order, index_t first, ranges const& range,
                            float* out) const {
    __syncthreads();  // ranges of the partition before may still be read
    find_range(p, rows, order, first, range);
    __syncthreads();
    float top = -largest_float;
    for (index_t i = warp_of_block(); i < o.lag; i += warps_of_block()) {
      std::byte const* const row = rows.bytes(order(first + i));
      auto const scaled = [&](index_t d, float x) {
        return __fmul_rn(x - range.low[d], range.inverse[d]);
      };
      float sum = 0, squares = 0;
      for_features(p, row, lane_of_warp(), warp_size,
                   [&](index_t d, float x) { sum = __fadd_rn(sum, scaled(d, x)); });
      float const mean = __fdiv_rn(warp_reduce(sum, add{}), static_cast<float>(p.dim));
      for_features(p, row, lane_of_warp(), warp_size, [&](index_t d, float x) {
        float const y = scaled(d, x) - mean;
        squares = __fmaf_rn(y, y, squares);
      });
      squares = warp_reduce(squares, add{});
      // One feature does not deviate.
      float const r =
          p.dim > 1 ? __fsqrt_rn(__fdiv_rn(squares, static_cast<float>(p.dim - 1))) : 0.0f;
      float const finite = sanitise(r);
      if (lane_of_warp() == 0) out[i] = finite;
      top = max(top, finite);
    }
    top = block_reduce(top, range.box, larger{});
    double sum = 0;
    for (index_t i = thread_of_block(); i < o.lag; i += threads_of_block()) {
      out[i] = weight_of(out[i] - top);
      sum += static_cast<double>(out[i]);
    }
    float const all = static_cast<float>(block_reduce(sum, range.wide, add{}));
    for (index_t i = thread_of_block(); i < o.lag; i += threads_of_block())
      out[i] = __fdiv_rn(out[i], all);
  }

  /// Means of both scores, or their ranks inside the partition. @param key, value [lag], device
  __device__ void score_partition(slot_order const& order, index_t first, float* key,
                                  float const* value, float* out) const {
    for (index_t i = thread_of_block(); i < o.lag; i += threads_of_block()) {
      key[i] = (key[i] + value[i]) / 2;
      if (o.cross_scoring) out[order(first + i)] = key[i];
    }
    if (o.cross_scoring) return;
    __syncthreads();
    for (index_t i = thread_of_block(); i < o.lag; i += threads_of_block()) {
      unsigned const own = order_key(key[i]);
      index_t rank = 0;
      for (index_t k = 0; k < o.lag; ++k) {
        unsigned const other = order_key(key[k]);
        rank += other < own || (other == own && k < i) ? 1 : 0;
      }
      out[order(first + i)] = __fdiv_rn(static_cast<float>(rank), static_cast<float>(o.lag));
    }
  }
};

}  // namespace kvkeep::cuda
