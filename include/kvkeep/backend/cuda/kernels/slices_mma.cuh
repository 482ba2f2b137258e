// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Normalisers of query rows with matrix products, for 16-bit keys of up to 256 features.
#pragma once

#include "fragments.cuh"

namespace kvkeep::cuda {

/// A slice's share of the normalisers of a tile of queries, a batch per warp. Keys come through a ring of
/// stages, which lies where the queries were before they went to registers. Grid: heads, slices by tiles.
template <class T, int Blocks>
struct mma_slices_kernel {
  static constexpr int batches = mma_tiles<Blocks>::batches, n_stages = batches;
  static constexpr int most_threads = batches * 32, blocks_per_sm = Blocks > 4 ? 2 : 3;
  static constexpr index_t stage_keys = 32, stage_pieces = stage_keys * Blocks * 4;
  using queries = query_tile<T, Blocks, batches>;
  static_assert(n_stages * stage_pieces <= queries::pieces);
  window_job job;

  static constexpr std::size_t bytes() {
    return queries::bytes() + shared_pieces::bytes<index_t>(n_stages * stage_keys);
  }

  /// This lane's queries: rows r and r + 8 of two tiles of 16, with r = lane / 4.
  struct warp_queries {
    uint4 piece[4][Blocks];
    float factor[4];
    index_t limit[4];
    bool even[4];
    index_t lowest, highest;  ///< limits of the warp's queries
    bool any_uneven = false;

    __device__ static index_t number(int x) {
      return warp_of_block() * batch_queries + queries::query_of(x, lane_of_warp() / 4);
    }
    __device__ explicit warp_queries(queries const& tile)
        : lowest(above_positions), highest(no_position) {
      for (int x = 0; x < 4; ++x) {
        query_info const info = tile.info[number(x)];
        factor[x] = info.factor;
        limit[x] = info.limit;
        even[x] = tile.uneven[number(x)] == 0;
        any_uneven = any_uneven || !even[x];
        lowest = min(lowest, limit[x]);
        highest = max(highest, limit[x]);
        for (int s = 0; s < Blocks; ++s)
          piece[x][s] = tile.high[queries::place(warp_of_block(), x, s) + lane_of_warp()];
      }
      lowest = warp_reduce(lowest, smaller{});
      highest = warp_reduce(highest, larger{});
      any_uneven = __any_sync(all_lanes, any_uneven ? 1 : 0) != 0;
    }
  };
  using products = float[2][4][4];

  __device__ void operator()() const {
    shared_pieces shared;
    queries const tile(shared);
    auto* const positions = shared.take<index_t>(n_stages * stage_keys);
    window_head const h(job);
    key_pieces<T> const keys(h);
    index_t const n_tiles =
        static_cast<index_t>(ceil_div(job.n_queries(), batches * batch_queries));
    index_t const slice = static_cast<index_t>(blockIdx.y) / n_tiles;
    index_t const first = static_cast<index_t>(blockIdx.y) % n_tiles * batches * batch_queries;
    index_t const begin = slice * slice_slots, end = min(h.n, begin + slice_slots);
    if (begin >= h.n) return;
    tile.take(
        h, false,
        [&](index_t i) { return first + i < job.n_queries() ? (first + i) / h.group : -1; },
        [&](index_t i) { return (first + i) % h.group; });
    __syncthreads();
    warp_queries const own(tile);
    __syncthreads();
    auto const fetch = [&](index_t stage) {
      take_keys(h, keys, begin + stage * stage_keys, end,
                tile.high + stage % n_stages * stage_pieces,
                positions + stage % n_stages * stage_keys);
    };
    row_sum sum[4];
    for (index_t s = 0; s < n_stages - 1; ++s) fetch(s);
    for (index_t s = 0; begin + s * stage_keys < end; ++s) {
      copies_wait<n_stages - 2>();
      __syncthreads();
      fetch(s + n_stages - 1);
      add_stage(tile, own, tile.high + s % n_stages * stage_pieces,
                positions + s % n_stages * stage_keys, sum);
    }
    copies_wait<0>();
    for (int x = 0; x < 4; ++x) {
      for (int step = 1; step < 4; step *= 2)
        sum[x] = join(sum[x], {__shfl_xor_sync(all_lanes, sum[x].top, step),
                               __shfl_xor_sync(all_lanes, sum[x].sum, step)});
      index_t const query = first + warp_queries::number(x);
      if (lane_of_warp() % 4 == 0 && query < job.n_queries()) h.slice(slice)[query] = sum[x];
    }
  }

