// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The k best of a head's slots, found by one block: score descending, position ascending.
/// Scores are compared as integers, so that ties, -0, NaN and fast-math cannot change a kept set.
#pragma once

#include "../../../op/select_k.hpp"
#include "guard.cuh"
#include "stages.cuh"

namespace kvkeep::cuda {

inline constexpr int select_bins = 2048;

/// Above the keys of all scores: of slots that stay whatever their score.
inline constexpr unsigned guarded_key = 0xffffffffu;

/// Monotone key of a score: -0 equals +0, NaN lowest but above 0, which marks "no candidate".
__device__ inline unsigned order_key(float x) {
  unsigned const u = __float_as_uint(x), magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 1u;
  return u >> 31 ? 0x80000000u - magnitude : 0x80000000u + magnitude;
}

/// Shared memory of a selection.
struct select_box {
  unsigned* bins;  ///< [select_bins]
  int* box;        ///< [guard_box_size + 3]

  __device__ explicit select_box(shared_pieces& s)
      : bins(s.take<unsigned>(select_bins)), box(s.take<int>(guard_box_size + 3)) {}
  static constexpr std::size_t bytes() {
    return shared_pieces::bytes<unsigned>(select_bins) +
           shared_pieces::bytes<int>(guard_box_size + 3);
  }
};

/// Where a rank lies among values in descending order.
struct ranked {
  unsigned value = 0;  ///< the value that has the rank
  index_t rank = 0;    ///< its rank among the equal ones, from 1
  index_t equals = 0;  ///< how many are equal
};

/// Counts one digit of the values that share the bits above it, and finds the bin of the rank.
/// @return the bin; `rank` becomes the rank inside it, `count` the number of its members
template <class Value>
__device__ unsigned bin_of_rank(index_t n, Value const& value, unsigned above, unsigned prefix,
                                int shift, select_box const& s, index_t& rank, index_t& count) {
  int const each = select_bins / threads_of_block();
  for (int b = thread_of_block(); b < select_bins; b += threads_of_block()) s.bins[b] = 0;
  __syncthreads();
  for (index_t j = thread_of_block(); j < n; j += threads_of_block()) {
    unsigned const v = value(j);
    if (v != 0 && (v & above) == prefix) atomicAdd(&s.bins[v >> shift & (select_bins - 1u)], 1u);
  }
  __syncthreads();
  // Thread t looks at bins from the top: those of lower threads hold larger values.
  int const top = select_bins - 1 - thread_of_block() * each;
  int own = 0;
  for (int i = 0; i < each; ++i) own += static_cast<int>(s.bins[top - i]);
  int const before = sum_before(own, s.box).before;
  int* const found = s.box + warps_of_block();
  if (before < rank && rank <= before + own) {
    int bin = top, left = rank - before;
    for (; left > static_cast<int>(s.bins[bin]); --bin) left -= static_cast<int>(s.bins[bin]);
    found[0] = bin;
    found[1] = left;
    found[2] = static_cast<int>(s.bins[bin]);
  }
  __syncthreads();
  unsigned const bin = static_cast<unsigned>(found[0]);
  rank = found[1];
  count = found[2];
  __syncthreads();
  return bin;
}

/// The value of a rank (from 1, descending) among those that are not 0. Precondition: there are as many.
template <class Value>
__device__ ranked find_rank(index_t n, index_t rank, Value const& value, select_box const& s) {
  ranked r;
  r.rank = rank;
  unsigned const high = bin_of_rank(n, value, 0u, 0u, 21, s, r.rank, r.equals) << 21;
  unsigned const middle = high | bin_of_rank(n, value, 0xffe00000u, high, 10, s, r.rank, r.equals)
                                     << 10;
  // Ten bits are left: the bin's highest bit is the last one above, which all of them share.
  unsigned const low = bin_of_rank(n, value, 0xfffffc00u, middle, 0, s, r.rank, r.equals);
  r.value = middle | (low & 0x3ffu);
  return r;
}

/// What is kept of the candidates: keys above `key`, and of equal ones positions up to `position`.
struct keep_limit {
  unsigned key = 0;
  index_t position = 0;

