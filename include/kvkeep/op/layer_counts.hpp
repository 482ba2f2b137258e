// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Joint top-k over several score rows: how many of the best entries fall into each row.
#pragma once

#include "backend.hpp"
#include "common.hpp"

namespace kvkeep::op {

/// For every entry: of all candidates of `n_maps` score maps (layers; protected slots excluded), count
/// the members of the global top `best_per_head * n_kv_heads * n_maps` per (map, KV head). Ties: lower
/// map, lower head, lower position first. `best_per_head` is per map and head (spec 5.2, 5.3).
/// With `normalize` (one map) a head's scores are first scaled by (sum of its best `best_per_head`
/// scores) / (sum of all its scores). With `safe > 0` each head's best `safe` candidates count first.
/// Bytes: 4 per score, a few times.
template <class Space = host_space>
struct layer_counts {
  using space = Space;
  batch_ref<Space> batch{};
  index_t n_maps = 0;
  /// [map, entry, kv_head, slot]; in slot order, which is position order at the end of a prompt
  tensor_ref<float const, 4, Space> scores{};
  /// [entry, kv_head] leading slots that compete.
  tensor_ref<index_t const, 2, Space> candidates{};
  index_t skip = 0;  ///< slots at the front that do not (sinks)
  index_t best_per_head = 0;
  bool normalize = false;
  index_t safe = 0;
  tensor_ref<index_t, 3, Space> out{};  ///< [map, entry, kv_head]
};

}  // namespace kvkeep::op
