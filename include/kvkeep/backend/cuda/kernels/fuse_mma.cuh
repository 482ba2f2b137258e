// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// MorphKV's scores by query rows, with matrix products of warps.
#pragma once

#include "strip_mma.cuh"

namespace kvkeep::cuda {

/// A lane fuses every fourth of a slot's rows (or four, or pairs of them), then the lanes of a quad are fused: an
/// order that no launch changes. Rows that are there see the same slots. Grid: heads, strips of `steps` times
/// `strip_keys` slots.
template <class T, int Blocks, bool Whole>
struct mma_fuse_kernel {
  using strip = mma_strip<T, Blocks, Whole>;
  using queries = typename strip::queries;
  using warp_keys = typename strip::warp_keys;
  static constexpr int most_threads = strip::most_threads, blocks_per_sm = strip::blocks_per_sm;
  static constexpr int n_keys = strip::n_keys;
  static constexpr index_t strip_keys = strip::keys, tile_turns = strip::tile_turns;
  window_job job;
  row_fusion fold;
  score_map<device_space> out;
  fuse_plan plan;
  index_t steps;

  static constexpr std::size_t bytes() { return strip::bytes(); }

  __device__ void operator()() const {
    shared_pieces shared;
    queries const tile(shared);
    typename strip::key_positions const positions(shared);
    window_head const h(job);
    if (key_pieces<T>(h).whole() != Whole) return;
    bool const any_row = row_fusion::any_row(h);
    index_t const tiles = any_row ? (plan.turns() + tile_turns - 1) / tile_turns : 0;
    for (index_t step = 0; step < steps; ++step) {
      index_t const first = (static_cast<index_t>(blockIdx.y) * steps + step) * strip_keys;
      if (first >= h.n) return;
      warp_keys const own(h, first, positions);
      float score[n_keys] = {}, top[n_keys] = {};
      for (index_t t = 0; t < tiles; ++t) {
        if (step == 0 || tiles > 1) {
          __syncthreads();
          tile.take(h, true, [&](index_t i) {
            return plan.query(t * tile_turns + i / turn_queries, i % turn_queries);
          });
          __syncthreads();
        }
        index_t const turns = own.first < h.n ? min(tile_turns, plan.turns() - t * tile_turns) : 0;
        for (index_t turn = 0; turn < turns; ++turn) {
          typename strip::products z;
          if (!strip::weigh(job.layer.kv, tile, turn, own, positions, z)) continue;
          bool const row_ends = (t * tile_turns + turn + 1) % plan.row_turns == 0;
          unrolled<n_keys>([&](int x) { add_turn(z, x, row_ends, top[x], score[x]); });
        }
      }
      write(h, own, positions, any_row, score);
    }
  }

 private:
  /// Weights are at least 0, so that nothing has no say.
  __device__ void add_turn(typename strip::products const& z, int x, bool row_ends, float& top,
                           float& score) const {
    float const a = strip::weight(z, x, 0), b = strip::weight(z, x, 1);
    float const c = strip::weight(z, x, 2), d = strip::weight(z, x, 3);
    if (plan.lane_rows == 1) {
      top = max(top, max(max(a, b), max(c, d)));
      if (!row_ends) return;
      score = fold(score, top);
      top = 0;
    } else if (plan.lane_rows == 2) {
      score = fold(fold(score, max(a, b)), max(c, d));
    } else {
      score = fold(fold(fold(fold(score, a), b), c), d);
    }
  }
  __device__ void write(window_head const& h, warp_keys const& own,
                        typename strip::key_positions const& positions, bool any_row,
                        float (&score)[n_keys]) const {
    index_t const last_old = job.limit[blockIdx.x];
    unrolled<n_keys>([&](int x) {
      for (int step = 1; step < 4; step *= 2)
        score[x] = fold(score[x], __shfl_xor_sync(all_lanes, score[x], step));
      if (lane_of_warp() % 4 == 0 && own.slot(x) < h.n)
        out(h.at.entry, h.at.head, own.slot(x)) = row_fusion::ranked(
            positions.of_warp()[warp_keys::number(x)], last_old, any_row, score[x]);
    });
  }
};

}  // namespace kvkeep::cuda
