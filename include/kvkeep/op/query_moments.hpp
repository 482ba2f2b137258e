// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Mean and covariance of query rows, and the logits that a key can expect of such queries.
#pragma once

#include "backend.hpp"
#include "common.hpp"

namespace kvkeep {
inline namespace KVKEEP_CPU_ISA {  // of the CPU backend's code

/// Features of a row that a rotary embedding turns in pairs: the first `dims`.
struct turned_pairs {
  index_t dims = 0;
  bool interleaved = false;  ///< pair i is features 2i and 2i + 1, not i and i + dims / 2

  KVKEEP_HD index_t pairs() const noexcept { return dims / 2; }
  KVKEEP_HD index_t pair_of(index_t d) const noexcept {
    return interleaved ? d / 2 : d < dims / 2 ? d : d - dims / 2;
  }
  /// Whether feature d is its pair's first one.
  KVKEEP_HD bool first(index_t d) const noexcept { return interleaved ? d % 2 == 0 : d < dims / 2; }
  KVKEEP_HD index_t partner(index_t d) const noexcept {
    index_t const step = interleaved ? 1 : dims / 2;
    return first(d) ? d + step : d - step;
  }
};

/// What one KV head has gathered of its group's queries: how many there were, their mean and the sum of
/// products of what they deviate from it by, of which feature d's row says what it is for features up to d; query head
/// after query head.
struct moment_layout {
  index_t group = 1;
  index_t dim = 0;
  bool spreads = true;  ///< not the mean alone

  KVKEEP_HD index_t floats() const noexcept {
    return 1 + group * dim + (spreads ? group * dim * dim : 0);
  }
  KVKEEP_HD float* mean(float* head, index_t g) const noexcept { return head + 1 + g * dim; }
  /// Feature d's row.
  KVKEEP_HD float* spread(float* head, index_t g, index_t d) const noexcept {
    return head + 1 + group * dim + (static_cast<offset_t>(g) * dim + d) * dim;
  }
};

}  // namespace KVKEEP_CPU_ISA

namespace op {

/// Adds query rows to moments. An entry whose first row is of position 0 begins anew, whatever is there.
/// All KV heads of a sequence have gathered the same number of rows. Every sum has one order, which depends on the rows
/// of the call and on the backend alone.
/// Bytes: the rows once (CUDA: written to scratch besides, and read from there dim_k / 64 times), per query head the
/// moments read and written (CPU: once per 64 rows). Operations: dim_k^2 / 2 multiplications with additions per row and
/// query head.
template <class Space = host_space>
struct query_moments {
  using space = Space;
  batch_ref<Space> batch{};
  query_rows<Space> rows{};  ///< by entry, in the order of their positions; features side by side
  index_t first = 0;         ///< rows of positions below do not count
  moment_layout layout{};
  turned_pairs pairs{};
  /// [entry, row, 2, pair] cosines and sines that the rows' pairs were turned by, which is undone; null: by none
  tensor_ref<float const, 4, Space> turns{};
  tensor_ref<float, 3, Space> to{};  ///< [id, kv_head, layout.floats()]
};

/// out[entry, q_head, slot] = sum over d of key[d] * (form[d, 0] + sum over e <= d of form[d, 1 + e] * key[e]), clamped
/// as any logit, NaN too: a symmetric quadratic form has each pair of features once. A slot whose position is below
/// `first` gets -infinity. Softcap and scale of the view are of no account.
/// Bytes: K once, the forms once per 16 slots (CUDA: 64) from a cache, 4 per slot and query head. Operations: dim_k^2 /
/// 2 multiplications with additions per slot and query head.
template <class Space = host_space>
struct quadratic_logits {
  using space = Space;
  batch_ref<Space> batch{};
  layer_ref<Space> layer{};
  index_t first = 0;
  bool spreads = true;  ///< else only form[d, 0] counts
  /// [entry, q_head, feature, 1 + dim_k or more], 0 above the diagonal; the last extent is contiguous
  tensor_ref<float const, 4, Space> form{};
  tensor_ref<float, 3, Space> out{};  ///< [entry, q_head, slot]
};

}  // namespace op
}  // namespace kvkeep
