// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// MorphKV's exact victim without reading every row: bounds per slot, exact scores for the few in doubt.
#pragma once

#include "backend.hpp"
#include "common.hpp"

namespace kvkeep {

/// Extents of the state of the lazy evaluation.
/// Per slot: a code per row (`max over g of E[g, r] / Zref[g, r]` rounded down to 8 bits of exponent and 8
/// of mantissa) and a prepared lower bound for each of the next `ahead` steps, two of either in a word.
/// Per KV head: of every row and query head the sum over the old slots (double), its peak, the reference
/// sum, the row's maximum, and the weights at the W newest positions, which will age into the old ones.
struct lazy_shape {
  static constexpr index_t ahead = 8;  ///< steps that a slot's bounds last; at most W
  /// R: more fp32 terms than that outgrow the bounds' slack.
  static constexpr index_t most_rows = 200;
  static constexpr index_t tile = 64;  ///< slots whose bounds are prepared together

  index_t group = 0;
  index_t n_rows = 0;  ///< R, at most W and most_rows
  index_t window = 0;  ///< W

  /// Whether the weights of a row with this sum can be divided by it; where not, the direct form decides.
  /// Weights saturate at e^88.37 = 2.4e38, so a much larger sum may stand for any number. Nor may fp32
  /// overflow or underflow.
  KVKEEP_HD static constexpr bool divides(double sum) noexcept {
    return sum >= 1e-30 && sum <= 1e30;
  }

  KVKEEP_HD constexpr index_t padded_rows() const noexcept { return (n_rows + 7) / 8 * 8; }
  KVKEEP_HD constexpr index_t all_rows() const noexcept { return group * padded_rows(); }
  KVKEEP_HD constexpr index_t code_words() const noexcept { return (n_rows + 1) / 2; }
  /// Floats per slot: 2 R + 2 * ahead bytes.
  KVKEEP_HD constexpr index_t slot_rows() const noexcept { return code_words() + ahead / 2; }
  /// Floats per KV head: 4 G R (W + 5) bytes.
  KVKEEP_HD constexpr index_t head_floats() const noexcept {
    return all_rows() * (window + 5) + 16;
  }
};

/// The lazy evaluation's view of one layer. Positions of rows and columns are those of tokens; row p
/// lies at index `p % n_rows`, column p at `p % window`.
template <class Space = host_space>
struct lazy_state {
  lazy_shape shape{};
  index_t const* seen = nullptr;               ///< [id] tokens seen, the newest included; slots of
                                               ///< later ones (drafts) are neither old nor recent
  index_t const* from = nullptr;               ///< [id] oldest position in ring_q
  tensor_ref<float const, 4, Space> ring_q{};  ///< [id, q_head, position % ring, dim_k]
  /// [id, kv_head, slot_rows, slot], with room for a multiple of eight slots in every row.
  tensor_ref<float, 4, Space> rows{};
  tensor_ref<float, 3, Space> head{};  ///< [id, kv_head, head_floats]
};

namespace op {

/// Takes the newest token's attention weights into the state: its row enters, the column that leaves the
/// window joins the sums of the older rows, an eighth of the slots gets new bounds. Where the slots are
/// not those that the state stands for (after a cut, say), all of it is made anew from keys and queries.
/// A head with no more slots in use than `keep` lets nothing go and takes no row: its state stands for no
/// slots until it lets some go. A row that has entered does not enter again.
/// Bytes: 4 * group + 12 + 2 n_rows / 8 per slot, 4 group * n_rows * 10 per head. Operations: 2 * group +
/// 2 n_rows per slot. Anew: K once per row, 2 * dim_k * group * n_rows operations per slot.
template <class Space = host_space>
struct lazy_enter {
  using space = Space;
  batch_ref<Space> batch{};
  layer_ref<Space> layer{};
  lazy_state<Space> state{};
  tensor_ref<float const, 4, Space> weights{};  ///< [id, kv_head, g, slot] exp(z - max), ring row 0
  tensor_ref<float const, 4, Space> weight_max{};  ///< [id, kv_head, g, ring row] the maximum
  index_t const* ring_row = nullptr;               ///< [entry]; null: row 0
  offset_t ring_stride = 0;
  tensor_ref<index_t const, 2, Space> keep{};  ///< [id, kv_head], or null: every head takes its row
  reduction fuse = reduction::max;             ///< sum or max
  bool anew = false;                           ///< the newest token has no weights yet
};

/// The slot that ranks last by MorphKV's canonical score (op::ring_score gives the same up to rounding of
/// the sums), per entry and KV head; -1 when all are protected, or no more than `keep` slots are in use.
/// Positions below `frozen[id]` stay. The victim's weights leave the sums: it has to go.
/// Where bounds do not separate the slots (equal keys), or scores leave the range of fp32, the direct form
/// decides. Bytes: about 16 per slot and the query ring; the direct form: K twice.
template <class Space = host_space>
struct lazy_victim {
  using space = Space;
  batch_ref<Space> batch{};
  layer_ref<Space> layer{};
  lazy_state<Space> state{};
  index_t const* frozen = nullptr;             ///< [id] or null
  tensor_ref<index_t const, 2, Space> keep{};  ///< [id, kv_head], or null: one leaves everywhere
  reduction fuse = reduction::max;             ///< sum or max
  tensor_ref<index_t, 2, Space> victim{};      ///< [id, kv_head] slot
};

}  // namespace op
}  // namespace kvkeep
