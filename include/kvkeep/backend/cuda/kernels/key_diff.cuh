// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// KeyDiff: the mean unit key of each head, by chunks of ranks, and every key's cosine with it.
#pragma once

#include "../../../op/key_geometry.hpp"
#include "features.cuh"
#include "order.cuh"

namespace kvkeep::cuda {

/// Scratch of the op: what one kernel leaves for the next.
struct key_diff_part {
  static constexpr index_t chunk = 64;   ///< keys of one partial sum, neighbours in position order
  static constexpr index_t strands = 8;  ///< of partial sums, when they are added up
  op::key_diff<device_space> o;
  slot_orders orders;
  index_t n_chunks;  ///< most chunks of a head
  double* partial;   ///< [head][chunk][dim_k]
  float* mean;       ///< [head][dim_k + 1], the mean's length last

  __device__ index_t dim() const { return o.layer.kv.k.dim; }
  __device__ double* partial_of(index_t c) const {
    return partial + (static_cast<offset_t>(blockIdx.x) * n_chunks + c) * dim();
  }
  __device__ float* mean_of_block() const {
    return mean + static_cast<offset_t>(blockIdx.x) * (dim() + 1);
  }
};

/// Whether a norm is neither infinite nor NaN. By integers: safe under fast-math.
__device__ inline bool finite_norm(float norm) { return __float_as_uint(norm) < 0x7f800000u; }

/// Sums of the unit keys of chunks, which the blocks of a head take in turns. A warp measures a key, then a thread adds
/// up a feature. Cost: K once from memory, once more from the first-level cache.
struct key_sum_kernel : key_diff_part {
  static constexpr int most_threads = 128, blocks_per_sm = 4;

  __device__ void operator()() const {
    shared_pieces shared;
    float* const inverse = shared.take<float>(chunk);
    std::byte const** const rows = shared.take<std::byte const*>(chunk);
    kv_ref<device_space> const& kv = o.layer.kv;
    block_head const at(kv.shape.n_kv_heads);
    index_t const n = o.layer.slots.lengths(o.batch.id_of(at.entry), at.head);
    head_rows const keys(kv.k, o.batch.row_of(at.entry), at.head);
    index_t const step = static_cast<index_t>(gridDim.y);
    for (index_t c = static_cast<index_t>(blockIdx.y); c * chunk < n; c += step) {
      add_chunk(keys, c, min(n - c * chunk, chunk), inverse, rows);
      __syncthreads();  // all have read what the next chunk writes
    }
  }

 private:
  /// @param inverse, rows  [chunk] shared
  __device__ void add_chunk(head_rows const& keys, index_t c, index_t count, float* inverse,
                            std::byte const** rows) const {
    kv_ref<device_space> const& kv = o.layer.kv;
    index_t const first = c * chunk;
    slot_order const order = orders.of_block();
    for (index_t i = warp_of_block(); i < count; i += warps_of_block()) {
      std::byte const* const row = keys.bytes(order(first + i));
      float square = 0;
      for_features(kv.k, row, lane_of_warp(), warp_size,
                   [&](index_t, float x) { square = __fmaf_rn(x, x, square); });
      float const norm = __fsqrt_rn(warp_reduce(square, add{}));
      if (lane_of_warp() == 0) {
        inverse[i] = finite_norm(norm) ? __fdiv_rn(1.0f, norm < 1e-12f ? 1e-12f : norm) : 0.0f;
        rows[i] = row;
      }
    }
    __syncthreads();
    double* const out = partial_of(c);
    for (index_t d = thread_of_block(); d < dim(); d += threads_of_block()) {
      double sum = 0;
      for (index_t i = 0; i < count; ++i) {
        float const unit = __fmul_rn(feature(kv.k, rows[i], d), inverse[i]);
        sum += inverse[i] > 0 ? static_cast<double>(unit) : 0.0;
      }
      out[d] = sum;
    }
  }
};

/// Adds up the chunks. One block per head.
struct key_mean_kernel : key_diff_part {
  static constexpr int most_threads = 256, blocks_per_sm = 1;

  __device__ void operator()() const {
    shared_pieces shared;
    double* const sums = shared.take<double>(strands * dim());
    double* const box = shared.take<double>(warp_size);
    block_head const at(o.layer.kv.shape.n_kv_heads);
    index_t const n = o.layer.slots.lengths(o.batch.id_of(at.entry), at.head);
    index_t const used = (n + chunk - 1) / chunk;
    for (index_t i = thread_of_block(); i < strands * dim(); i += threads_of_block()) {
      index_t const strand = i / dim(), d = i - strand * dim();
      double sum = 0;
      for (index_t c = strand; c < used; c += strands) sum += partial_of(c)[d];
      sums[i] = sum;
    }
    __syncthreads();
    float* const out = mean_of_block();
    double square = 0;
    for (index_t d = thread_of_block(); d < dim(); d += threads_of_block()) {
      double sum = 0;
      for (index_t s = 0; s < strands; ++s) sum += sums[s * dim() + d];
      sum /= static_cast<double>(max(n, 1));
      square += sum * sum;
      out[d] = static_cast<float>(sum);
    }
    square = block_reduce(square, box, add{});
    if (thread_of_block() == 0) out[dim()] = static_cast<float>(sqrt(square));
  }
};

/// A warp per key; the blocks of a head take its slots in turns. Cost: K once.
struct key_cosine_kernel : key_diff_part {
  static constexpr int most_threads = 256, blocks_per_sm = 4;
  static constexpr index_t slots_per_block = 64;  ///< fewer are not worth a block

  __device__ void operator()() const {
    kv_ref<device_space> const& kv = o.layer.kv;
    block_head const at(kv.shape.n_kv_heads);
    index_t const n = o.layer.slots.lengths(o.batch.id_of(at.entry), at.head);
    head_rows const keys(kv.k, o.batch.row_of(at.entry), at.head);
    float const* const anchor = mean_of_block();
    index_t const warps = static_cast<index_t>(gridDim.y) * warps_of_block();
    for (index_t j = static_cast<index_t>(blockIdx.y) * warps_of_block() + warp_of_block(); j < n;
         j += warps) {
      float square = 0, dot = 0;
      for_features(kv.k, keys.bytes(j), lane_of_warp(), warp_size, [&](index_t d, float x) {
        square = __fmaf_rn(x, x, square);
        dot = __fmaf_rn(x, anchor[d], dot);
      });
      square = warp_reduce(square, add{});
      dot = warp_reduce(dot, add{});
      float const norm = __fsqrt_rn(square), lengths = __fmul_rn(norm, anchor[dim()]);
      if (lane_of_warp() == 0)
        o.out(at.entry, at.head, j) = finite_norm(norm)
                                          ? -__fdiv_rn(dot, lengths < 1e-8f ? 1e-8f : lengths)
                                          : __uint_as_float(0x7fc00000u);
    }
  }
};

}  // namespace kvkeep::cuda
