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

  __device__ float* at(index_t row, index_t j) const { return words + row * stride + j; }
  __device__ unsigned word(index_t row, index_t j) const { return __float_as_uint(*at(row, j)); }
  /// The float that a code is cut from, given its word.
  __device__ static float value(unsigned word, index_t code) {
    return __uint_as_float((code % 2 == 0 ? word << 15 : word >> 1) & 0x7fff8000u);
  }
  __device__ float get(index_t code, index_t j) const { return value(word(code / 2, j), code); }
  /// The word with a code rounded down from x, which is not negative and at most `largest_code`.
  __device__ static unsigned with(unsigned word, index_t code, float x) {
    unsigned const bits = __float_as_uint(x);
    return code % 2 == 0 ? (word & 0xffff0000u) | (bits >> 15 & 0xffffu)
                         : (word & 0xffffu) | (bits << 1 & 0xffff0000u);
  }
  __device__ void set_word(index_t row, index_t j, unsigned word) const {
    *at(row, j) = __uint_as_float(word);
  }
};

/// What bounds are made from: row p has code `p % n_rows`.
struct bound_source {
  code_rows codes;
  code_rows bounds;                ///< code k: the bound prepared for phase k
  float const* factors = nullptr;  ///< shared; of bound_factors
  index_t n_rows = 0;
  index_t n_present = 0;  ///< rows that were written; nobody has cleared the others
  index_t first = 0;      ///< code of the newest row

  /// Code of the row `back` positions before the newest one, and the reverse. Below n_rows.
  __device__ index_t code_of(index_t back) const {
    return back > first ? first - back + n_rows : first - back;
  }
  __device__ index_t back_of(index_t code) const { return code_of(code); }
};

struct sum_fold {
  __device__ float operator()(float acc, float x, float factor) const {
    return __fmaf_rn(x, factor, acc);
  }
};
struct max_fold {
  __device__ float operator()(float acc, float x, float factor) const {
    return max(acc, __fmul_rn(x, factor));
  }
};

/// Prepares a slot's bounds for phases `phase` and later, from all rows but the newest `phase`, which are added
/// when the bound is read. Factors: [row][ahead]
template <class Fold>
__device__ void prepare_bounds(bound_source const& s, index_t phase, index_t j, Fold const& fold) {
  constexpr int ahead = lazy_shape::ahead, at_once = 8;
  auto const* const factors = reinterpret_cast<float4 const*>(s.factors);
  index_t const words = (s.n_rows + 1) / 2;
  float acc[ahead] = {};
  for (index_t row = 0; row < words; row += at_once) {
    unsigned word[at_once];
    unrolled<at_once>([&](int i) { word[i] = s.codes.word(min(row + i, words - 1), j); });
    unrolled<2 * at_once>([&](int i) {
      index_t const code = 2 * row + i;
      if (code >= s.n_rows) return;
      index_t const back = s.back_of(code);
      if (back < phase || back >= s.n_present) return;
      float const x = code_rows::value(word[i / 2], i);
      float4 const a = factors[2 * code], b = factors[2 * code + 1];
      float const f[ahead] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
      unrolled<ahead>([&](int k) { acc[k] = fold(acc[k], x, f[k]); });
    });
  }
  unrolled<ahead>([&](int k) { acc[k] = min(acc[k], largest_code); });
  if (phase == 0) {  // all of them: words need not be read
    unrolled<ahead / 2>([&](int i) {
      unsigned const even = code_rows::with(0u, 0, acc[2 * i]);
      s.bounds.set_word(i, j, code_rows::with(even, 1, acc[2 * i + 1]));
    });
    return;
  }
  unrolled<ahead>([&](int k) {
    index_t const at = phase + k;
    if (at >= ahead) return;
    s.bounds.set_word(at / 2, j, code_rows::with(s.bounds.word(at / 2, j), at, acc[k]));
  });
}

/// Lower bound of a slot's score now. Factors: [row]
template <class Fold>
__device__ float lower_bound(bound_source const& s, index_t phase, index_t j, Fold const& fold) {
  constexpr int most = lazy_shape::ahead - 1;
  index_t const newer = min(phase, s.n_present);
  unsigned word[most];
  unrolled<most>([&](int i) { word[i] = i < newer ? s.codes.word(s.code_of(i) / 2, j) : 0u; });
  float acc = s.bounds.get(phase, j);
  unrolled<most>([&](int i) {
    if (i >= newer) return;
    index_t const code = s.code_of(i);
    acc = fold(acc, code_rows::value(word[i], code), s.factors[code]);
  });
  return acc;
}

/// use(fold) by the reduction that is asked for.
template <class Use>
__device__ auto with_fold(reduction fuse, Use const& use) {
  return fuse == reduction::sum ? use(sum_fold{}) : use(max_fold{});
}

}  // namespace kvkeep::cuda
