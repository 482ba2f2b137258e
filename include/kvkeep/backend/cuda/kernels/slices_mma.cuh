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
  using queries = query_tile<Blocks, batches>;
  static_assert(n_stages * stage_pieces <= queries::pieces);
  static_assert(slice_slots % (n_stages * stage_keys) == 0 &&
                fused_slice_slots % (n_stages * stage_keys) == 0);
  window_job job;

  static constexpr std::size_t bytes() {
    return queries::bytes() + shared_pieces::bytes<index_t>(n_stages * stage_keys);
  }

  /// This lane's queries: rows r and r + 8 of two tiles of 16, with r = lane / 4.
  struct warp_queries {
    uint4 piece[4][Blocks];
    index_t lowest, highest;  ///< limits of the warp's queries
    unsigned uneven;          ///< a bit for each of the warp's queries

    __device__ static index_t number(int x) {
      return warp_of_block() * batch_queries + queries::query_of(x, lane_of_warp() / 4);
    }
    __device__ explicit warp_queries(queries const& tile)
        : lowest(above_positions), highest(no_position) {
      unrolled<4>([&](int x) {
        index_t const limit = tile.limit[number(x)];
        lowest = min(lowest, limit);
        highest = max(highest, limit);
        unrolled<Blocks>([&](int s) {
          piece[x][s] = tile.high[queries::place(warp_of_block(), x, s) + lane_of_warp()];
        });
      });
      lowest = warp_reduce(lowest, smaller{});
      highest = warp_reduce(highest, larger{});
      uneven =
          __ballot_sync(all_lanes, tile.uneven[warp_of_block() * batch_queries + lane_of_warp()]);
    }
  };
  using products = float[2][2][4];

  __device__ void operator()() const {
    shared_pieces shared;
    queries const tile(shared);
    auto* const positions = shared.take<index_t>(n_stages * stage_keys);
    window_head const h(job);
    index_t const n_tiles =
        static_cast<index_t>(ceil_div(job.n_queries(), batches * batch_queries));
    index_t const slice = static_cast<index_t>(blockIdx.y) / n_tiles;
    index_t const first = static_cast<index_t>(blockIdx.y) % n_tiles * batches * batch_queries;
    index_t const begin = slice * job.slice_slots, end = min(h.n, begin + job.slice_slots);
    if (begin >= h.n) return;
    tile.take(h, false,
              [&](index_t i) { return first + i < job.n_queries() ? first + i : index_t{-1}; });
    __syncthreads();
    warp_queries const own(tile);
    __syncthreads();
    // A slice begins with stage 0: the slot says which one it is.
    auto const stage_of = [](index_t slot) { return slot / stage_keys % n_stages; };
    auto const fetch = [&](index_t slot) {
      take_keys(h, key_pieces<T>(h), slot, end, tile.high + stage_of(slot) * stage_pieces,
                positions + stage_of(slot) * stage_keys);
    };
    row_sum sum[4];
    for (index_t s = 0; s < n_stages - 1; ++s) fetch(begin + s * stage_keys);
    for (index_t slot = begin; slot < end; slot += stage_keys) {
      copies_wait<n_stages - 2>();
      __syncthreads();
      fetch(slot + (n_stages - 1) * stage_keys);
      add_stage(tile, own, tile.high + stage_of(slot) * stage_pieces,
                positions + stage_of(slot) * stage_keys, sum);
    }
    copies_wait<0>();
    unrolled<4>([&](int x) {
      for (int step = 1; step < 4; step *= 2)
        sum[x] = join(sum[x], {__shfl_xor_sync(all_lanes, sum[x].top, step),
                               __shfl_xor_sync(all_lanes, sum[x].sum, step)});
      index_t const query = first + warp_queries::number(x);
      if (lane_of_warp() % 4 == 0 && query < job.n_queries()) h.slice(slice)[query] = sum[x];
    });
  }

 private:
  /// Starts fetching 32 keys; behind the end come zeros that nobody sees.
  __device__ static void take_keys(window_head const& h, key_pieces<T> const& keys, index_t from,
                                   index_t end, uint4* to, index_t* positions) {
    // In the order of places: eight threads in a row write to all banks.
    index_t const lane = lane_of_warp();
    for (index_t i = warp_of_block(); i < stage_keys / 8 * Blocks; i += warps_of_block()) {
      index_t const key = i / Blocks * 8 + lane / 4, slot = from + key;
      index_t const piece = i % Blocks * 4 + lane % 4, x = i * 32 + lane;
      bool const live = slot < end;
      if (keys.whole())
        copy_16(to + x, keys.address(live ? slot : end - 1, keys.has(piece) ? piece : 0),
                live && keys.has(piece));
      else
        to[x] = live ? keys.gather(keys.row(slot), piece) : make_uint4(0, 0, 0, 0);
    }
    index_t const key = thread_of_block();
    if (key < stage_keys)
      copy_position(positions + key, h.positions + from + key, from + key < end);
    copies_end();
  }

  /// The warp's queries times 16 keys. @param row(x, s) piece s of this lane's query x
  template <class R>
  __device__ static void multiply_all(R const& row, uint4 const* keys, products& z) {
    unrolled<Blocks * 2>([&](int i) {
      int const s = i / 2, t = i % 2;
      uint4 const b = keys[(t * Blocks + s) * 32 + lane_of_warp()];
      unrolled<2>([&](int m) { multiply(T{}, z[m][t], row(2 * m, s), row(2 * m + 1, s), b); });
    });
  }

  __device__ void add_stage(queries const& tile, warp_queries const& own, uint4 const* keys,
                            index_t const* positions, row_sum (&sum)[4]) const {
    index_t const position = positions[lane_of_warp()];
    if (__any_sync(all_lanes, position <= own.highest ? 1 : 0) == 0) return;
    bool const all_seen = __all_sync(all_lanes, position <= own.lowest ? 1 : 0) != 0;
    for (index_t half = 0; half < stage_keys; half += 16)
      add_keys(tile, own, keys + half / 8 * Blocks * 32, all_seen ? nullptr : positions + half,
               sum);
  }
  /// @param positions of 16 keys, or null if all queries see all of them
  __device__ void add_keys(queries const& tile, warp_queries const& own, uint4 const* keys,
                           index_t const* positions, row_sum (&sum)[4]) const {
    products z = {};
    if (own.uneven != 0) {
      multiply_all(
          [&](int x, int s) {
            return tile.rest[queries::place(warp_of_block(), x, s) + lane_of_warp()];
          },
          keys, z);
      unrolled<16>([&](int e) {
        float& rest = z[e / 8][e / 4 % 2][e % 4];
        index_t const query = warp_queries::number(e / 8 * 2 + e % 4 / 2) % batch_queries;
        rest = rest_of(rest, (own.uneven >> query & 1u) == 0);
      });
    }
    multiply_all([&](int x, int s) { return own.piece[x][s]; }, keys, z);
    with_logit(job.layer.kv, [&](auto const& form) { add_logits(form, tile, positions, z, sum); });
  }
  template <class L>
  __device__ static void add_logits(L const& form, queries const& tile, index_t const* positions,
                                    products& z, row_sum (&sum)[4]) {
    unrolled<4>([&](int x) {
      index_t const query = warp_queries::number(x);
      float const factor = tile.scale[query].factor;
      index_t const limit = positions != nullptr ? tile.limit[query] : above_positions;
      float top = sum[x].top;
      unrolled<4>([&](int i) {
        float& logit = z[x / 2][i / 2][x % 2 * 2 + i % 2];
        logit = form(__fmul_rn(logit, factor));
        if (positions != nullptr && positions[i / 2 * 8 + lane_of_warp() % 4 * 2 + i % 2] > limit)
          logit = __uint_as_float(0xff800000u);
        top = max(top, logit);
      });
      float added = 0;
      unrolled<4>([&](int i) {
        added = __fadd_rn(added, fast_exp2(__fadd_rn(z[x / 2][i / 2][x % 2 * 2 + i % 2], -top)));
      });
      sum[x].sum = __fadd_rn(__fmul_rn(sum[x].sum, fast_exp2(__fadd_rn(sum[x].top, -top))), added);
      sum[x].top = top;
    });
  }
};

}  // namespace kvkeep::cuda