  __device__ bool keeps(unsigned k, index_t p) const {
    return k > key || (k == key && p <= position);
  }
};

/// The limit that keeps the `wanted` best of `n_candidates`. @param key of slot j, 0: no candidate
template <class Key, class Position>
__device__ keep_limit find_limit(index_t n, index_t wanted, index_t n_candidates, Key const& key,
                                 Position const& position, select_box const& s) {
  if (wanted <= 0) return {guarded_key - 1, -1};
  if (wanted >= n_candidates) return {1u, 0x7fffffff};
  ranked const r = find_rank(n, wanted, key, s);
  if (r.rank == r.equals) return {r.value, 0x7fffffff};
  ranked const p = find_rank(
      n, r.rank,
      [&](index_t j) { return key(j) == r.value ? ~static_cast<unsigned>(position(j)) : 0u; }, s);
  return {r.value, static_cast<index_t>(~p.value)};
}

/// Lists the slots that are kept, ascending: warps count theirs, then place them. @return how many, in every thread
template <class Keep>
__device__ index_t list_kept(index_t n, Keep const& keep, index_t* out, select_box const& s) {
  constexpr index_t round = select_bins * warp_size;
  index_t count = 0;
  for (index_t first = 0; first < n; first += round) {
    index_t const end = min(n, first + round);
    auto const each_warp =
        [&](auto const& f) {  // f(bin, whether the lane's slot is kept, the slot)
          for (index_t base = first + warp_of_block() * warp_size; base < end;
               base += threads_of_block()) {
            index_t const j = base + lane_of_warp();
            f(s.bins[(base - first) / warp_size], j < end && keep(j), j);
          }
        };
    each_warp([](unsigned& bin, bool mine, index_t) {
      unsigned const set = __ballot_sync(all_lanes, mine);
      if (lane_of_warp() == 0) bin = static_cast<unsigned>(__popc(set));
    });
    __syncthreads();
    index_t const bins = (end - first + warp_size - 1) / warp_size;
    index_t const each = (bins + threads_of_block() - 1) / threads_of_block();
    index_t const from = min(bins, thread_of_block() * each), to = min(bins, from + each);
    int own = 0;
    for (index_t b = from; b < to; ++b) own += static_cast<int>(s.bins[b]);
    prefix_sum<int> const sum = sum_before(own, s.box);
    unsigned before = static_cast<unsigned>(count + sum.before);
    for (index_t b = from; b < to; ++b) {
      unsigned const in_bin = s.bins[b];
      s.bins[b] = before;
      before += in_bin;
    }
    __syncthreads();
    each_warp([&](unsigned const& bin, bool mine, index_t j) {
      unsigned const set = __ballot_sync(all_lanes, mine);
      if (mine) out[bin + rank_in(set)] = j;
    });
    __syncthreads();  // the bins are free again
    count += sum.total;
  }
  return count;
}

struct select_kernel {
  static constexpr int most_threads = 1024, blocks_per_sm = 1;
};

__device__ inline guard_counts counts_of(guard_ref<device_space> const& g, index_t id) {
  return {g.sinks, g.recent, g.frozen != nullptr ? g.frozen[id] : 0};
}

/// Keys of a head's slots; those that a guard protects are no candidates.
template <bool Cached>
struct slot_keys {
  index_t const* positions;  ///< [n] device
  float const* scores;       ///< [n] device
  open_range open;
  unsigned* cache;  ///< [n] shared, if `Cached`

  __device__ unsigned make(index_t j) const {
    return open.has(positions[j]) ? order_key(scores[j]) : guarded_key;
  }
  __device__ unsigned operator()(index_t j) const {
    if constexpr (Cached)
      return cache[j];
    else
      return make(j);
  }
  /// 0: no candidate.
  __device__ unsigned candidate(index_t j) const {
    unsigned const key = (*this)(j);
    return key == guarded_key ? 0u : key;
  }
  /// Fills the cache. @return the number of candidates
  __device__ index_t count(index_t n, int* box) const {
    return count_slots(n, box, [&](index_t j) {
      unsigned const key = make(j);
      if constexpr (Cached) cache[j] = key;
      return key != guarded_key;
    });
  }
};

/// One block per head. Cost: positions five times, scores once if keys are cached, else six times: all but the first
/// time from the first-level cache when they fit.
template <bool Cached>
struct select_k_kernel : select_kernel {
  op::select_k<device_space> o;

