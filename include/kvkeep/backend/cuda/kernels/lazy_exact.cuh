// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Exact scores in MorphKV's lazy evaluation, and the list of the slots that need one. By a block.
#pragma once

#include "lazy_head.cuh"

namespace kvkeep::cuda {

inline constexpr index_t most_in_doubt = 64;  ///< exact scores before the direct form takes over

/// Up to four slots, the same in all threads.
struct slot_picks {
  static constexpr int most = 4;
  index_t slot[most] = {};
  index_t n = 0;

  __device__ bool has(index_t j) const {
    bool found = false;
    unrolled<most>([&](int i) { found = found || (i < n && slot[i] == j); });
    return found;
  }
  /// The i-th, or the last one.
  __device__ index_t operator[](index_t i) const {
    index_t r = slot[0];
    unrolled<most>([&](int k) { r = k <= i && k < n ? slot[k] : r; });
    return r;
  }
  __device__ void add(index_t j) {
    unrolled<most>([&](int k) { slot[k] = k == n ? j : slot[k]; });
    ++n;
  }
};

/// Exact scores of some slots by the block: the rows there are, head after head, positions ascending.
struct exact_score {
  static constexpr int at_once = slot_picks::most;  ///< slots that share a reading of the queries
  static constexpr int lanes_of_row = 2 * at_once;  ///< threads that share a query row
  float* maximum;                                   ///< [rows]
  float* inverse;                                   ///< [rows] 1 / Z
  float* best;                                      ///< [rows] weights of the best slot
  float* e;     ///< [slot][rows] weights of the slots scored last
  float* keys;  ///< [dim_k][slot]
  float* f;     ///< [slot] scores

  __device__ exact_score(shared_pieces& s, index_t rows, index_t dim)
      : maximum(s.take<float>(rows)),
        inverse(s.take<float>(rows)),
        best(s.take<float>(rows)),
        e(s.take<float>(at_once * static_cast<offset_t>(rows))),
        keys(s.take<float>(at_once * static_cast<offset_t>(dim))),
        f(s.take<float>(at_once)) {}
  static std::size_t bytes(index_t rows, index_t dim) {
    return 3 * shared_pieces::bytes<float>(rows) +
           shared_pieces::bytes<float>(at_once * static_cast<offset_t>(rows)) +
           shared_pieces::bytes<float>(at_once * static_cast<offset_t>(dim)) +
           shared_pieces::bytes<float>(at_once);
  }

  /// Reads the rows' sums. @return whether all are such that dividing by them means something
  __device__ bool begin(lazy_job const& job) const {
    bool good = true;
    job.each_row(job.newest, [&](index_t i, index_t, index_t, index_t at) {
      double const sum = job.head.sum(i);
      good = good && lazy_shape::divides(sum);
      maximum[at] = job.head.maximum(i);
      inverse[at] = __fdiv_rn(1.0f, static_cast<float>(sum));
    });
    return __syncthreads_and(good ? 1 : 0) != 0;
  }

  /// Canonical scores of the slots, into `f`.
  __device__ void operator()(lazy_job const& job, slot_picks const& picks, reduction fuse) const {
    index_t const count = job.newest - job.first + 1, all = job.head.shape().group * count;
    int const share = threads_of_block() / at_once, which = thread_of_block() / share;
    __syncthreads();
    for_features(job.plane, job.keys().bytes(picks[which]), thread_of_block() % share, share,
                 [&](index_t d, float x) { keys[d * at_once + which] = x; });
    __syncthreads();
    weigh(job, picks.n, count, all);
    __syncthreads();
    for (index_t i = warp_of_block(); i < picks.n; i += warps_of_block()) {
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
  /// Weights of `n` slots in all rows. A lane multiplies every eighth feature of a row, eight loads at a time.
  __device__ void weigh(lazy_job const& job, index_t n, index_t count, index_t all) const {
    constexpr index_t rows_of_warp = warp_size / lanes_of_row;
    constexpr int loads = 8;
    auto const* const fours = reinterpret_cast<float4 const*>(keys);
    index_t const part = lane_of_warp() % lanes_of_row, dim = job.plane.dim;
    for (index_t first = warp_of_block() * rows_of_warp; first < all;
         first += warps_of_block() * rows_of_warp) {
      index_t const at = first + lane_of_warp() / lanes_of_row, own = min(at, all - 1);
      float const* const q = job.query(own / count, job.first + own % count);
      float sum[at_once] = {};
      for (index_t base = part; base < dim; base += loads * lanes_of_row) {
        float x[loads];
        unrolled<loads>([&](int i) {
          index_t const d = base + i * lanes_of_row;
          x[i] = d < dim ? q[d] : 0.0f;
        });
        unrolled<loads>([&](int i) {
          index_t const d = base + i * lanes_of_row;
          if (d >= dim) return;
          float4 const k = fours[d];
          sum[0] = __fmaf_rn(x[i], k.x, sum[0]);
          sum[1] = __fmaf_rn(x[i], k.y, sum[1]);
          sum[2] = __fmaf_rn(x[i], k.z, sum[2]);
          sum[3] = __fmaf_rn(x[i], k.w, sum[3]);
        });
      }
      share_sums<lanes_of_row / 2, 1, at_once>(sum);  // a slot's in every other lane
      index_t const slot = part / 2;
      if (at < all && part % 2 == 0 && slot < n)
        e[static_cast<offset_t>(slot) * all + at] = finite_weight(job.form(sum[0]) - maximum[at]);
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

  /// Lists slots whose bound is at most `limit`, but those of `seen`. Precondition: at most `most_in_doubt`.
  /// @return how many
  __device__ index_t collect(float const* bounds, index_t n, float limit, slot_picks const& seen,
                             int* box) const {
    index_t count = 0;
    for (index_t base = 0; base < n; base += threads_of_block()) {
      index_t const j = base + thread_of_block();
      bool const mine = j < n && bounds[j] <= limit && !seen.has(j);
      flag_rank const r = rank_flags(mine, box);
      if (mine) bound[count + r.before] = bounds[j], slot[count + r.before] = j;
      count += r.total;
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
