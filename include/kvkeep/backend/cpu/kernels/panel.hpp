// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Query rows against 16 keys at a time. The keys are converted and transposed once into a float
/// panel that stays in the first-level cache while all query rows pass over it.
#pragma once

#include "math.hpp"

namespace kvkeep::cpu {
inline namespace KVKEEP_CPU_ISA {

inline constexpr index_t panel_keys = 16;  ///< keys of a panel

/// Floats of a panel for `dim` features.
constexpr std::size_t panel_floats(index_t dim) noexcept {
  return static_cast<std::size_t>(dim) * static_cast<std::size_t>(panel_keys);
}

/// Columns 8*half .. 8*half+7 of a panel: up to 8 key rows transposed, zeros where there is no key.
template <class T>
inline void pack_half_panel(T const* const* rows, index_t n, index_t dim, float* panel) noexcept {
  for (index_t d = 0; d < dim; d += lanes) {
    index_t const width = dim - d < lanes ? dim - d : lanes;
    vf r[8];
    if (n >= lanes && width == lanes) {
      KVKEEP_CPU_UNROLL
      for (int i = 0; i < 8; ++i) r[i] = load(rows[i] + d);
    } else {
      for (int i = 0; i < 8; ++i) r[i] = i < n ? load_some(rows[i] + d, width) : splat(0.0f);
    }
    transpose8(r);
    float* const out = panel + static_cast<offset_t>(d) * panel_keys;
    if (width == lanes) {
      KVKEEP_CPU_UNROLL
      for (int i = 0; i < 8; ++i) store(out + i * panel_keys, r[i]);
    } else {
      for (int i = 0; i < width; ++i) store(out + i * panel_keys, r[i]);
    }
  }
}

/// Converts and transposes key rows into a panel.
/// @param rows [n] pointers to key rows of `dim` contiguous features, host
/// @param n keys, 0 to 16; missing keys become zeros
/// @param panel [dim][16] floats, host, best aligned to 64 bytes
/// Cost: n * dim elements read, 64 * dim bytes written.
template <class T>
inline void pack_panel(T const* const* rows, index_t n, index_t dim, float* panel) noexcept {
  pack_half_panel(rows, n < lanes ? n : lanes, dim, panel);
  if (n > lanes)
    pack_half_panel(rows + lanes, n - lanes, dim, panel + lanes);
  else
    pack_half_panel(rows, 0, dim, panel + lanes);
}

/// Query rows, converted to float.
struct query_rows {
  float const* q = nullptr;  ///< [n_rows][dim], host
  offset_t stride = 0;       ///< floats between rows
  index_t n_rows = 0;
  index_t dim = 0;
  logit_form form = {};  ///< applied to every dot product
};

/// Rows that pass over a panel together: as many sums as there are registers for.
inline constexpr int panel_rows = KVKEEP_CPU_AVX512 ? 12 : 6;

/// acc[r] = row r by a panel: a sum per output, features in ascending order.
/// @param q  [R][stride], host, of `dim` features
template <int R>
inline void rows_by_panel(float const* q, offset_t stride, index_t dim, float const* panel,
                          wf (&acc)[R]) noexcept {
  // Four rows share an address: one each would not leave registers for anything else.
  constexpr int each = 4, shared = (R + each - 1) / each;
  float const* row[shared];
  KVKEEP_CPU_UNROLL
  for (int i = 0; i < shared; ++i) row[i] = q + i * each * stride;
  KVKEEP_CPU_UNROLL
  for (int r = 0; r < R; ++r) acc[r] = splat_wide(0.0f);
  offset_t const apart[each] = {0, stride, 2 * stride, 3 * stride};
  for (index_t d = 0; d < dim; ++d, panel += panel_keys) {
    wf const k = load_wide(panel);
    KVKEEP_CPU_UNROLL
    for (int r = 0; r < R; ++r) acc[r] = fma(splat_wide(row[r / each][apart[r % each]]), k, acc[r]);
    KVKEEP_CPU_UNROLL
    for (int i = 0; i < shared; ++i) ++row[i];
  }
}

/// Logits of R rows against one panel.
template <int R>
inline void qk_rows_of_panel(query_rows const& q, index_t first, float const* panel, float* out,
                             offset_t stride) noexcept {
  wf acc[R];
  rows_by_panel<R>(q.q + first * q.stride, q.stride, q.dim, panel, acc);
  KVKEEP_CPU_UNROLL
  for (int r = 0; r < R; ++r) {
    store(out + r * stride, finish_logit(half_of<0>(acc[r]), q.form));
    store(out + r * stride + lanes, finish_logit(half_of<1>(acc[r]), q.form));
  }
}

/// The last rows from `first` on, at most R.
template <int R>
inline void qk_last_rows(query_rows const& q, index_t first, float const* panel, float* out,
                         offset_t stride) noexcept {
  if constexpr (R > 0) {
    if (q.n_rows - first == R)
      qk_rows_of_panel<R>(q, first, panel, out + first * stride, stride);
    else
      qk_last_rows<R - 1>(q, first, panel, out, stride);
  }
}

/// Logits of all query rows against the 16 keys of a panel; missing keys give the logit of 0.
/// Every output is one sum over ascending features: how the rows are grouped does not show.
/// @param out [q.n_rows][16] floats with `stride` floats between rows, host
/// Cost: 32 * n_rows * dim flops; q is read once, the panel once per six rows (AVX-512: twelve) from the
/// first-level cache.
inline void qk_panel(query_rows const& q, float const* panel, float* out,
                     offset_t stride = panel_keys) noexcept {
  index_t r = 0;
  for (; r + panel_rows <= q.n_rows; r += panel_rows)
    qk_rows_of_panel<panel_rows>(q, r, panel, out + r * stride, stride);
  qk_last_rows<panel_rows - 1>(q, r, panel, out, stride);
}

}  // namespace KVKEEP_CPU_ISA
}  // namespace kvkeep::cpu