  /// @param slots  most of a head
  static std::size_t bytes(index_t slots) {
    return select_box::bytes() + (Cached ? shared_pieces::bytes<unsigned>(slots) : 0);
  }
  __device__ void operator()() const {
    shared_pieces shared;
    select_box const s(shared);
    block_head const at(o.slots.lengths.extent[1]);
    index_t const id = o.batch.id_of(at.entry), n = o.slots.lengths(id, at.head);
    index_t const k = o.k(id, at.head);
    index_t const* const positions = o.slots.positions.at(id, at.head, 0);
    index_t* const out = o.out.slots.at(at.entry, at.head, 0);
    index_t kept = n;
    if (k < n) {
      slot_keys<Cached> const key{positions, o.scores.at(at.entry, at.head, 0),
                                  find_open(positions, n, counts_of(o.guard, id), s.box),
                                  shared.take<unsigned>(Cached ? n : 0)};
      index_t const candidates = key.count(n, s.box);
      keep_limit const limit = find_limit(
          n, k - (n - candidates), candidates, [&](index_t j) { return key.candidate(j); },
          [&](index_t j) { return positions[j]; }, s);
      kept = list_kept(
          n, [&](index_t j) { return limit.keeps(key(j), positions[j]); }, out, s);
    } else {
      for (index_t j = thread_of_block(); j < n; j += threads_of_block()) out[j] = j;
    }
    if (thread_of_block() == 0) o.out.count(at.entry, at.head) = kept;
  }
};

/// Key and first position of each whole block, then as select_k. `blocks`: [entry * kv_head][most_blocks] scratch
struct select_blocks_kernel : select_kernel {
  op::select_blocks<device_space> o;
  uint2* blocks;
  index_t most_blocks;

  __device__ void operator()() const {
    shared_pieces shared;
    select_box const s(shared);
    block_head const at(o.slots.lengths.extent[1]);
    index_t const id = o.batch.id_of(at.entry), n = o.slots.lengths(id, at.head);
    index_t const n_blocks = n / o.block, wanted = max(o.k(id, at.head), 0) / o.block;
    index_t const* const positions = o.slots.positions.at(id, at.head, 0);
    float const* const scores = o.scores.at(at.entry, at.head, 0);
    uint2* const own = blocks + static_cast<offset_t>(blockIdx.x) * most_blocks;
    open_range const open = find_open(positions, n, counts_of(o.guard, id), s.box);
    for (index_t i = thread_of_block(); i < n_blocks; i += threads_of_block()) {
      float sum = 0, best = __uint_as_float(0xff800000u);
      bool allowed = true;
      for (index_t j = i * o.block; j < (i + 1) * o.block; ++j) {
        sum = __fadd_rn(sum, scores[j]);
        if (order_key(scores[j]) > order_key(best)) best = scores[j];
        allowed = allowed && open.has(positions[j]);
      }
      unsigned const key = order_key(o.how == reduction::max ? best : sum);
      own[i] = make_uint2(allowed ? key : 0u, static_cast<unsigned>(positions[i * o.block]));
    }
    __syncthreads();
    index_t const candidates =
        count_slots(n_blocks, s.box, [&](index_t i) { return own[i].x != 0; });
    keep_limit const limit = find_limit(
        n_blocks, wanted - (n_blocks - candidates), candidates, [&](index_t i) { return own[i].x; },
        [&](index_t i) { return static_cast<index_t>(own[i].y); }, s);
    index_t const count = list_kept(
        n,
        [&](index_t j) {
          uint2 const b = j < n_blocks * o.block ? own[j / o.block] : make_uint2(0u, 0u);
          return b.x == 0 || limit.keeps(b.x, static_cast<index_t>(b.y));
        },
        o.out.slots.at(at.entry, at.head, 0), s);
    if (thread_of_block() == 0) o.out.count(at.entry, at.head) = count;
  }
};

}  // namespace kvkeep::cuda
