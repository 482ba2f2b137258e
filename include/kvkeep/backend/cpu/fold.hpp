// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CPU: one token's attention weights folded into per-slot rows, for attention and op::accumulate.
#pragma once

#include "../../op/common.hpp"
#include "context.hpp"
#include "simd.hpp"

namespace kvkeep::cpu {
inline namespace KVKEEP_CPU_ISA {

/// Unnormalised weights of some query heads: term = factor * sum over rows of e[row] *
/// inverse[row].
struct weight_rows {
  float const* e = nullptr;  ///< [n_rows] rows of n slots
  offset_t stride = 0;
  float const* inverse = nullptr;  ///< [n_rows]
  index_t n_rows = 0;
  float factor = 1;
};

/// Term of eight slots from `j` on, or of the `width` there are.
inline vf folded_term(weight_rows const& w, index_t j, index_t width) noexcept {
  vf sum = load_some(w.e + j, width) * splat(w.inverse[0]);
  for (index_t g = 1; g < w.n_rows; ++g)
    sum = fma(load_some(w.e + g * w.stride + j, width), splat(w.inverse[g]), sum);
  return sum * splat(w.factor);
}

/// out[j] = (add ? out[j] : 0) + term[j].
inline void fold_weights(weight_rows const& w, index_t n, bool add, float* out) noexcept {
  index_t j = 0;
  for (; j + lanes <= n; j += lanes) {
    vf const term = folded_term(w, j, lanes);
    store(out + j, add ? load(out + j) + term : term);
  }
  if (j == n) return;
  vf const term = folded_term(w, j, n - j);
  store_part(out + j, add ? load_part(out + j, n - j) + term : term, n - j);
}

/// Factor that turns weights into probabilities.
inline float inverse_of(float sum) noexcept { return sum > 0 ? 1.0F / sum : 0.0F; }

/// Folds one head's weights. @param w all query heads of the group, `factor` unused
/// @param at row of `fold.out`: entry or id
inline void fold_head(weight_fold<host_space> const& fold, weight_rows const& w, index_t at,
                      index_t id, index_t h, index_t n) noexcept {
  index_t const fresh = fold.fresh_slot.data != nullptr ? fold.fresh_slot(id, h) : -1;
  index_t const rows = fold.per_query_head ? w.n_rows : 1;
  for (index_t r = 0; r < rows; ++r) {
    float* const out = fold.out.at(at, h, r, 0);
    if (fresh >= 0 && fresh < n) out[fresh] = 0;
    weight_rows const own{w.e + r * w.stride, w.stride, w.inverse + r,
                          fold.per_query_head ? 1 : w.n_rows, fold.scale};
    fold_weights(own, n, !fold.clear, out);
  }
}

}  // namespace KVKEEP_CPU_ISA
}  // namespace kvkeep::cpu
