// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// One layer's KV cache with run-time tags: what policies carry and backends open.
#pragma once

#include <cstddef>

#include "../core/tensor_ref.hpp"
#include "layout.hpp"

namespace kvkeep {

/// Reads an opaque row (say, a quantised block with its scales) into `dim` floats. Host only.
struct row_reader {
  void (*read)(void const* user, std::byte const* row, index_t dim, float* out) = nullptr;
  void const* user = nullptr;
};

/// K or V of one layer: `data + layout.offset(seq, head, slot) + features(d)`, in elements of `type`.
template <class Space = host_space>
struct plane_ref {
  std::byte* data = nullptr;
  dtype type = dtype::f32;
  index_t dim = 0;         ///< features per row, as seen by scoring and attention
  index_t row_bytes = 0;   ///< bytes of a row when its features are contiguous, or opaque
  feature_map features{};  ///< identity for opaque rows
  row_reader reader{};     ///< needed to score or attend over opaque rows
  any_layout layout{};

  KVKEEP_HD bool contiguous() const noexcept {
    return type == dtype::opaque || features.contiguous(dim);
  }
};

/// K and V of one layer over all sequence rows. Trivially copyable; owns nothing.
/// Elements are read as they are: the scale of FP8 keys belongs into `scale`, that of values is for the caller to
/// multiply attention's output with. New tokens are divided by them: `head_vectors::scale`.
/// Logit: `z = scale * (q . k)`, then `softcap * tanh(z / softcap)` if softcap > 0. A logit that is NaN
/// counts as -FLT_MAX and finite limits clamp infinities, so one bad row cannot poison the others.
template <class Space = host_space>
struct kv_ref {
  using space = Space;

  cache_shape shape{};
  plane_ref<Space> k{};
  plane_ref<Space> v{};
  float scale = 0;                     ///< softmax scale, usually 1/sqrt(dim_k)
  float softcap = 0;                   ///< 0: none
  float const* sink_logits = nullptr;  ///< [n_q_heads] logit that joins each normaliser, or null
};
static_assert(std::is_trivially_copyable_v<kv_ref<host_space>>);

/// Rows taking part in a call. Entry b uses cache row `row[b]` and state row `id[b]`; null means b.
/// Ids are distinct and in range, and so are rows. A `session` checks that. Where the arrays lie on a device nobody
/// does, but that a sequence which is twice in a batch has a fault when it is appended to: the entries of a recorded
/// step that are not in use need sequences (`begin`) and rows of their own.
template <class Space = host_space>
struct batch_ref {
  index_t n = 0;
  index_t const* row = nullptr;  ///< [n] sequence row of the view
  index_t const* id = nullptr;   ///< [n] row of the state (sequence id)

  KVKEEP_HD index_t row_of(index_t b) const noexcept { return row ? row[b] : b; }
  KVKEEP_HD index_t id_of(index_t b) const noexcept { return id ? id[b] : b; }
};

/// What follows the slots when they move. Indexed by sequence id, never by batch row.
template <class Space = host_space>
struct slot_state {
  tensor_ref<index_t, 2, Space> lengths{};    ///< [id, kv_head] slots in use
  tensor_ref<index_t, 3, Space> positions{};  ///< [id, kv_head, slot] original token positions
  tensor_ref<float, 4, Space> rows{};  ///< [id, kv_head, row, slot] the scorer's per-slot rows
};

/// One layer: cache and state.
template <class Space = host_space>
struct layer_ref {
  using space = Space;
  kv_ref<Space> kv{};
  slot_state<Space> slots{};
};

/// Scores `[entry, kv_head, slot]`, float, higher is kept.
template <class Space = host_space>
using score_map = tensor_ref<float, 3, Space>;

}  // namespace kvkeep
