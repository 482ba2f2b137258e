// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// What slots receive from query rows, with matrix products for 16-bit keys of up to 256 features. A warp
/// holds keys in registers and lets the queries pass, so that a slot's terms are added in order.
#pragma once

#include "fragments.cuh"

namespace kvkeep::cuda {

/// Adds to slots what they receive from all rows. Grid: heads, strips of `steps` times `strip_keys` slots.
/// Heads whose keys are not as `Whole` says are left to the other kernel: reading keys feature by feature
/// takes registers that the products need.
template <class T, int Blocks, bool Whole>
struct mma_sums_kernel {
  using tiles = mma_tiles<Blocks>;
  static constexpr int most_threads = tiles::warps * 32, blocks_per_sm = Whole ? 2 : 1;
  static constexpr int n_tiles = tiles::key_tiles;
  static constexpr index_t strip_keys = tiles::keys;  ///< of a block
  window_job job;
  tensor_ref<float, 4, device_space> out;
  bool out_by_id, per_query_head, clear;
  chain_plan plan;
  index_t steps;

  /// What masks need to know of a block's keys, in shared memory: registers are for keys and products.
  struct key_positions {
    index_t* of;       ///< [strip_keys]
    index_t* lowest;   ///< [warps]
    index_t* highest;  ///< [warps]
  };

  /// The keys of a warp, 16 to a tile: this lane's are r and r + 8 of each, with r = lane / 4.
  struct warp_keys {
    index_t first;
    uint4 piece[n_tiles * 2][Blocks];

    /// Number of a key of this lane among the warp's.
    __device__ static index_t number(int x) { return x / 2 * 16 + x % 2 * 8 + lane_of_warp() / 4; }
    __device__ index_t slot(int x) const { return first + number(x); }
    __device__ warp_keys(window_head const& h, key_pieces<T> const& keys, index_t from,
                         key_positions const& positions)
        : first(from) {
      index_t const lane = lane_of_warp(), key = lane % (n_tiles * 16), warp = warp_of_block();
      index_t const mine = first + key < h.n ? h.positions[first + key] : above_positions;
      index_t const lowest = warp_reduce(mine, smaller{}), highest = warp_reduce(mine, larger{});
      __syncwarp();  // those of the last step may still be read
      if (lane < n_tiles * 16) positions.of[warp * n_tiles * 16 + lane] = mine;
      if (lane == 0) positions.lowest[warp] = lowest;
      if (lane == 0) positions.highest[warp] = highest;
      __syncwarp();
      unrolled<n_tiles * 2>([&](int x) {
        unrolled<Blocks>([&](int s) {
          index_t const at = s * 4 + lane % 4;
          piece[x][s] = slot(x) >= h.n ? make_uint4(0, 0, 0, 0)
                        : Whole        ? keys.load(slot(x), at)
                                       : keys.gather(slot(x), at);
        });
      });
    }
  };
  using queries = query_tile<Blocks, tiles::batches>;
  using products = float[n_tiles][2][4];
  static constexpr index_t tile_turns = tiles::batches * batch_queries / turn_queries;

  static constexpr std::size_t bytes() {
    return queries::bytes() + shared_pieces::bytes<index_t>(strip_keys) +
           2 * shared_pieces::bytes<index_t>(tiles::warps);
  }

