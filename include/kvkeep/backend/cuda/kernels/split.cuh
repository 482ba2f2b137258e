// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Queries are split into 16-bit numbers, once for all blocks that multiply them with keys; so are their
/// normalisers taken from log-sum-exps.
#pragma once

#include "fragments.cuh"

namespace kvkeep::cuda {

/// A warp takes a query, a lane 8 of its features.
template <class T, int Blocks>
struct query_splitter {
  window_job job;

  /// Queries first, .. end - 1 of the block's head.
  __device__ void split(index_t first, index_t end) const {
    window_head const h(job);
    for (index_t q = first + warp_of_block(); q < end; q += warps_of_block()) split(h, q);
  }

 private:
  /// An absent row becomes zeros.
  __device__ void split(window_head const& h, index_t query) const {
    bool const present = h.position(query / h.group) >= 0;
    float const* const q = present ? h.query(query / h.group, query % h.group) : nullptr;
    float x[8];
    for (int e = 0; e < 8; ++e) {
      index_t const d = lane_of_warp() * 8 + e;
      x[e] = present && d < h.job.layer.kv.k.dim ? q[d] : 0.0f;
    }
    offset_t const at = static_cast<offset_t>(blockIdx.x) * job.n_queries() + query;
    float const up = scale_of(T{}, x);
    bool const more = write(x, up, at * (Blocks * 4) + lane_of_warp());
    int const some = __any_sync(all_lanes, more ? 1 : 0);
    if (lane_of_warp() != 0) return;
    float const down = down_of(up) * key_pieces<T>::unit(job.layer.kv.k.type);
    job.split.query[at] = {__fmul_rn(logit2_form(job.layer.kv).factor, down),
                           h.limit(query / h.group), some};
    if (job.rows.lse.data != nullptr) job.norms[at] = h.norm(query / h.group, query % h.group);
  }
  /// @return whether the second number is not 0 throughout
  __device__ bool write(float const (&x)[8], float up, offset_t at) const {
    unsigned first[4] = {}, second[4] = {};
    bool more = false;
    for (int e = 0; e < 8; ++e) {
      float const y = __fmul_rn(x[e], up);
      T const a = rounded(T{}, y);
      float const left = __fadd_rn(y, -to_float(a));
      bool const finite = (__float_as_uint(left) & 0x7fffffffu) < 0x7f800000u;
      T const b = rounded(T{}, finite ? left : 0.0f);
      more = more || (b.bits & 0x7fffu) != 0;
      first[e / 2] |= static_cast<unsigned>(a.bits) << 16 * (e % 2);
      second[e / 2] |= static_cast<unsigned>(b.bits) << 16 * (e % 2);
    }
    if (lane_of_warp() < Blocks * 4) {
      job.split.high[at] = make_uint4(first[0], first[1], first[2], first[3]);
      job.split.rest[at] = make_uint4(second[0], second[1], second[2], second[3]);
    }
    return more;
  }

  /// bf16 has the range of float.
  __device__ static float scale_of(bf16, float const (&)[8]) { return 1; }
  /// The power of two that takes the row's largest number to [2^14, 2^15), for what fp16 can hold.
  __device__ static float scale_of(fp16, float const (&x)[8]) {
    unsigned most = 0;
    for (float const v : x) {
      unsigned const magnitude = __float_as_uint(v) & 0x7fffffffu;
      if (magnitude < 0x7f800000u && magnitude > most) most = magnitude;
    }
    most = warp_reduce(most, larger{});
    int const exponent = static_cast<int>(most >> 23);
    if (exponent == 0) return 1;
    return __uint_as_float(static_cast<unsigned>(127 + min(141 - exponent, 120)) << 23);
  }
  /// One over a power of two.
  __device__ static float down_of(float up) {
    return __uint_as_float((254u << 23) - __float_as_uint(up));
  }
  __device__ static bf16 rounded(bf16, float x) { return to_bf16(x); }
  __device__ static fp16 rounded(fp16, float x) { return to_fp16(x); }
};

/// Grid: heads, tiles of queries.
template <class T, int Blocks>
struct split_kernel {
  static constexpr int most_threads = 128, blocks_per_sm = 1;
  static constexpr index_t tile = 16;  ///< queries of a block
  query_splitter<T, Blocks> of;

  __device__ void operator()() const {
    index_t const first = static_cast<index_t>(blockIdx.y) * tile;
    of.split(first, min(first + tile, of.job.n_queries()));
  }
};

/// All queries of a head, after the limit that they have in common. A block per head.
template <class T, int Blocks>
struct split_old_kernel {
  static constexpr int most_threads = 1024, blocks_per_sm = 1;
  query_splitter<T, Blocks> of;
  old_limits limits;

  __device__ void operator()() const {
    limits.find();
    __syncthreads();
    of.split(0, of.job.n_queries());
  }
};

}  // namespace kvkeep::cuda
