// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Weights of query rows on a strip of slots, with matrix products for 16-bit keys of up to 256 features. A warp
/// holds keys in registers and lets the queries pass, so that a slot's terms come in order.
#pragma once

#include "fragments.cuh"

namespace kvkeep::cuda {

/// What a block does with a strip, whatever it makes of the weights. Heads whose keys are not as `Whole` says are
/// left to the other kernel: reading keys feature by feature takes registers that the products need.
template <class T, int Blocks, bool Whole>
struct mma_strip {
  using tiles = mma_tiles<Blocks>;
  using queries = query_tile<Blocks, tiles::batches>;
  static constexpr int n_tiles = tiles::key_tiles;
  static constexpr int n_keys = n_tiles * 2;          ///< of a lane
  static constexpr index_t keys = tiles::keys;        ///< of a block
  static constexpr index_t warp_span = n_tiles * 16;  ///< keys of a warp
  static constexpr index_t tile_turns = tiles::batches * batch_queries / turn_queries;
  static constexpr int most_threads = tiles::warps * 32, blocks_per_sm = Whole ? 2 : 1;
  using products = float[n_tiles][2][4];

  /// What masks need to know of a block's keys, in shared memory: registers are for keys and products.
  struct key_positions {
    index_t* of;       ///< [keys]
    index_t* lowest;   ///< [warps]
    index_t* highest;  ///< [warps]

    __device__ explicit key_positions(shared_pieces& s)
        : of(s.take<index_t>(keys)),
          lowest(s.take<index_t>(tiles::warps)),
          highest(s.take<index_t>(tiles::warps)) {}
    __device__ index_t const* of_warp() const { return of + warp_of_block() * warp_span; }
  };
  static constexpr std::size_t bytes() {
    return queries::bytes() + shared_pieces::bytes<index_t>(keys) +
           2 * shared_pieces::bytes<index_t>(tiles::warps);
  }

  /// The keys of a warp, 16 to a tile: this lane's are r and r + 8 of each, with r = lane / 4.
  struct warp_keys {
    index_t first;
    uint4 piece[n_keys][Blocks];

    /// Number of a key of this lane among the warp's.
    __device__ static index_t number(int x) { return x / 2 * 16 + x % 2 * 8 + lane_of_warp() / 4; }
    __device__ index_t slot(int x) const { return first + number(x); }
    /// @param strip  the block's first slot
    __device__ warp_keys(window_head const& h, index_t strip, key_positions const& positions)
        : first(strip + warp_of_block() * warp_span) {
      key_pieces<T> const rows(h);
      index_t const lane = lane_of_warp(), key = lane % warp_span, warp = warp_of_block();
      index_t const mine = first + key < h.n ? h.positions[first + key] : above_positions;
      index_t const lowest = warp_reduce(mine, smaller{}), highest = warp_reduce(mine, larger{});
      __syncwarp();  // those of the last step may still be read
      if (lane < warp_span) positions.of[warp * warp_span + lane] = mine;
      if (lane == 0) positions.lowest[warp] = lowest;
      if (lane == 0) positions.highest[warp] = highest;
      __syncwarp();
      unrolled<n_keys>([&](int x) {
        unrolled<Blocks>([&](int s) { piece[x][s] = make_uint4(0, 0, 0, 0); });
        if (slot(x) >= h.n) return;
        std::byte const* const row = rows.row(slot(x));
        unrolled<Blocks>([&](int s) {
          index_t const at = s * 4 + lane % 4;
          piece[x][s] = Whole ? rows.load(row, at) : rows.gather(row, at);
        });
      });
    }
  };

  /// Weight of this lane's key x for the i-th of its four queries of a turn, which follow each other.
  __device__ static float& weight(products& z, int x, int i) {
    return z[x / 2][i / 2][x % 2 * 2 + i % 2];
  }
  __device__ static float weight(products const& z, int x, int i) {
    return z[x / 2][i / 2][x % 2 * 2 + i % 2];
  }

  /// z = the weights of a turn's queries. @return whether one of them sees one of the warp's keys; if not, z
  /// is unset
  __device__ static bool weigh(kv_ref<device_space> const& kv, queries const& tile, index_t turn,
                               warp_keys const& own, key_positions const& positions, products& z) {
    index_t const first = turn * turn_queries, mine = first + lane_of_warp() % turn_queries;
    index_t const quad = lane_of_warp() % 4 * 4, limit = tile.limit[mine];
    if (__any_sync(all_lanes, limit >= positions.lowest[warp_of_block()] ? 1 : 0) == 0)
      return false;
    bool const all_seen =
        __all_sync(all_lanes, limit >= positions.highest[warp_of_block()] ? 1 : 0) != 0;
    unsigned const uneven = __ballot_sync(all_lanes, tile.uneven[mine]);
    unrolled<n_tiles * 8>([&](int e) { z[e / 8][e % 8 / 4][e % 4] = 0; });
    if (uneven != 0) {
      multiply_all(tile.rest, turn, own, z);
      unrolled<n_tiles * 8>([&](int e) {
        float& rest = z[e / 8][e % 8 / 4][e % 4];
        rest = rest_of(rest, (uneven >> (quad + e % 8 / 4 * 2 + e % 2) & 1u) == 0);
      });
    }
    multiply_all(tile.high, turn, own, z);
    with_logit(kv, [&](auto const& form) {
      to_weights(form, tile, first + quad, all_seen ? nullptr : positions.of_warp(), z);
    });
    return true;
  }

 private:
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
  /// @param first  this lane's first query of the turn  @param positions  of the warp's keys, or null if all are seen
  template <class L>
  __device__ static void to_weights(L const& form, queries const& tile, index_t first,
                                    index_t const* positions, products& z) {
    unrolled<4>([&](int i) {
      query_scale const q = tile.scale[first + i];
      unrolled<n_keys>([&](int x) {
        float& p = weight(z, x, i);
        float const logit = form(__fmul_rn(p, q.factor));
        p = fast_exp2(__fadd_rn(logit, -q.shift));
        if (positions != nullptr && positions[warp_keys::number(x)] > tile.limit[first + i]) p = 0;
      });
    });
  }
};

}  // namespace kvkeep::cuda