 private:
  /// Starts fetching 32 keys; behind the end come zeros that nobody sees.
  __device__ static void take_keys(window_head const& h, key_pieces<T> const& keys, index_t from,
                                   index_t end, uint4* to, index_t* positions) {
    for (index_t i = thread_of_block(); i < stage_pieces; i += threads_of_block()) {
      index_t const key = i / (Blocks * 4), piece = i % (Blocks * 4), slot = from + key;
      uint4* const at = to + (key / 8 * Blocks + piece / 4) * 32 + key % 8 * 4 + piece % 4;
      bool const live = slot < end;
      if (keys.whole())
        copy_16(at, live && keys.has(piece) ? keys.address(slot, piece) : h.job.layer.kv.k.data,
                live && keys.has(piece));
      else
        *at = live ? keys.load(slot, piece) : make_uint4(0, 0, 0, 0);
      if (piece == 0) positions[key] = live ? h.positions[slot] : above_positions;
    }
    copies_end();
  }

  /// Rows of 16 queries times columns of 8 keys. @param row(x, s) piece s of this lane's query x
  template <class R>
  __device__ static void multiply_all(R const& row, uint4 const* keys, products& z) {
    for (int s = 0; s < Blocks; ++s)
      for (int t = 0; t < 4; ++t) {
        uint4 const b = keys[(t * Blocks + s) * 32 + lane_of_warp()];
        for (int m = 0; m < 2; ++m) multiply(T{}, z[m][t], row(2 * m, s), row(2 * m + 1, s), b);
      }
  }

  __device__ void add_stage(queries const& tile, warp_queries const& own, uint4 const* keys,
                            index_t const* positions, row_sum (&sum)[4]) const {
    index_t const position = positions[lane_of_warp()];
    if (__any_sync(all_lanes, position <= own.highest ? 1 : 0) == 0) return;
    bool const all_seen = __all_sync(all_lanes, position <= own.lowest ? 1 : 0) != 0;
    products z = {};
    if (own.any_uneven) {
      multiply_all(
          [&](int x, int s) {
            return tile.rest[queries::place(warp_of_block(), x, s) + lane_of_warp()];
          },
          keys, z);
      for (int e = 0; e < 32; ++e)
        if (own.even[e / 16 * 2 + e % 4 / 2]) z[e / 16][e / 4 % 4][e % 4] = 0;
    }
    multiply_all([&](int x, int s) { return own.piece[x][s]; }, keys, z);
    fast_logit2 const form(job.layer.kv);
    for (int x = 0; x < 4; ++x) {
      float top = sum[x].top;
      for (int i = 0; i < 8; ++i) {
        float& logit = z[x / 2][i / 2][x % 2 * 2 + i % 2];
        logit = form(__fmul_rn(logit, own.factor[x]));
        if (!all_seen && positions[i / 2 * 8 + lane_of_warp() % 4 * 2 + i % 2] > own.limit[x])
          logit = __uint_as_float(0xff800000u);
        top = max(top, logit);
      }
      float added = 0;
      for (int i = 0; i < 8; ++i)
        added = __fadd_rn(added, fast_exp2(__fadd_rn(z[x / 2][i / 2][x % 2 * 2 + i % 2], -top)));
      sum[x].sum = __fadd_rn(__fmul_rn(sum[x].sum, fast_exp2(__fadd_rn(sum[x].top, -top))), added);
      sum[x].top = top;
    }
  }
};

}  // namespace kvkeep::cuda
