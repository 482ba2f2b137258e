// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Normalisers of query rows with products of warpgroups, for 16-bit keys of up to 128 features.
#pragma once

#include "core_rows.cuh"

namespace kvkeep::cuda {

/// A slice's share of the normalisers of a tile of queries, 64 per warpgroup, in its registers. Keys come
/// through a ring of stages; a warpgroup's products run beside the other's powers. Grid: heads, slices by tiles.
template <class T, int Blocks>
struct wgmma_slices_kernel {
  using rows = core_rows<Blocks>;
  static constexpr int groups = 2, most_threads = groups * 128, blocks_per_sm = 2;
  static constexpr index_t tile = groups * group_rows;  ///< queries
  static constexpr index_t ring = 4, stage_keys = group_columns;
  static constexpr index_t stage_pieces = stage_keys * rows::pieces;
  window_job job;

  static constexpr std::size_t bytes() {
    return shared_pieces::bytes<uint4>(ring * stage_pieces + tile * rows::pieces) +
           shared_pieces::bytes<index_t>(ring * stage_keys);
  }

  /// The block's shared memory.
  struct stages {
    uint4* keys;         ///< [stage]
    uint4* rest;         ///< [tile] the queries' second numbers, unset if all are 0
    index_t* positions;  ///< [stage][key]

    __device__ explicit stages(shared_pieces s)
        : keys(s.take<uint4>(ring * stage_pieces)),
          rest(s.take<uint4>(tile * rows::pieces)),
          positions(s.take<index_t>(ring * stage_keys)) {}
    __device__ uint4* stage(index_t s) const { return keys + s % ring * stage_pieces; }
    __device__ index_t* positions_of(index_t s) const { return positions + s % ring * stage_keys; }
  };

  /// Where the slice's keys come from.
  struct slice_keys {
    window_head const& h;
    key_pieces<T> source;
    stages const& memory;
    index_t begin, end;

    __device__ index_t n_stages() const {
      return static_cast<index_t>(ceil_div(end - begin, stage_keys));
    }
    /// Starts copying stage s, if there is one.
    __device__ void fetch(index_t s) const {
      index_t const from = begin + s * stage_keys;
      if (from < end)
        rows::copy_keys(source, from, end, stage_keys, memory.stage(s), thread_of_block(),
                        threads_of_block(), [&](index_t key, index_t slot) {
                          copy_position(memory.positions_of(s) + key, h.positions + slot,
                                        slot < end);
                        });
      copies_end();
    }
  };

  /// This lane's queries: rows r and r + 8 of the warp's 16, with r = lane / 4.
  struct lane_queries {
    typename rows::operand high;
    float factor[2];
    index_t limit[2];
    unsigned even;            ///< a bit for each: no second number
    index_t lowest, highest;  ///< limits of the warp's queries
    index_t group_highest;    ///< and of the warpgroup's
  };
  /// A stage of keys, as a warp sees it.
  struct view {
    bool any = false;  ///< some query of the warpgroup sees some key
    bool own = false;  ///< some query of the warp does
    bool all = false;  ///< all queries of the warp see all
  };

  __device__ void operator()() const {
    window_head const h(job);
    index_t const n_tiles = static_cast<index_t>(ceil_div(job.n_queries(), tile));
    index_t const slice = static_cast<index_t>(blockIdx.y) / n_tiles;
    index_t const first = static_cast<index_t>(blockIdx.y) % n_tiles * tile;
    index_t const begin = slice * job.slice_slots, end = min(h.n, begin + job.slice_slots);
    if (begin >= h.n) return;
    stages const memory{shared_pieces{}};
    slice_keys const keys{h, key_pieces<T>(h), memory, begin, end};
    lane_queries own;
    bool const uneven = take_queries(keys, first, own);
    row_sum sum[2];
    with_logit(job.layer.kv, [&](auto const& form) {
      if (uneven)
        add_slice<true>(form, keys, own, sum);
      else
        add_slice<false>(form, keys, own, sum);
    });
    unrolled<2>([&](int x) {
      for (int step = 1; step < 4; step *= 2)
        sum[x] = join(sum[x], {__shfl_xor_sync(all_lanes, sum[x].top, step),
                               __shfl_xor_sync(all_lanes, sum[x].sum, step)});
      index_t const query = first + number(x);
      if (lane_of_warp() % 4 == 0 && query < job.n_queries()) h.slice(slice)[query] = sum[x];
    });
  }

 private:
  /// Number of this lane's query x in the tile.
  __device__ static index_t number(int x) {
    return warp_of_block() * 16 + x * 8 + lane_of_warp() / 4;
  }
  __device__ static index_t group_of_block() { return warp_of_block() / 4; }

