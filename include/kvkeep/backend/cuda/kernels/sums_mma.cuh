// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// What slots receive from query rows, with matrix products for 16-bit keys of up to 256 features. A warp
/// holds keys in registers and lets the queries pass, so that a slot's terms are added in order.
#pragma once

#include "fragments.cuh"

namespace kvkeep::cuda {

/// Adds to slots what they receive from all rows. Grid: heads, strips of `steps` times `keys` slots.
template <class T, int Blocks>
struct mma_sums_kernel {
  using tiles = mma_tiles<Blocks>;
  static constexpr int most_threads = tiles::warps * 32, blocks_per_sm = 2;
  static constexpr int n_tiles = tiles::key_tiles;
  window_job job;
  tensor_ref<float, 4, device_space> out;
  bool out_by_id, per_query_head, clear;
  chain_plan plan;
  index_t steps;

  /// The keys of a warp, 16 to a tile: this lane's are r and r + 8 of each, with r = lane / 4.
  struct warp_keys {
    index_t first;
    index_t position[n_tiles * 2];
    index_t lowest, highest;
    uint4 piece[n_tiles * 2][Blocks];

    __device__ index_t slot(int x) const {
      return first + x / 2 * 16 + x % 2 * 8 + lane_of_warp() / 4;
    }
    __device__ warp_keys(window_head const& h, key_pieces<T> const& keys, index_t from)
        : first(from), lowest(above_positions), highest(no_position) {
      for (int x = 0; x < n_tiles * 2; ++x) {
        bool const live = slot(x) < h.n;
        position[x] = live ? h.positions[slot(x)] : above_positions;
        lowest = min(lowest, position[x]);
        highest = max(highest, position[x]);
        for (int s = 0; s < Blocks; ++s)
          piece[x][s] =
              live ? keys.load(slot(x), s * 4 + lane_of_warp() % 4) : make_uint4(0, 0, 0, 0);
      }
      lowest = warp_reduce(lowest, smaller{});
      highest = warp_reduce(highest, larger{});
    }
  };
  using queries = query_tile<T, Blocks, tiles::batches>;
  using products = float[n_tiles][2][4];

  static constexpr std::size_t bytes() { return queries::bytes(); }

  __device__ void operator()() const {
    shared_pieces shared;
    queries const tile(shared);
    window_head const h(job);
    index_t const tiles_of_set = (plan.batches() + tiles::batches - 1) / tiles::batches;
    index_t taken = -1;
    for (index_t step = 0; step < steps; ++step) {
      index_t const strip = (static_cast<index_t>(blockIdx.y) * steps + step) * tiles::keys;
      if (strip >= h.n) return;
      warp_keys const own(h, key_pieces<T>(h), strip + warp_of_block() * n_tiles * 16);
      for (index_t set = 0; set < plan.sets; ++set) {
        float sum[n_tiles * 2];
        move_sums(h, own, set, sum, false);
        for (index_t t = 0; t < tiles_of_set; ++t) {
          if (taken != set * tiles_of_set + t) {
            taken = set * tiles_of_set + t;
            __syncthreads();
            take(h, tile, set, t);
            __syncthreads();
          }
          for (index_t batch = 0; own.first < h.n && batch < tiles::batches; ++batch)
            add_batch(tile, batch, own, sum);
        }
        move_sums(h, own, set, sum, true);
      }
    }
  }

 private:
  __device__ index_t lanes() const { return 4 / plan.chains; }

  __device__ void take(window_head const& h, queries const& tile, index_t set, index_t t) const {
    index_t const each = turn_queries / plan.chains;
    auto const term = [&](index_t i) {
      return (t * tiles::batches * 2 + i / turn_queries) * each + i % each;
    };
    tile.take(
        h, true,
        [&](index_t i) {
          index_t const x = term(i);
          return x >= plan.length ? -1 : per_query_head ? x : x / h.group;
        },
        [&](index_t i) {
          return per_query_head ? set * plan.chains + i % turn_queries / each : term(i) % h.group;
        });
  }

