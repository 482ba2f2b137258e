// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Statistics of key or value rows: norms (KNorm), ranges and normalised deviations (LagKV). The dot of all
/// rows with one vector is qk_rows with one query row.
#pragma once

#include "decode.hpp"

namespace kvkeep::cpu {
inline namespace KVKEEP_CPU_ISA {

/// Euclidean norm of every row.
/// @param out [k.n] floats, host
/// Cost: n * dim elements read, 2 * n * dim flops; fp32 sums in a fixed order.
template <class T>
inline void row_norms(row_list<T> const& k, index_t dim, float* out) noexcept {
  for (index_t j = 0; j < k.n; j += lanes) {
    index_t const count = k.n - j < lanes ? k.n - j : lanes;
    vf acc[8];
    for (index_t i = 0; i < lanes; ++i) {
      acc[i] = splat(0.0f);
      if (i >= count) continue;
      if (j + i + 16 < k.n) prefetch_row(k.rows[j + i + 16], dim);
      // Two sums per row, because one would wait for each multiply-add.
      vf odd = splat(0.0f);
      index_t d = 0;
      for (; d + 2 * lanes <= dim; d += 2 * lanes) {
        vf const x = load(k.rows[j + i] + d), y = load(k.rows[j + i] + d + lanes);
        acc[i] = fma(x, x, acc[i]);
        odd = fma(y, y, odd);
      }
      for (; d < dim; d += lanes) {
        vf const x = load_some(k.rows[j + i] + d, dim - d);
        acc[i] = fma(x, x, acc[i]);
      }
      acc[i] = acc[i] + odd;
    }
    store_some(out + j, sqrt(sum_each(acc)), count);
  }
}

/// Smallest and largest finite value of every feature over the rows; FLT_MAX and -FLT_MAX without any.
/// @param low, high [dim] floats, host
/// Cost: n * dim elements read.
template <class T>
inline void channel_range(row_list<T> const& k, index_t dim, float* low, float* high) noexcept {
  for (index_t d = 0; d < dim; d += lanes) {
    index_t const width = dim - d;
    vf const most = splat(FLT_MAX), least = splat(-FLT_MAX);
    vf lo = most, hi = least;
    for (index_t j = 0; j < k.n; ++j) {
      vf const x = load_some(k.rows[j] + d, width);
      lo = select(at_least(x, least), min(x, lo), lo);  // an infinity says nothing of a range
      hi = select(at_least(most, x), max(x, hi), hi);
    }
    store_some(low + d, lo, width);
    store_some(high + d, hi, width);
  }
}

/// Standard deviation over the features (unbiased, dim >= 2) of (x - low) / (high - low) for every
/// row; features with high = low count as 0. Finite: NaN becomes -FLT_MAX.
/// @param low, inverse_range [dim] floats, host; inverse_range is 0 where high = low
/// @param out [k.n] floats, host
/// Cost: n * dim elements read, 7 * n * dim flops.
template <class T>
inline void normalised_deviation(row_list<T> const& k, index_t dim, float const* low,
                                 float const* inverse_range, float* out) noexcept {
  for (index_t j = 0; j < k.n; ++j) {
    auto const normalised = [&](index_t d) {
      index_t const width = dim - d;
      return (load_some(k.rows[j] + d, width) - load_some(low + d, width)) *
             load_some(inverse_range + d, width);
    };
    vf sum = splat(0.0f);
    for (index_t d = 0; d < dim; d += lanes) sum = sum + normalised(d);
    vf const mean = splat(sum_lanes(sum) / static_cast<float>(dim));
    vf squares = splat(0.0f);
    for (index_t d = 0; d < dim; d += lanes) {
      index_t const width = dim - d;
      vf const x = normalised(d) - mean;
      vf const next = fma(x, x, squares);
      squares = width >= lanes ? next : select(lane_mask((1u << width) - 1u), next, squares);
    }
    vf const variance = splat(sum_lanes(squares) / static_cast<float>(dim - 1));
    out[j] = first_lane(sanitise(sqrt(variance)));
  }
}

/// 1 / (high - low), and 0 where they are equal. @param out [dim] floats, host; may be `high`
inline void invert_range(float const* low, float const* high, index_t dim, float* out) noexcept {
  for (index_t d = 0; d < dim; ++d) out[d] = high[d] > low[d] ? 1.0f / (high[d] - low[d]) : 0.0f;
}

}  // namespace KVKEEP_CPU_ISA
}  // namespace kvkeep::cpu