  /// Queries come by way of the last two stages' memory; the others are fetched meanwhile.
  /// @return whether some of the tile have second numbers
  __device__ bool take_queries(slice_keys const& keys, index_t first, lane_queries& own) const {
    stages const& memory = keys.memory;
    static_assert(tile <= 2 * stage_keys && ring == 4);
    offset_t const head = static_cast<offset_t>(blockIdx.x) * job.n_queries();
    auto const numbered = [&](index_t i) {
      return first + i < job.n_queries() ? first + i : index_t{-1};
    };
    auto const info = [&](index_t i) {
      index_t const q = numbered(i);
      return q < 0 ? split_query{0, no_position, 0} : job.split.query[head + q];
    };
    rows::copy_queries(job.split.high + head * rows::pieces, memory.stage(2), tile, numbered);
    bool const some = thread_of_block() < tile && info(thread_of_block()).uneven != 0;
    bool const uneven = __syncthreads_or(some ? 1 : 0) != 0;
    if (uneven)
      rows::copy_queries(job.split.rest + head * rows::pieces, memory.rest, tile, numbered);
    copies_end();
    keys.fetch(0);
    keys.fetch(1);
    own.even = 0;
    own.lowest = above_positions;
    unrolled<2>([&](int x) {
      split_query const q = info(number(x));
      own.factor[x] = q.factor;
      own.limit[x] = q.limit;
      own.even |= q.uneven == 0 ? 1u << x : 0u;
      if (numbered(number(x)) >= 0) own.lowest = min(own.lowest, q.limit);
    });
    own.lowest = warp_reduce(own.lowest, smaller{});
    own.highest = warp_reduce(max(own.limit[0], own.limit[1]), larger{});
    index_t const mine = group_of_block() * group_rows + lane_of_warp();
    own.group_highest = warp_reduce(max(info(mine).limit, info(mine + warp_size).limit), larger{});
    copies_wait<2>();
    __syncthreads();
    own.high.take(memory.stage(2) + group_of_block() * group_rows * rows::pieces);
    __syncthreads();
    return uneven;
  }

  /// `any` is the same in all warps of the warpgroup.
  __device__ static view look(index_t const* positions, lane_queries const& own) {
    index_t const a = positions[lane_of_warp()], b = positions[lane_of_warp() + warp_size];
    index_t const least = warp_reduce(min(a, b), smaller{});
    return {__shfl_sync(all_lanes, least <= own.group_highest ? 1 : 0, 0) != 0,
            least <= own.highest, __all_sync(all_lanes, max(a, b) <= own.lowest ? 1 : 0) != 0};
  }

  /// Adds the keys of a slice. The second warpgroup is half a step behind: it multiplies while the first
  /// adds powers, and meets it between its own product and powers. Two stages are on their way meanwhile; when
  /// stage s + 2 starts to come, both have waited for their products of stage s - 2.
  template <bool Uneven, class L>
  __device__ static void add_slice(L const& form, slice_keys const& keys, lane_queries const& own,
                                   row_sum (&sum)[2]) {
    stages const& memory = keys.memory;
    auto const advance = [&](index_t s) {
      copies_wait<1>();
      writes_to_products();
      block_meets();
      keys.fetch(s + 2);
    };
    // A shuffle tells the compiler that warps are of one mind.
    bool const behind = __shfl_sync(all_lanes, group_of_block(), 0) != 0;
    index_t const n = keys.n_stages();
    group_products z = {};
    if (behind) advance(0);
    for (index_t s = 0; s < n; ++s) {
      if (!behind) advance(s);
      view const now = look(memory.positions_of(s), own);
      if (now.any) multiply_stage<Uneven>(memory, own, rows::descriptor(memory.stage(s)), z);
      if (behind) advance(s + 1);
      products_wait<0>(z);
      if (now.own)
        unrolled<2>([&](int x) {
          add_powers(form, z, x, own, now.all ? nullptr : memory.positions_of(s), sum[x]);
        });
    }
    if (!behind) advance(n);
    copies_wait<0>();
  }
  /// Starts the product of the warpgroup's queries and a stage.
  template <bool Uneven>
  __device__ static void multiply_stage(stages const& memory, lane_queries const& own,
                                        unsigned long long keys, group_products& z) {
    products_begin();
    if constexpr (Uneven) {
      rows::start(T{}, z,
                  rows::descriptor(memory.rest + group_of_block() * group_rows * rows::pieces),
                  keys, false);
      products_end();
      products_wait<0>(z);
      unrolled<32>([&](int i) {
        float& rest = z[i / 4][i % 4];
        rest = rest_of(rest, (own.even >> i % 4 / 2 & 1u) != 0);
      });
      products_begin();
    }
    rows::start(T{}, z, own.high, keys, Uneven);
    products_end();
  }

  /// Adds this lane's 16 keys of a stage to its query x. @param positions of the stage, null: it sees all
  template <class L>
  __device__ static void add_powers(L const& form, group_products& z, int x,
                                    lane_queries const& own, index_t const* positions,
                                    row_sum& sum) {
    float top = sum.top;
    unrolled<16>([&](int i) {
      float& logit = z[i / 2][x * 2 + i % 2];
      logit = form(__fmul_rn(logit, own.factor[x]));
      if (positions != nullptr &&
          positions[i / 2 * 8 + lane_of_warp() % 4 * 2 + i % 2] > own.limit[x])
        logit = __uint_as_float(0xff800000u);
      top = max(top, logit);
    });
    float added = 0;
    unrolled<16>([&](int i) {
      added = __fadd_rn(added, fast_exp2(__fadd_rn(z[i / 2][x * 2 + i % 2], -top)));
    });
    sum.sum = __fadd_rn(__fmul_rn(sum.sum, fast_exp2(__fadd_rn(sum.top, -top))), added);
    sum.top = top;
  }
};

}  // namespace kvkeep::cuda