  /// Reads or writes the sums of this lane's chain; of the lanes that share it the first one writes.
  __device__ void move_sums(window_head const& h, warp_keys const& own, index_t set,
                            float (&sum)[n_tiles * 2], bool write) const {
    index_t const q = lane_of_warp() % 4;
    float* const row =
        out.at(out_by_id ? h.id : h.at.entry, h.at.head, set * plan.chains + q / lanes(), 0);
    for (int x = 0; x < n_tiles * 2; ++x) {
      bool const live = own.slot(x) < h.n;
      if (write && live && q % lanes() == 0) row[own.slot(x)] = sum[x];
      if (!write) sum[x] = live && !clear ? row[own.slot(x)] : 0.0f;
    }
  }

  /// The keys times 16 queries: groups of eight from `eight` on.
  __device__ static void multiply_all(uint4 const* columns, index_t batch, index_t eight,
                                      warp_keys const& own, products& z) {
    for (int s = 0; s < Blocks; ++s)
      for (int t = 0; t < 2; ++t) {
        uint4 const b = columns[queries::place(batch, eight + t, s) + lane_of_warp()];
        for (int m = 0; m < n_tiles; ++m)
          multiply(T{}, z[m][t], own.piece[2 * m][s], own.piece[2 * m + 1][s], b);
      }
  }

  __device__ void add_batch(queries const& tile, index_t batch, warp_keys const& own,
                            float (&sum)[n_tiles * 2]) const {
    index_t const mine = batch * batch_queries + lane_of_warp();
    index_t const limit = tile.info[mine].limit;
    if (__any_sync(all_lanes, limit >= own.lowest ? 1 : 0) == 0) return;
    bool const all_seen = __all_sync(all_lanes, limit >= own.highest ? 1 : 0) != 0;
    unsigned const uneven = __ballot_sync(all_lanes, tile.uneven[mine]);
    for (index_t turn = 0; turn < 2; ++turn) {
      index_t const first = turn * turn_queries + lane_of_warp() % 4 * 4;
      products z = {};
      if (uneven != 0) {
        multiply_all(tile.rest, batch, turn * 2, own, z);
        drop_even(uneven >> first, z);
      }
      multiply_all(tile.high, batch, turn * 2, own, z);
      to_weights(tile.info + batch * batch_queries + first, own, all_seen, z);
      add_turn(z, sum);
    }
  }
  /// Adds 16 queries' terms to the chains, of which each lane has four in a row.
  __device__ void add_turn(products const& z, float (&sum)[n_tiles * 2]) const {
    for (index_t phase = 0; phase < lanes(); ++phase)
      for (int x = 0; x < n_tiles * 2; ++x) {
        float s = sum[x];
        for (int i = 0; i < 4; ++i) s = __fadd_rn(s, z[x / 2][i / 2][x % 2 * 2 + i % 2]);
        sum[x] = plan.chains == 4 ? s : pass_on(s, phase);
      }
  }
  /// The sum of the lane whose turn it was.
  __device__ float pass_on(float s, index_t phase) const {
    return __shfl_sync(all_lanes, s, lane_of_warp() / lanes() * lanes() + phase);
  }
  /// A query that is one 16-bit number gets the bits that it has in a batch of such: nothing added.
  __device__ static void drop_even(unsigned uneven, products& z) {
    for (int m = 0; m < n_tiles; ++m)
      for (int e = 0; e < 8; ++e)
        if ((uneven >> (e / 4 * 2 + e % 2) & 1u) == 0) z[m][e / 4][e % 4] = 0;
  }
  __device__ void to_weights(query_info const* info, warp_keys const& own, bool all_seen,
                             products& z) const {
    fast_logit2 const form(job.layer.kv);
    for (int i = 0; i < 4; ++i) {
      query_info const q = info[i];
      for (int x = 0; x < n_tiles * 2; ++x) {
        float& p = z[x / 2][i / 2][x % 2 * 2 + i % 2];
        float const logit = form(__fmul_rn(p, q.factor));
        p = __fmul_rn(fast_exp2(__fadd_rn(logit, -q.shift)), q.inverse);
        if (!all_seen && own.position[x] > q.limit) p = 0;
      }
    }
  }
};

}  // namespace kvkeep::cuda
