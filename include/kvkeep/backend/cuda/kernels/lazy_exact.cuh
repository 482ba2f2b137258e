// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Exact scores in MorphKV's lazy evaluation, and the list of the slots that need one. By a block.
#pragma once

#include "lazy_head.cuh"

namespace kvkeep::cuda {

inline constexpr index_t most_in_doubt = 64;  ///< exact scores before the direct form takes over

/// Exact scores of some slots by the block: the rows there are, head after head, positions ascending.
struct exact_score {
  static constexpr int at_once = 4;       ///< slots that share a reading of the queries
  static constexpr int lanes_of_row = 8;  ///< threads that share a query row
  float* maximum;                         ///< [rows]
  float* inverse;                         ///< [rows] 1 / Z
  float* best;                            ///< [rows] weights of the best slot
  float* e;                               ///< [slot][rows] weights of the slots scored last
  float* keys;                            ///< [dim_k][slot]
  float* f;                               ///< [slot] scores
  index_t* picked;                        ///< [slot] the slots to be scored

  __device__ exact_score(shared_pieces& s, index_t rows, index_t dim)
      : maximum(s.take<float>(rows)),
        inverse(s.take<float>(rows)),
        best(s.take<float>(rows)),
        e(s.take<float>(at_once * static_cast<offset_t>(rows))),
        keys(s.take<float>(at_once * static_cast<offset_t>(dim))),
        f(s.take<float>(at_once)),
        picked(s.take<index_t>(at_once)) {}
  static std::size_t bytes(index_t rows, index_t dim) {
    return 3 * shared_pieces::bytes<float>(rows) +
           shared_pieces::bytes<float>(at_once * static_cast<offset_t>(rows)) +
           shared_pieces::bytes<float>(at_once * static_cast<offset_t>(dim)) +
           shared_pieces::bytes<float>(at_once) + shared_pieces::bytes<index_t>(at_once);
  }

  /// Reads the rows' sums. @return whether all are such that dividing by them means something
  __device__ bool begin(lazy_job const& job) const {
    bool good = true;
    job.each_row(job.newest, [&](index_t i, index_t, index_t, index_t at) {
      double const sum = job.head.sum(i);
      good = good && sum >= 1e-30 && sum <= static_cast<double>(largest_float);
      maximum[at] = job.head.maximum(i);
      inverse[at] = __fdiv_rn(1.0f, static_cast<float>(sum));
    });
    return __syncthreads_and(good ? 1 : 0) != 0;
  }

  /// Canonical scores of up to `at_once` slots, of `picked`, into `f`.
  __device__ void operator()(lazy_job const& job, index_t n, reduction fuse) const {
    index_t const count = job.newest - job.first + 1, all = job.head.shape().group * count;
    __syncthreads();
    for (index_t i = 0; i < at_once; ++i)  // without a key, the last one again
      for_features(job.plane, job.k.bytes(picked[min(i, n - 1)]), thread_of_block(),
                   threads_of_block(), [&](index_t d, float x) { keys[d * at_once + i] = x; });
    __syncthreads();
    weigh(job, n, count, all);
    __syncthreads();
    for (index_t i = warp_of_block(); i < n; i += warps_of_block()) {
      float const* const own = e + static_cast<offset_t>(i) * all;
      float sum = 0;
      for (index_t r = lane_of_warp(); r < count; r += warp_size) {
        float top = 0;
        for (index_t at = r; at < all; at += count) top = max(top, __fmul_rn(own[at], inverse[at]));
        sum = fuse == reduction::sum ? __fadd_rn(sum, top) : max(sum, top);
      }
      sum = fuse == reduction::sum ? warp_reduce(sum, add{}) : warp_reduce(sum, larger{});
      if (lane_of_warp() == 0) f[i] = sum;
    }
    __syncthreads();
  }

