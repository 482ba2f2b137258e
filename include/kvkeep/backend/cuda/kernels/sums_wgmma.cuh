// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// What slots receive from query rows, with products of warpgroups, for 16-bit keys of up to 128 features.
#pragma once

#include "core_rows.cuh"

namespace kvkeep::cuda {

/// Adds to slots what they receive from all rows, in the order of mma_sums_kernel. A warpgroup holds 64 keys
/// in registers and lets the queries pass, 64 at a time; warps fetch their next keys meanwhile, and where the
/// queries stay in place warpgroups wait for nobody else. Grid: heads, strips of `steps` times `strip_keys` slots.
template <class T, int Blocks>
struct wgmma_sums_kernel {
  using rows = core_rows<Blocks>;
  using queries = query_tile<Blocks, 4>;
  static constexpr int groups = 2, most_threads = groups * 128, blocks_per_sm = 2;
  static constexpr index_t strip_keys = groups * group_rows;  ///< of a block
  static constexpr index_t tile_turns = queries::queries / turn_queries;
  static constexpr index_t part = group_columns;  ///< queries of a product
  window_job job;
  tensor_ref<float, 4, device_space> out;
  bool out_by_id, per_query_head, clear;
  chain_plan plan;
  index_t steps;

  static constexpr std::size_t bytes() {
    return queries::bytes() + shared_pieces::bytes<uint4>(strip_keys * rows::pieces);
  }

  /// The keys of a warp: this lane's are r and r + 8, with r = lane / 4.
  struct warp_keys {
    typename rows::operand operand;
    index_t first;  ///< of the warp's slots
    index_t position[2];
    index_t lowest, highest;  ///< positions of the warp's keys
    index_t group_lowest;     ///< and of the warpgroup's

    __device__ index_t slot(int x) const { return first + x * 8 + lane_of_warp() / 4; }
  };
  /// The queries in shared memory.
  struct tile_of_queries {
    queries at;
    bool uneven;  ///< some have second numbers
  };

  __device__ void operator()() const {
    shared_pieces shared;
    tile_of_queries tile{queries(shared), false};
    uint4* const memory = shared.take<uint4>(strip_keys * rows::pieces);
    window_head const h(job);
    key_pieces<T> const source(h);
    index_t const tiles_of_set = (plan.turns() + tile_turns - 1) / tile_turns;
    index_t strip = static_cast<index_t>(blockIdx.y) * steps * strip_keys;
    if (strip >= h.n) return;
    fetch(h, source, strip, memory);
    group_products z = {};
    for (index_t step = 0; step < steps && strip < h.n; ++step, strip += strip_keys) {
      warp_keys own;
      take_keys(h, strip, memory, own);
      if (step + 1 < steps && strip + strip_keys < h.n)
        fetch(h, source, strip + strip_keys, memory);
      for (index_t set = 0; set < plan.sets; ++set) {
        float sum[2];
        move_sums(h, own, set, sum, false);
        for (index_t t = 0; t < tiles_of_set; ++t) {
          if (step == 0 || plan.sets * tiles_of_set > 1) take_queries(h, tile, set, t);
          index_t const turns = min(tile_turns, plan.turns() - t * tile_turns);
          for (index_t first = 0; first < turns * turn_queries; first += part)
            add_part(tile, first, own, z, sum);
        }
        move_sums(h, own, set, sum, true);
      }
    }
  }

 private:
  /// Number of the warp's first key among the block's.
  __device__ static index_t first_key() { return warp_of_block() * 16; }

  /// Starts copying the warp's keys of a strip; behind the last slot come zeros.
  __device__ static void fetch(window_head const& h, key_pieces<T> const& source, index_t strip,
                               uint4* memory) {
    rows::copy_keys(source, strip + first_key(), h.n, 16, memory + first_key() * rows::pieces,
                    lane_of_warp(), warp_size, [](index_t, index_t) {});
    copies_end();
  }
  /// Waits for the warp's keys and takes them out of shared memory.
  __device__ static void take_keys(window_head const& h, index_t strip, uint4 const* memory,
                                   warp_keys& own) {
    auto const position = [&](index_t slot) {
      return slot < h.n ? h.positions[slot] : above_positions;
    };
    index_t const group = first_key() / group_rows * group_rows;
    own.first = strip + first_key();
    own.position[0] = position(own.slot(0));
    own.position[1] = position(own.slot(1));
    own.lowest = warp_reduce(min(own.position[0], own.position[1]), smaller{});
    own.highest = warp_reduce(max(own.position[0], own.position[1]), larger{});
    index_t const first = strip + group + lane_of_warp();
    own.group_lowest = warp_reduce(min(position(first), position(first + warp_size)), smaller{});
    copies_wait<0>();
    __syncwarp();
    own.operand.take(memory + group * rows::pieces);
    __syncwarp();
  }

  /// Lanes of a quad that share a chain, as a power of two.
  __device__ index_t lane_shift() const { return 2 - plan.shift; }

