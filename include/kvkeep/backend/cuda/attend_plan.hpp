// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// How attention is cut up: splits of a head's slots, tiles of its query heads, scratch. Plain host code.
#pragma once

#include "../../core/types.hpp"
#include "../../core/workspace.hpp"
#include "plan.hpp"

namespace kvkeep::cuda {

/// Slots of a split. A constant, so that sums have the same order whatever the batch and the capacity.
inline constexpr index_t split_slots = 256;
inline constexpr int split_threads = 128;
/// Query heads that share a block's reads of K and V. More than that read them again, through the L2.
inline constexpr index_t most_tile_heads = 8;
/// Parts of the merge of a row's splits: part s takes splits s, s + 8, ...
inline constexpr index_t merge_parts = 8;

/// Slots of a head up to which one block merges its splits and makes its weights, rather than as many as
/// there are for; and however many, where there is such a block for every multiprocessor. To be measured.
inline constexpr index_t one_block_slots = 8192;

/// Slots of a head up to which the block of a row's last split merges them all, where tickets are given, and up to
/// which it makes their weights too: a launch less, but few threads. A capacity of 4096 or 1024, and then the newest
/// token's split. To be measured.
inline constexpr index_t last_merges_slots = 4096 + split_slots;
inline constexpr index_t last_weighs_slots = 1024 + split_slots;

/// Query heads that a block has registers for, of which a group may leave some unused.
KVKEEP_HD constexpr index_t tile_heads(index_t group) noexcept {
  return group <= 1 ? 1 : group <= 4 ? 4 : most_tile_heads;
}

/// Lanes that share a slot's row.
KVKEEP_HD constexpr index_t row_lanes(index_t dim) noexcept {
  return dim <= 64 ? 8 : dim <= 128 ? 16 : 32;
}

/// Blocks and scratch for `n_rows` query rows per entry and query head.
struct attend_plan {
  index_t n_entries = 0, n_heads = 0, n_q_heads = 0, n_rows = 1;
  index_t splits = 0;  ///< most per row
  index_t blocks = 0;  ///< that share them
  index_t usual = 0;   ///< slots of a head, where not more than expected
  index_t tile = 1;    ///< query heads of a block
  index_t tiles = 1;   ///< blocks that share a KV head's query heads

  /// @param usual_slots  0: as many as there may be
  constexpr attend_plan(cache_shape const& s, index_t entries, index_t rows,
                        index_t usual_slots = 0) noexcept
      : n_entries(entries), n_heads(s.n_kv_heads), n_q_heads(s.n_q_heads), n_rows(rows) {
    usual = usual_slots > 0 && usual_slots < s.max_slots ? usual_slots : s.max_slots;
    splits = static_cast<index_t>(ceil_div(s.max_slots, split_slots));
    blocks = static_cast<index_t>(ceil_div(usual, split_slots));
    tile = tile_heads(s.group());
    tiles = static_cast<index_t>(ceil_div(s.group(), tile));
  }

  /// Query rows of all entries and query heads.
  constexpr std::size_t rows() const noexcept { return product(n_entries, n_q_heads, n_rows); }
  /// Splits of all of them.
  constexpr std::size_t pieces() const noexcept { return rows() * product(splits); }

  /// x: entry, KV head, row, tile (the fastest, for they read the same keys); y: splits y, y + blocks, ..
  constexpr grid split_grid() const noexcept {
    return {static_cast<offset_t>(product(n_entries, n_heads, n_rows, tiles)), blocks,
            split_threads};
  }
  /// Whether the block of a row's last split shall merge them,
  constexpr bool last_merges() const noexcept { return n_rows == 1 && usual <= last_merges_slots; }
  /// and make weights, for which it needs the sums of a whole group.
  constexpr bool last_weighs() const noexcept {
    return last_merges() && usual <= last_weighs_slots && tiles == 1;
  }
  /// Whether a block per KV head shall do what follows the splits.
  constexpr bool one_block_merges(int n_sm) const noexcept {
    return usual <= one_block_slots ||
           product(n_entries, n_heads) >= static_cast<std::size_t>(n_sm);
  }
  /// x: entry, query head, row. A warp for each part of the merge, as far as there are splits.
  constexpr grid merge_grid() const noexcept {
    int warps = 1;
    while (warps < merge_parts && warps < splits) warps *= 2;
    return {static_cast<offset_t>(rows()), 1, 32 * warps};
  }
  /// x: entry, KV head, row; y: strides of slots.
  constexpr grid weights_grid(index_t slots, int threads) const noexcept {
    return {static_cast<offset_t>(product(n_entries, n_heads, n_rows)), ceil_div(slots, threads),
            threads};
  }
};

}  // namespace kvkeep::cuda