  /// Remembers the weights of the i-th slot scored last.
  __device__ void keep(index_t i, index_t all) const {
    for (index_t at = thread_of_block(); at < all; at += threads_of_block())
      best[at] = e[static_cast<offset_t>(i) * all + at];
  }

 private:
  /// Sum over the threads that share a row.
  __device__ static float sum_row(float x) {
    for (int step = lanes_of_row / 2; step > 0; step /= 2)
      x = __fadd_rn(x, __shfl_xor_sync(all_lanes, x, step));
    return x;
  }
  /// Weights of `n` slots in all rows.
  __device__ void weigh(lazy_job const& job, index_t n, index_t count, index_t all) const {
    constexpr index_t rows_of_warp = warp_size / lanes_of_row;
    auto const* const fours = reinterpret_cast<float4 const*>(keys);
    index_t const part = lane_of_warp() % lanes_of_row;
    for (index_t first = warp_of_block() * rows_of_warp; first < all;
         first += warps_of_block() * rows_of_warp) {
      index_t const at = first + lane_of_warp() / lanes_of_row;
      float a = 0, b = 0, c = 0, d = 0;
      if (at < all) {
        float const* const q = job.query(at / count, job.first + at % count);
        for (index_t i = part; i < job.plane.dim; i += lanes_of_row) {
          float const x = q[i];
          float4 const k = fours[i];
          a = __fmaf_rn(x, k.x, a);
          b = __fmaf_rn(x, k.y, b);
          c = __fmaf_rn(x, k.z, c);
          d = __fmaf_rn(x, k.w, d);
        }
      }
      a = sum_row(a), b = sum_row(b), c = sum_row(c), d = sum_row(d);
      float const dot = part == 0 ? a : part == 1 ? b : part == 2 ? c : d;
      if (at < all && part < n)
        e[static_cast<offset_t>(part) * all + at] = finite_weight(job.form(dot) - maximum[at]);
    }
  }
};

/// Slots whose bounds do not exclude them, by ascending bound.
struct doubt_list {
  float* bound;          ///< [most_in_doubt]
  index_t* slot;         ///< [most_in_doubt]
  float* sorted_bound;   ///< [most_in_doubt]
  index_t* sorted_slot;  ///< [most_in_doubt]

  __device__ explicit doubt_list(shared_pieces& s)
      : bound(s.take<float>(most_in_doubt)),
        slot(s.take<index_t>(most_in_doubt)),
        sorted_bound(s.take<float>(most_in_doubt)),
        sorted_slot(s.take<index_t>(most_in_doubt)) {}
  static std::size_t bytes() {
    return 2 * (shared_pieces::bytes<float>(most_in_doubt) +
                shared_pieces::bytes<index_t>(most_in_doubt));
  }

  /// Lists slots whose bound is at most `limit`. @return how many; more than `most_in_doubt`: no list
  __device__ index_t collect(float const* bounds, index_t n, float limit, int* box) const {
    index_t const count = count_slots(n, box, [&](index_t j) { return bounds[j] <= limit; });
    if (count > most_in_doubt) return count;
    index_t at = 0;
    for (index_t base = 0; base < n; base += threads_of_block()) {
      index_t const j = base + thread_of_block();
      bool const mine = j < n && bounds[j] <= limit;
      flag_rank const r = rank_flags(mine, box);
      if (mine) bound[at + r.before] = bounds[j], slot[at + r.before] = j;
      at += r.total;
    }
    __syncthreads();
    for (index_t i = thread_of_block(); i < count; i += threads_of_block()) {
      index_t rank = 0;  // slots ascend, so equal bounds keep their order
      for (index_t k = 0; k < count; ++k)
        rank += bound[k] < bound[i] || (bound[k] == bound[i] && k < i) ? 1 : 0;
      sorted_bound[rank] = bound[i];
      sorted_slot[rank] = slot[i];
    }
    __syncthreads();
    return count;
  }
};

}  // namespace kvkeep::cuda
