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

/// R rows against one panel: R * 2 accumulators, one per eight outputs, features in ascending
/// order.
template <int R>
inline void qk_rows_of_panel(query_rows const& q, index_t first, float const* panel, float* out,
                             offset_t stride) noexcept {
  float const* row[R];
  vf acc[R][2];
  KVKEEP_CPU_UNROLL
  for (int r = 0; r < R; ++r) {
    row[r] = q.q + (first + r) * q.stride;
    acc[r][0] = splat(0.0f);
    acc[r][1] = splat(0.0f);
  }
  for (index_t d = 0; d < q.dim; ++d, panel += panel_keys) {
    vf const k0 = load(panel), k1 = load(panel + lanes);
    KVKEEP_CPU_UNROLL
    for (int r = 0; r < R; ++r) {
      vf const x = splat(row[r][d]);
      acc[r][0] = fma(x, k0, acc[r][0]);
      acc[r][1] = fma(x, k1, acc[r][1]);
    }
  }
  KVKEEP_CPU_UNROLL
  for (int r = 0; r < R; ++r) {
    store(out + r * stride, finish_logit(acc[r][0], q.form));
    store(out + r * stride + lanes, finish_logit(acc[r][1], q.form));
  }
}

/// Logits of all query rows against the 16 keys of a panel; missing keys give the logit of 0.
/// Every output is one sum over ascending features: how the rows are grouped does not show.
/// @param out [q.n_rows][16] floats with `stride` floats between rows, host
/// Cost: 32 * n_rows * dim flops; q is read once, the panel once per six rows (first-level cache).
inline void qk_panel(query_rows const& q, float const* panel, float* out,
                     offset_t stride = panel_keys) noexcept {
  index_t r = 0;
  for (; r + 6 <= q.n_rows; r += 6) qk_rows_of_panel<6>(q, r, panel, out + r * stride, stride);
  float* const rest = out + r * stride;
  switch (q.n_rows - r) {
    case 5:
      return qk_rows_of_panel<5>(q, r, panel, rest, stride);
    case 4:
      return qk_rows_of_panel<4>(q, r, panel, rest, stride);
    case 3:
      return qk_rows_of_panel<3>(q, r, panel, rest, stride);
    case 2:
      return qk_rows_of_panel<2>(q, r, panel, rest, stride);
    case 1:
      return qk_rows_of_panel<1>(q, r, panel, rest, stride);
    default:
      return;
  }
}

}  // namespace KVKEEP_CPU_ISA
}  // namespace kvkeep::cpu
