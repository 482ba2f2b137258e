// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// 16-bit codes of non-negative floats, two to a word, and lower bounds of MorphKV's scores made from them.
/// Every rounding is downwards or covered by `bound_slack`.
#pragma once

#include <algorithm>
#include <cfloat>

#include "../simd.hpp"
#include "panel_softmax.hpp"

namespace kvkeep::cpu {
inline namespace KVKEEP_CPU_ISA {

/// Sums of lazy_shape::most_rows products err by less; exact scores are compared with this tolerance too.
inline constexpr float bound_slack = 2e-5F;
inline constexpr float largest_code = 1e37F;

/// Slot rows of words: row i holds code 2 i in the lower and 2 i + 1 in the upper half.
struct code_rows {
  float* words = nullptr;  ///< [rows][slots]; a row is readable up to a whole vector
  offset_t stride = 0;     ///< words between rows

  /// Codes of eight slots as the floats that they are cut from.
  vf get(index_t code, index_t j) const noexcept {
    vi const mask = splat(std::int32_t{0x7fff8000});
    vi const w = bits_of(load(words + code / 2 * stride + j));
    return float_of_bits((code % 2 == 0 ? shift_left<15>(w) : shift_right<1>(w)) & mask);
  }
  /// Rounds down. `x` is not negative and at most `largest_code`.
  void put(index_t code, index_t j, vf x) const noexcept {
    float* const at = words + code / 2 * stride + j;
    vi const lower = splat(std::int32_t{0xffff}), upper = lower ^ splat(std::int32_t{-1});
    vi const old = bits_of(load(at)), bits = bits_of(x);
    vi const w = code % 2 == 0 ? (old & upper) | (shift_right<15>(bits) & lower)
                               : (old & lower) | (shift_left<1>(bits) & upper);
    store(at, float_of_bits(w));
  }
};

/// A row's codes: max over g of e[g][slot] * inverse[g].
/// Cost: 4 * group + 8 bytes and 2 * group operations per slot.
inline void put_row_codes(float const* e, offset_t stride, float const* inverse, index_t group,
                          index_t n, index_t code, code_rows const& codes) noexcept {
  for (index_t j = 0; j < n; j += lanes) {
    vf top = load_some(e + j, n - j) * splat(inverse[0]);
    for (index_t g = 1; g < group; ++g)
      top = max(top, load_some(e + g * stride + j, n - j) * splat(inverse[g]));
    codes.put(code, j, min(top, splat(largest_code)));
  }
}

/// What bounds are made from: row p has code `p % n_rows` and, for the step k after `newest`, the factor
/// `factors[k * padded + p % n_rows]` (0 where the row will be gone).
struct bound_source {
  code_rows codes;
  code_rows bounds;  ///< code k: the bound prepared for phase k
  float const* factors = nullptr;
  index_t padded = 0;
  index_t n_rows = 0;
  index_t n_present = 0;    ///< rows that were written; nobody has cleared the others
  index_t newest_code = 0;  ///< place of the newest row
  row_fold fuse = row_fold::sum;

  /// Code of the row before; dividing for each would cost more than reading it.
  index_t before(index_t code) const noexcept { return code > 0 ? code - 1 : n_rows - 1; }
  vf fold(vf acc, vf x) const noexcept { return fuse == row_fold::sum ? acc + x : max(acc, x); }
};

/// Prepares eight slots' bounds for phases `phase` to K - 1, from all rows but the newest `phase`, which are
/// added when the bound is read.
template <int K>
inline void prepare_bounds(bound_source const& s, index_t phase, index_t j) noexcept {
  vf acc[K];
  KVKEEP_CPU_UNROLL
  for (int k = 0; k < K; ++k) acc[k] = splat(0.0f);
  index_t row = s.newest_code;
  for (index_t back = 0; back < s.n_present; ++back, row = s.before(row)) {
    if (back < phase) continue;
    vf const x = held(s.codes.get(row, j));
    KVKEEP_CPU_UNROLL
    for (int k = 0; k < K; ++k) acc[k] = s.fold(acc[k], x * splat(s.factors[k * s.padded + row]));
  }
  for (int k = 0; k + phase < K; ++k) s.bounds.put(phase + k, j, min(acc[k], splat(largest_code)));
}

/// Lower bounds of eight slots' scores now.
inline vf lower_bounds(bound_source const& s, index_t phase, index_t j) noexcept {
  vf acc = s.bounds.get(phase, j);
  index_t const newer = std::min(phase, s.n_present);
  index_t row = s.newest_code;
  for (index_t back = 0; back < newer; ++back, row = s.before(row))
    acc = s.fold(acc, s.codes.get(row, j) * splat(s.factors[row]));
  return acc;
}

}  // namespace KVKEEP_CPU_ISA
}  // namespace kvkeep::cpu
