// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// What slots receive from query rows, with matrix products of warps.
#pragma once

#include "strip_mma.cuh"

namespace kvkeep::cuda {

/// Adds to slots what they receive from all rows. Grid: heads, strips of `steps` times `strip_keys` slots.
template <class T, int Blocks, bool Whole>
struct mma_sums_kernel {
  using strip = mma_strip<T, Blocks, Whole>;
  using queries = typename strip::queries;
  using warp_keys = typename strip::warp_keys;
  static constexpr int most_threads = strip::most_threads, blocks_per_sm = strip::blocks_per_sm;
  static constexpr int n_keys = strip::n_keys;
  static constexpr index_t strip_keys = strip::keys, tile_turns = strip::tile_turns;
  window_job job;
  tensor_ref<float, 4, device_space> out;
  bool out_by_id, per_query_head, clear;
  chain_plan plan;
  index_t steps;

  static constexpr std::size_t bytes() { return strip::bytes(); }

  __device__ void operator()() const {
    shared_pieces shared;
    queries const tile(shared);
    typename strip::key_positions const positions(shared);
    window_head const h(job);
    if (key_pieces<T>(h).whole() != Whole) return;
    index_t const tiles_of_set = (plan.turns() + tile_turns - 1) / tile_turns;
    for (index_t step = 0; step < steps; ++step) {
      index_t const first = (static_cast<index_t>(blockIdx.y) * steps + step) * strip_keys;
      if (first >= h.n) return;
      warp_keys const own(h, first, positions);
      for (index_t set = 0; set < plan.sets; ++set) {
        float sum[n_keys];
        move_sums(h, own, set, sum, false);
        for (index_t t = 0; t < tiles_of_set; ++t) {
          if (step == 0 || plan.sets * tiles_of_set > 1) {
            __syncthreads();
            take(h, tile, set, t);
            __syncthreads();
          }
          index_t const turns =
              own.first < h.n ? min(tile_turns, plan.turns() - t * tile_turns) : 0;
          for (index_t turn = 0; turn < turns; ++turn) {
            typename strip::products z;
            if (strip::weigh(job.layer.kv, tile, turn, own, positions, z)) add_terms(z, sum);
          }
        }
        move_sums(h, own, set, sum, true);
      }
    }
  }

 private:
  /// Lanes of a quad that share a chain, as a power of two.
  __device__ index_t lane_shift() const { return 2 - plan.shift; }

  __device__ void take(window_head const& h, queries const& tile, index_t set, index_t t) const {
    index_t const shift = 2 + lane_shift(), each = 1 << shift;  // a turn's queries of one chain
    tile.take(h, true, [&](index_t i) {
      index_t const x = ((t * tile_turns + i / turn_queries) << shift) + (i & (each - 1));
      if (x >= plan.length) return index_t{-1};
      return per_query_head ? x * h.group + (set << plan.shift) + (i % turn_queries >> shift) : x;
    });
  }

  /// Reads or writes the sums of this lane's chain; of the lanes that share it the first one writes.
  __device__ void move_sums(window_head const& h, warp_keys const& own, index_t set,
                            float (&sum)[n_keys], bool write) const {
    index_t const q = lane_of_warp() % 4;
    float* const row = out.at(out_by_id ? h.id : h.at.entry, h.at.head,
                              (set << plan.shift) + (q >> lane_shift()), 0);
    unrolled<n_keys>([&](int x) {
      bool const live = own.slot(x) < h.n;
      if (write && live && (q & ((1 << lane_shift()) - 1)) == 0) row[own.slot(x)] = sum[x];
      if (!write) sum[x] = live && !clear ? row[own.slot(x)] : 0.0f;
    });
  }

  /// Adds a turn's terms to the chains, of which each lane has four in a row.
  __device__ void add_terms(typename strip::products const& z, float (&sum)[n_keys]) const {
    for (index_t phase = 0; phase < 1 << lane_shift(); ++phase)
      unrolled<n_keys>([&](int x) {
        float s = sum[x];
        unrolled<4>([&](int i) { s = __fadd_rn(s, strip::weight(z, x, i)); });
        sum[x] = plan.shift == 2 ? s : pass_on(s, phase);
      });
  }
  /// The sum of the lane whose turn it was.
  __device__ float pass_on(float s, index_t phase) const {
    return __shfl_sync(all_lanes, s, (lane_of_warp() >> lane_shift() << lane_shift()) + phase);
  }
};

}  // namespace kvkeep::cuda
