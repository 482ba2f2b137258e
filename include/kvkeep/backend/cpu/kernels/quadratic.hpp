// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Products of the features of rows with each other, and quadratic forms of the keys of a panel.
#pragma once

#include "panel.hpp"

namespace kvkeep::cpu {
inline namespace KVKEEP_CPU_ISA {

/// Adds to, or writes, the first n numbers of half a row; n may be below 0 or above 8.
inline void add_half(float* to, vf sum, index_t n, bool add) noexcept {
  if (n >= lanes)
    store(to, add ? load(to) + sum : sum);
  else if (n > 0)
    store_part(to, add ? load_part(to, n) + sum : sum, n);
}

/// out[i][j] (+)= sum over rows of x[row][d + i] * x[row][e + j] for i < R, j < min(16, width).
/// @param x  [n][stride], host, readable up to feature e + 15
template <int R>
inline void products_of_features(float const* x, offset_t stride, index_t n, index_t d, index_t e,
                                 float* out, offset_t out_stride, index_t width,
                                 bool add) noexcept {
  wf acc[R];
  KVKEEP_CPU_UNROLL
  for (int r = 0; r < R; ++r) acc[r] = splat_wide(0.0f);
  float const* a = x + d;
  float const* b = x + e;
  for (index_t i = 0; i < n; ++i, a += stride, b += stride) {
    wf const y = load_wide(b);
    KVKEEP_CPU_UNROLL
    for (int r = 0; r < R; ++r) acc[r] = fma(splat_wide(a[r]), y, acc[r]);
  }
  KVKEEP_CPU_UNROLL
  for (int r = 0; r < R; ++r) {
    float* const to = out + r * out_stride;
    add_half(to, half_of<0>(acc[r]), width, add);
    add_half(to + lanes, half_of<1>(acc[r]), width - lanes, add);
  }
}

/// Features [d, dim) by those up to their own, at most R of them.
template <int R>
inline void products_of_last(float const* x, offset_t stride, index_t n, index_t d, index_t dim,
                             float* out, bool add) noexcept {
  if constexpr (R > 0) {
    if (dim - d < R) return products_of_last<R - 1>(x, stride, n, d, dim, out, add);
    for (index_t e = 0; e < d + R; e += panel_keys)
      products_of_features<R>(x, stride, n, d, e, out + static_cast<offset_t>(d) * dim + e, dim,
                              dim - e, add);
  }
}

/// out[d][e] (+)= sum over rows of x[row][d] * x[row][e] for e <= d, and for some features above.
/// @param x  [n][stride], host, of `dim` features and, up to a multiple of 16, numbers of any kind
/// @param out  [dim][dim], host
/// @param add  else what is there is replaced
/// Cost: dim^2 / 2 multiplications with additions per row, x from the first-level cache.
inline void add_products(float const* x, offset_t stride, index_t n, index_t dim, float* out,
                         bool add) noexcept {
  for (index_t d = 0; d < dim; d += panel_rows)
    products_of_last<panel_rows>(x, stride, n, d, dim, out, add);
}

/// sum + k[i] * (form[i] . (1, keys)) over R rows of a form, of which `reach` numbers count.
/// @param panel  [1 + dim][16] ones and the keys  @param k  the panel's row of the first row's feature
template <int R>
inline wf add_quadratic(float const* form, offset_t stride, index_t reach, float const* panel,
                        float const* k, wf sum) noexcept {
  wf acc[R];
  rows_by_panel<R>(form, stride, reach, panel, acc);
  KVKEEP_CPU_UNROLL
  for (int r = 0; r < R; ++r) sum = fma(acc[r], load_wide(k + r * panel_keys), sum);
  return sum;
}

/// The rows of a form from d on, at most R.
template <int R>
inline wf add_last_quadratic(float const* form, offset_t stride, index_t d, index_t dim,
                             bool spreads, float const* panel, wf sum) noexcept {
  if constexpr (R > 0) {
    if (dim - d < R) return add_last_quadratic<R - 1>(form, stride, d, dim, spreads, panel, sum);
    return add_quadratic<R>(form + d * stride, stride, spreads ? 1 + d + R : 1, panel,
                            panel + static_cast<offset_t>(1 + d) * panel_keys, sum);
  } else {
    return sum;
  }
}

/// Logits of a panel's keys (see op::quadratic_logits).
/// @param form  [dim][stride], host  @param panel  [1 + dim][16] ones and the keys, host  @param out  [16], host
/// Cost: 8 * dim^2 multiplications with additions; the form from the second-level cache.
inline void quadratic_panel(float const* form, offset_t stride, index_t dim, bool spreads,
                            float const* panel, float* out) noexcept {
  wf sum = splat_wide(0.0f);
  for (index_t d = 0; d < dim; d += panel_rows)
    sum = add_last_quadratic<panel_rows>(form, stride, d, dim, spreads, panel, sum);
  store(out, sanitise(half_of<0>(sum)));
  store(out + lanes, sanitise(half_of<1>(sum)));
}

}  // namespace KVKEEP_CPU_ISA
}  // namespace kvkeep::cpu
