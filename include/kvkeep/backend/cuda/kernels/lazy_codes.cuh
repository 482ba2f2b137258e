// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// 16-bit codes of non-negative floats, two to a word, and lower bounds of MorphKV's scores made from them.
/// The same words as the CPU's. Every rounding is downwards or covered by `bound_slack`.
#pragma once

#include "../../../op/lazy_rows.hpp"
#include "block.cuh"

namespace kvkeep::cuda {

/// Sums of lazy_shape::most_rows products err by less; exact scores are compared with this tolerance too.
inline constexpr float bound_slack = 2e-5f;
inline constexpr float largest_code = 1e37f;

/// Slot rows of words: row i holds code 2 i in the lower and 2 i + 1 in the upper half. A slot's words belong
/// to one thread at a time.
struct code_rows {
  float* words = nullptr;  ///< [rows][slots]
  offset_t stride = 0;     ///< words between rows

  /// The float that a code is cut from.
  __device__ float get(index_t code, index_t j) const {
    unsigned const w = __float_as_uint(words[code / 2 * stride + j]);
    return __uint_as_float((code % 2 == 0 ? w << 15 : w >> 1) & 0x7fff8000u);
  }
  /// Rounds down. `x` is not negative and at most `largest_code`.
  __device__ void put(index_t code, index_t j, float x) const {
    float* const at = words + code / 2 * stride + j;
    unsigned const old = __float_as_uint(*at), bits = __float_as_uint(x);
    *at = __uint_as_float(code % 2 == 0 ? (old & 0xffff0000u) | (bits >> 15 & 0xffffu)
                                        : (old & 0xffffu) | (bits << 1 & 0xffff0000u));
  }
};

/// What bounds are made from: row p has code `p % n_rows` and, for the step k after `newest`, the factor
/// `factors[k * padded + p % n_rows]` (0 where the row will be gone).
struct bound_source {
  code_rows codes;
  code_rows bounds;                ///< code k: the bound prepared for phase k
  float const* factors = nullptr;  ///< shared
  index_t padded = 0;
  index_t n_rows = 0;
  index_t newest = 0;  ///< position
  reduction fuse = reduction::sum;

  __device__ index_t before(index_t code) const { return code > 0 ? code - 1 : n_rows - 1; }
  __device__ float fold(float acc, float x) const {
    return fuse == reduction::sum ? __fadd_rn(acc, x) : x > acc ? x : acc;
  }
};

/// Prepares a slot's bounds for phases `phase` and later, from the rows up to `newest - phase`: those after
/// them are added when the bound is read.
__device__ inline void prepare_bounds(bound_source const& s, index_t phase, index_t j) {
  constexpr int ahead = lazy_shape::ahead;
  float acc[ahead];
  for (int k = 0; k < ahead; ++k) acc[k] = 0;
  index_t row = s.newest % s.n_rows;
  for (index_t back = 0; back < s.n_rows && back <= s.newest; ++back, row = s.before(row)) {
    if (back < phase) continue;
    float const x = s.codes.get(row, j);
    for (int k = 0; k < ahead; ++k)
      acc[k] = s.fold(acc[k], __fmul_rn(x, s.factors[k * s.padded + row]));
  }
  for (int k = 0; k < ahead; ++k)
    if (k + phase < ahead) s.bounds.put(phase + k, j, min(acc[k], largest_code));
}

/// Lower bound of a slot's score now.
__device__ inline float lower_bound(bound_source const& s, index_t phase, index_t j) {
  float acc = s.bounds.get(phase, j);
  index_t row = s.newest % s.n_rows;
  for (index_t back = 0; back < min(phase, s.n_rows) && back <= s.newest;
       ++back, row = s.before(row))
    acc = s.fold(acc, __fmul_rn(s.codes.get(row, j), s.factors[row]));
  return acc;
}

}  // namespace kvkeep::cuda