  /// Takes tile t of a set: as columns, so that a lane finds four queries of a turn in its own registers.
  __device__ void take_queries(window_head const& h, tile_of_queries& tile, index_t set,
                               index_t t) const {
    index_t const shift = 2 + lane_shift(), each = 1 << shift;  // a turn's queries of one chain
    auto const number = [&](index_t i) {
      index_t const x = ((t * tile_turns + i / turn_queries) << shift) + (i & (each - 1));
      if (x >= plan.length) return index_t{-1};
      return per_query_head ? x * h.group + (set << plan.shift) + (i % turn_queries >> shift) : x;
    };
    auto const of_column = [&](index_t i) {
      return number(i / batch_queries * batch_queries +
                    queries::query_of(i % batch_queries / 8, i % 8));
    };
    offset_t const head =
        static_cast<offset_t>(blockIdx.x) * job.n_queries() * static_cast<offset_t>(rows::pieces);
    __syncthreads();  // the last tile may still be read
    bool const some = tile.at.take_info(h, true, number);
    rows::copy_queries(job.split.high + head, tile.at.high, queries::queries, of_column);
    tile.uneven = __syncthreads_or(some ? 1 : 0) != 0;
    if (tile.uneven)
      rows::copy_queries(job.split.rest + head, tile.at.rest, queries::queries, of_column);
    copies_end();
    copies_wait<0>();
    writes_to_products();
    __syncthreads();
  }

  /// Reads or writes the sums of this lane's chain; of the lanes that share it the first one writes.
  __device__ void move_sums(window_head const& h, warp_keys const& own, index_t set,
                            float (&sum)[2], bool write) const {
    index_t const q = lane_of_warp() % 4;
    float* const row = out.at(out_by_id ? h.id : h.at.entry, h.at.head,
                              (set << plan.shift) + (q >> lane_shift()), 0);
    unrolled<2>([&](int x) {
      bool const live = own.slot(x) < h.n;
      if (write && live && (q & ((1 << lane_shift()) - 1)) == 0) row[own.slot(x)] = sum[x];
      if (!write) sum[x] = live && !clear ? row[own.slot(x)] : 0.0f;
    });
  }

  /// Adds what the warp's keys receive from 64 queries of the tile.
  __device__ void add_part(tile_of_queries const& tile, index_t first, warp_keys const& own,
                           group_products& z, float (&sum)[2]) const {
    index_t const* const limits = tile.at.limit + first;
    index_t const a = limits[lane_of_warp()], b = limits[lane_of_warp() + warp_size];
    // The same in all warps of the warpgroup; a shuffle tells the compiler that they are of one mind.
    index_t const highest = __shfl_sync(all_lanes, warp_reduce(max(a, b), larger{}), 0);
    if (highest < __shfl_sync(all_lanes, own.group_lowest, 0)) return;
    bool const uneven = __shfl_sync(all_lanes, tile.uneven ? 1 : 0, 0) != 0;
    if (uneven) multiply_rest(tile, first, own, z);
    multiply(tile.at.high, first, own, z, uneven);
    with_logit(job.layer.kv, [&](auto const& form) {
      unrolled<part / turn_queries>([&](int turn) {
        index_t const limit = limits[turn * turn_queries + lane_of_warp() % turn_queries];
        if (__any_sync(all_lanes, limit >= own.lowest ? 1 : 0) == 0) return;
        bool const all_seen = __all_sync(all_lanes, limit >= own.highest ? 1 : 0) != 0;
        to_weights(form, tile.at, first, turn, own, all_seen, z);
        add_terms(z, turn, sum);
      });
    });
  }
  /// z = the keys times 64 columns, or z more; waits.
  __device__ static void multiply(uint4 const* columns, index_t first, warp_keys const& own,
                                  group_products& z, bool add) {
    products_begin();
    rows::start(T{}, z, own.operand, rows::descriptor(columns + first * rows::pieces), add);
    products_end();
    products_wait<0>(z);
  }
  /// z = the keys times the queries' second numbers.
  __device__ static void multiply_rest(tile_of_queries const& tile, index_t first,
                                       warp_keys const& own, group_products& z) {
    int const* const uneven = tile.at.uneven + first + lane_of_warp();
    unsigned const of_half[2] = {__ballot_sync(all_lanes, uneven[0]),
                                 __ballot_sync(all_lanes, uneven[warp_size])};
    index_t const quad = lane_of_warp() % 4 * 4;
    multiply(tile.at.rest, first, own, z, false);
    unrolled<32>([&](int i) {
      float& rest = z[i / 4][i % 4];
      index_t const query = i / 8 % 2 * turn_queries + quad + i / 4 % 2 * 2 + i % 2;
      rest = rest_of(rest, (of_half[i / 16] >> query & 1u) == 0);
    });
  }

  /// Adds a turn's terms to the chains, of which each lane has four in a row.
  __device__ void add_terms(group_products const& z, int turn, float (&sum)[2]) const {
    for (index_t phase = 0; phase < 1 << lane_shift(); ++phase)
      unrolled<2>([&](int x) {
        float s = sum[x];
        unrolled<4>([&](int i) { s = __fadd_rn(s, z[turn * 2 + i / 2][x * 2 + i % 2]); });
        sum[x] = plan.shift == 2 ? s : pass_on(s, phase);
      });
  }
  /// The sum of the lane whose turn it was.
  __device__ float pass_on(float s, index_t phase) const {
    return __shfl_sync(all_lanes, s, (lane_of_warp() >> lane_shift() << lane_shift()) + phase);
  }
  /// @param first  query of the part
  template <class L>
  __device__ static void to_weights(L const& form, queries const& tile, index_t first, int turn,
                                    warp_keys const& own, bool all_seen, group_products& z) {
    index_t const mine = first + turn * turn_queries + lane_of_warp() % 4 * 4;
    unrolled<4>([&](int i) {
      query_scale const q = tile.scale[mine + i];
      unrolled<2>([&](int x) {
        float& p = z[turn * 2 + i / 2][x * 2 + i % 2];
        float const logit = form(__fmul_rn(p, q.factor));
        p = fast_exp2(__fadd_rn(logit, -q.shift));
        if (!all_seen && own.position[x] > tile.limit[mine + i]) p = 0;
      });
    });
  }
};

}  // namespace kvkeep::cuda
