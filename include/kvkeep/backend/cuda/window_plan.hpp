// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// How scoring by query rows is cut into launches and blocks. Plain host code. Nothing here shows in a
/// result: sums of rows come from slices of a fixed size, and those of a slot from all rows in order.
#pragma once

#include "plan.hpp"

namespace kvkeep::cuda {

/// Slots whose share of a row's normaliser one block computes. Less where rows are fused, which decode steps do
/// over some thousand slots. To be measured.
inline constexpr index_t slice_slots = 1024, fused_slice_slots = 256;
/// Packed queries (rows times query heads of a group) of one launch: bounds the scratch.
inline constexpr index_t launch_queries = 1024;
/// Packed queries whose terms a warp adds to its slots at a time.
inline constexpr index_t turn_queries = 16;

/// Whether the units of this program hold code for sm_90a, in place of sm_90: the build says so.
#if !defined(KVKEEP_CUDA_SM90A)
#define KVKEEP_CUDA_SM90A 0
#endif
inline constexpr bool has_sm90a_code = KVKEEP_CUDA_SM90A != 0;

/// Whether warpgroups multiply 16-bit keys, or warps do. By the device and the keys' size alone: the two round
/// differently, so rows, heads and layouts have no say. Nobody has run or timed warpgroups on a device yet.
constexpr bool warpgroups_multiply(int capability, index_t dim,
                                   bool has_code = has_sm90a_code) noexcept {
  return has_code && capability == 90 && dim <= 128;
}

/// Sizes that a scoring op is planned from.
struct window_sizes {
  index_t n_entries = 0;
  index_t n_heads = 0;  ///< KV heads
  index_t group = 1;
  index_t n_rows = 0;
  index_t max_slots = 0;
  index_t slice = slice_slots;  ///< slots of a slice

  constexpr offset_t heads() const noexcept { return static_cast<offset_t>(n_entries) * n_heads; }
  constexpr offset_t slices() const noexcept { return ceil_div(max_slots, slice); }
};

/// Rows that one launch takes.
constexpr index_t rows_at_once(window_sizes const& s) noexcept {
  index_t const most = s.group < launch_queries ? launch_queries / s.group : 1;
  return s.n_rows < most ? s.n_rows : most;
}

/// A block per head, slice and `queries` packed queries.
constexpr grid slice_grid(window_sizes const& s, index_t n_rows, index_t queries,
                          int threads) noexcept {
  offset_t const tiles = ceil_div(static_cast<offset_t>(n_rows) * s.group, queries);
  return head_grid(s.n_entries, s.n_heads, s.slices() * tiles, threads);
}

/// A block per head and `slots` slots.
constexpr grid strip_grid(window_sizes const& s, index_t slots, int threads) noexcept {
  return head_grid(s.n_entries, s.n_heads, ceil_div(s.max_slots, slots), threads);
}

/// Steps of `slots` slots that one block takes: more than one where all its queries stay in place, and
/// where that leaves some blocks to each of the device's multiprocessors.
constexpr offset_t strip_steps(window_sizes const& s, index_t slots, bool queries_stay,
                               int n_sm) noexcept {
  constexpr offset_t most = 16, blocks_per_sm = 8;
  if (!queries_stay) return 1;
  offset_t const each = s.heads() * ceil_div(s.max_slots, slots) / (blocks_per_sm * n_sm);
  return each < 1 ? 1 : each < most ? each : most;
}

/// How the queries of a head follow each other where a quad of lanes adds them up: a few chains side by
/// side, each over rows in order, in `sets` one after another. Chains are 1, 2 or 4: shifts, no divisions.
struct chain_plan {
  index_t shift = 0;  ///< log2 of the chains
  index_t sets = 1;
  index_t length = 0;  ///< terms of a chain

  constexpr chain_plan(index_t n_rows, index_t group, bool per_query_head) noexcept {
    if (per_query_head) {
      shift = group % 4 == 0 ? 2 : group % 2 == 0 ? 1 : 0;
      sets = group >> shift;
    }
    length = per_query_head ? n_rows : n_rows * group;
  }
  /// Turns of 16 queries that one set takes.
  KVKEEP_HD constexpr index_t turns() const noexcept {
    return static_cast<index_t>(ceil_div(static_cast<offset_t>(length) << shift, turn_queries));
  }
};

/// How the queries of a head follow each other where rows are fused: a lane of a quad has whole rows, so that the
/// maximum over a group is its own affair. Groups of 3 and of more than 4 query heads leave places empty.
struct fuse_plan {
  index_t n_rows = 0;
  index_t group = 1;
  index_t lane_rows = 1;  ///< rows of a lane, one after another in its four places
  index_t row_turns = 1;  ///< turns that they take

  constexpr fuse_plan(index_t rows, index_t query_heads) noexcept
      : n_rows(rows),
        group(query_heads),
        lane_rows(query_heads <= 1   ? 4
                  : query_heads <= 2 ? 2
                                     : 1),
        row_turns(static_cast<index_t>(ceil_div(query_heads, 4))) {}

  KVKEEP_HD constexpr index_t turns() const noexcept {
    return static_cast<index_t>(ceil_div(n_rows, 4 * lane_rows)) * row_turns;
  }
  /// Number of the query at place `i` of a turn, four places to a lane; -1: none.
  KVKEEP_HD constexpr index_t query(index_t turn, index_t i) const noexcept {
    index_t const each = 4 / lane_rows, place = i % 4;
    index_t const row = (turn / row_turns * 4 + i / 4) * lane_rows + place / each;
    index_t const g = turn % row_turns * 4 + place % each;
    return row < n_rows && g < group ? row * group + g : -1;
  }
};

}  // namespace kvkeep::cuda