  __device__ void operator()() const {
    shared_pieces shared;
    queries const tile(shared);
    key_positions const positions{shared.take<index_t>(strip_keys),
                                  shared.take<index_t>(tiles::warps),
                                  shared.take<index_t>(tiles::warps)};
    window_head const h(job);
    if (key_pieces<T>(h).whole() != Whole) return;
    index_t const tiles_of_set = (plan.turns() + tile_turns - 1) / tile_turns;
    for (index_t step = 0; step < steps; ++step) {
      index_t const strip = (static_cast<index_t>(blockIdx.y) * steps + step) * strip_keys;
      if (strip >= h.n) return;
      warp_keys const own(h, key_pieces<T>(h), strip + warp_of_block() * n_tiles * 16, positions);
      for (index_t set = 0; set < plan.sets; ++set) {
        float sum[n_tiles * 2];
        move_sums(h, own, set, sum, false);
        for (index_t t = 0; t < tiles_of_set; ++t) {
          if (step == 0 || plan.sets * tiles_of_set > 1) {
            __syncthreads();
            take(h, tile, set, t);
            __syncthreads();
          }
          index_t const turns =
              own.first < h.n ? min(tile_turns, plan.turns() - t * tile_turns) : 0;
          for (index_t turn = 0; turn < turns; ++turn) add_turn(tile, turn, own, positions, sum);
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
                            float (&sum)[n_tiles * 2], bool write) const {
    index_t const q = lane_of_warp() % 4;
    float* const row = out.at(out_by_id ? h.id : h.at.entry, h.at.head,
                              (set << plan.shift) + (q >> lane_shift()), 0);
    unrolled<n_tiles * 2>([&](int x) {
      bool const live = own.slot(x) < h.n;
      if (write && live && (q & ((1 << lane_shift()) - 1)) == 0) row[own.slot(x)] = sum[x];
      if (!write) sum[x] = live && !clear ? row[own.slot(x)] : 0.0f;
    });
  }

  /// The keys times a turn's queries.
  __device__ static void multiply_all(uint4 const* columns, index_t turn, warp_keys const& own,
                                      products& z) {
    unrolled<Blocks * 2>([&](int i) {
      int const s = i / 2, t = i % 2;
      uint4 const b = columns[queries::place(turn / 2, turn % 2 * 2 + t, s) + lane_of_warp()];
      unrolled<n_tiles>(
          [&](int m) { multiply(T{}, z[m][t], own.piece[2 * m][s], own.piece[2 * m + 1][s], b); });
    });
  }

  __device__ void add_turn(queries const& tile, index_t turn, warp_keys const& own,
                           key_positions const& positions, float (&sum)[n_tiles * 2]) const {
    index_t const first = turn * turn_queries, mine = first + lane_of_warp() % turn_queries;
    index_t const quad = lane_of_warp() % 4 * 4, limit = tile.info[mine].limit;
    if (__any_sync(all_lanes, limit >= positions.lowest[warp_of_block()] ? 1 : 0) == 0) return;
    bool const all_seen =
        __all_sync(all_lanes, limit >= positions.highest[warp_of_block()] ? 1 : 0) != 0;
    unsigned const uneven = __ballot_sync(all_lanes, tile.uneven[mine]);
    products z = {};
    if (uneven != 0) {
      multiply_all(tile.rest, turn, own, z);
      unrolled<n_tiles * 8>([&](int e) {
        float& rest = z[e / 8][e % 8 / 4][e % 4];
        rest = rest_of(rest, (uneven >> (quad + e % 8 / 4 * 2 + e % 2) & 1u) == 0);
      });
    }
    multiply_all(tile.high, turn, own, z);
    with_logit(job.layer.kv, [&](auto const& form) {
      to_weights(form, tile.info + first + quad,
                 all_seen ? nullptr : positions.of + warp_of_block() * n_tiles * 16, z);
    });
    add_terms(z, sum);
  }
  /// Adds a turn's terms to the chains, of which each lane has four in a row.
  __device__ void add_terms(products const& z, float (&sum)[n_tiles * 2]) const {
    for (index_t phase = 0; phase < 1 << lane_shift(); ++phase)
      unrolled<n_tiles * 2>([&](int x) {
        float s = sum[x];
        unrolled<4>([&](int i) { s = __fadd_rn(s, z[x / 2][i / 2][x % 2 * 2 + i % 2]); });
        sum[x] = plan.shift == 2 ? s : pass_on(s, phase);
      });
  }
  /// The sum of the lane whose turn it was.
  __device__ float pass_on(float s, index_t phase) const {
    return __shfl_sync(all_lanes, s, (lane_of_warp() >> lane_shift() << lane_shift()) + phase);
  }
  /// @param positions of the warp's keys, or null if all are seen
  template <class L>
  __device__ static void to_weights(L const& form, query_info const* info, index_t const* positions,
                                    products& z) {
    unrolled<4>([&](int i) {
      query_info const q = info[i];
      unrolled<n_tiles * 2>([&](int x) {
        float& p = z[x / 2][i / 2][x % 2 * 2 + i % 2];
        float const logit = form(__fmul_rn(p, q.factor));
        p = __fmul_rn(fast_exp2(__fadd_rn(logit, -q.shift)), q.inverse);
        if (positions != nullptr && positions[warp_keys::number(x)] > q.limit) p = 0;
      });
    });
  }
};

}  // namespace kvkeep::cuda
