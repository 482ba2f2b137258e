// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Softmax work on the logits of one panel of 16 keys: probabilities for a known log-sum-exp,
/// folded over the query rows or written out, and running row statistics where the log-sum-exp is
/// not known. Columns are always taken 16 at a time in panel order, so a result depends on the
/// panels alone.
#pragma once

#include "panel.hpp"

namespace kvkeep::cpu {
inline namespace KVKEEP_CPU_ISA {

/// Logits of query rows against one panel.
struct logit_tile {
  float const* z = nullptr;  ///< [n_rows][16], host
  offset_t stride = panel_keys;
  index_t n_rows = 0;
  /// [n_rows], host: bit j says that the row may see column j. Null: every row sees all 16.
  std::uint16_t const* visible = nullptr;
};

enum class row_fold : std::uint8_t { sum, max };

/// Normalisers of query rows: p = scale * e^(z - shift). Either (log-sum-exp, 1) or (maximum, 1 / sum): the
/// pair stays exact where all logits are huge and a log-sum-exp would absorb the logarithm of the sum.
struct row_norm {
  float const* shift = nullptr;  ///< [n_rows], host
  float const* scale = nullptr;  ///< [n_rows], host; 0 drops a row
};

/// e^(z - shift) of half a row; columns that the row does not see give exactly 0.
template <bool Masked>
inline vf tile_exp(logit_tile const& t, index_t r, index_t half, vf shift) noexcept {
  vf const e = exp(load(t.z + r * t.stride + half * lanes) - shift);
  if constexpr (!Masked) return e;
  unsigned const bits = (static_cast<unsigned>(t.visible[r]) >> (half * lanes)) & 0xffu;
  return float_of_bits(bits_of(e) & lane_mask(bits));
}

template <bool Masked, row_fold Fold>
inline void fold_tile_rows(logit_tile const& t, row_norm const& norm, float* acc) noexcept {
  vf a0 = load(acc), a1 = load(acc + lanes);
  for (index_t r = 0; r < t.n_rows; ++r) {
    vf const shift = splat(norm.shift[r]), scale = splat(norm.scale[r]);
    vf const e0 = tile_exp<Masked>(t, r, 0, shift), e1 = tile_exp<Masked>(t, r, 1, shift);
    a0 = Fold == row_fold::sum ? fma(e0, scale, a0) : max(a0, e0 * scale);
    a1 = Fold == row_fold::sum ? fma(e1, scale, a1) : max(a1, e1 * scale);
  }
  store(acc, a0);
  store(acc + lanes, a1);
}

/// acc[j] = acc[j] + sum over rows of p[r][j], rows ascending (or the maximum with them).
/// @param acc [16], host; the caller sets the start values
/// Cost: 16 exponentials per row; z from the first-level cache.
inline void exp_rows_accumulate(logit_tile const& t, row_norm const& norm, row_fold fold,
                                float* acc) noexcept {
  bool const sum = fold == row_fold::sum;
  if (t.visible == nullptr)
    sum ? fold_tile_rows<false, row_fold::sum>(t, norm, acc)
        : fold_tile_rows<false, row_fold::max>(t, norm, acc);
  else
    sum ? fold_tile_rows<true, row_fold::sum>(t, norm, acc)
        : fold_tile_rows<true, row_fold::max>(t, norm, acc);
}

/// What moments need to know of the rows besides their normalisers.
struct moment_rows {
  float const* log_scale = nullptr;  ///< [n_rows], host: ln of the normalisers' scale
  float const* inverse = nullptr;    ///< [n_rows], host: one over a row's number, from 1
  float most = 0;                    ///< of -ln p
};

template <bool Masked>
inline void fold_tile_moments(logit_tile const& t, row_norm const& norm, moment_rows const& m,
                              float* acc) noexcept {
  for (index_t half = 0; half < 2; ++half) {
    float* const a = acc + half * lanes;
    vf mean = load(a), spread = load(a + panel_keys), entropy = load(a + 2 * panel_keys);
    for (index_t r = 0; r < t.n_rows; ++r) {
      vf const shift = splat(norm.shift[r]);
      vf const p = tile_exp<Masked>(t, r, half, shift) * splat(norm.scale[r]);
      vf const off = p - mean;
      mean = fma(off, splat(m.inverse[r]), mean);
      spread = fma(off, p - mean, spread);
      // From the logit, which may be anything where p is 0.
      vf const log = (shift - load(t.z + r * t.stride + half * lanes)) - splat(m.log_scale[r]);
      entropy = fma(p, max(min(log, splat(m.most)), splat(-m.most)), entropy);
    }
    store(a, mean);
    store(a + panel_keys, spread);
    store(a + 2 * panel_keys, entropy);
  }
}

/// Takes the rows' p[r][j], rows ascending, into acc[0][j], their mean, acc[1][j], the sum of squares of what they
/// deviate from it by, and acc[2][j], the sum of p * min(-ln p, most).
/// @param acc [3][16], host
inline void exp_rows_moments(logit_tile const& t, row_norm const& norm, moment_rows const& m,
                             float* acc) noexcept {
  t.visible == nullptr ? fold_tile_moments<false>(t, norm, m, acc)
                       : fold_tile_moments<true>(t, norm, m, acc);
}

/// Writes p[r][j], 0 where the row does not see the column. `p` may be `t.z`.
/// @param p [n_rows][16] with `stride` floats between rows, host
inline void exp_rows_write(logit_tile const& t, row_norm const& norm, float* p,
                           offset_t stride) noexcept {
  for (index_t r = 0; r < t.n_rows; ++r) {
    vf const shift = splat(norm.shift[r]), scale = splat(norm.scale[r]);
    bool const masked = t.visible != nullptr;
    vf const e0 = masked ? tile_exp<true>(t, r, 0, shift) : tile_exp<false>(t, r, 0, shift);
    vf const e1 = masked ? tile_exp<true>(t, r, 1, shift) : tile_exp<false>(t, r, 1, shift);
    store(p + r * stride, e0 * scale);
    store(p + r * stride + lanes, e1 * scale);
  }
}

/// Running softmax statistics of query rows.
struct row_stats {
  float* max = nullptr;  ///< [n_rows], host: largest logit seen, -FLT_MAX at first
  float* sum = nullptr;  ///< [n_rows], host: sum of e^(z - max), 0 at first
};

/// Sets `n_rows` rows to the empty state.
inline void row_stats_begin(row_stats const& s, index_t n_rows) noexcept {
  for (index_t r = 0; r < n_rows; ++r) {
    s.max[r] = -FLT_MAX;
    s.sum[r] = 0;
  }
}

/// Logits of half a row, -FLT_MAX where the row does not see the column.
inline vf visible_half(logit_tile const& t, index_t r, index_t half) noexcept {
  vf const z = load(t.z + r * t.stride + half * lanes);
  if (t.visible == nullptr) return z;
  unsigned const bits = (static_cast<unsigned>(t.visible[r]) >> (half * lanes)) & 0xffu;
  return select(lane_mask(bits), z, splat(-FLT_MAX));
}

/// Takes one panel into the statistics. Eight rows share the horizontal steps. Logits must be
/// finite (see finish_logits). Cost: 16 exponentials per row, and one for the old sum.
inline void row_stats_update(logit_tile const& t, row_stats const& s) noexcept {
  for (index_t first = 0; first < t.n_rows; first += lanes) {
    index_t const rows = t.n_rows - first < lanes ? t.n_rows - first : lanes;
    vf top[8], part[8];
    for (index_t i = 0; i < lanes; ++i)
      top[i] = i < rows ? max(visible_half(t, first + i, 0), visible_half(t, first + i, 1))
                        : splat(-FLT_MAX);
    vf const old_max = load_some(s.max + first, rows);
    vf const new_max = max(max_each(top), old_max);
    float shift[8];
    store(shift, new_max);
    for (index_t i = 0; i < lanes; ++i) {
      part[i] = splat(0.0f);
      if (i >= rows) continue;
      vf const m = splat(shift[i]);
      bool const masked = t.visible != nullptr;
      part[i] = masked ? tile_exp<true>(t, first + i, 0, m) + tile_exp<true>(t, first + i, 1, m)
                       : tile_exp<false>(t, first + i, 0, m) + tile_exp<false>(t, first + i, 1, m);
    }
    vf const kept = load_some(s.sum + first, rows) * exp(old_max - new_max);
    store_some(s.sum + first, kept + sum_each(part), rows);
    store_some(s.max + first, new_max, rows);
  }
}

/// Turns the statistics into normalisers, in place: the sum becomes the scale. A row that saw nothing gets
/// scale 0 and a shift that makes its exponentials 0.
inline row_norm row_stats_finish(row_stats const& s, index_t n_rows) noexcept {
  for (index_t r = 0; r < n_rows; ++r) {
    if (!(s.sum[r] > 0)) s.max[r] = FLT_MAX;
    s.sum[r] = s.sum[r] > 0 ? 1.0f / s.sum[r] : 0.0f;
  }
  return {s.max, s.sum};
}

}  // namespace KVKEEP_CPU_ISA
}  // namespace kvkeep::cpu
