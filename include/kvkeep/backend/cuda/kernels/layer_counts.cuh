// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Joint top-k counts over several score maps: one radix selection over all of an entry's heads, its
/// histograms spread over many blocks. Counts are whole numbers, so their order does not matter.
#pragma once

#include "../../../op/layer_counts.hpp"
#include "select.cuh"
#include "sums.cuh"

namespace kvkeep::cuda {

/// Where the joint selection of one entry stands.
struct joint_rank {
  long long left;   ///< rank that is looked for, inside the values with the prefix
  unsigned prefix;  ///< leading digits of the value; in the end the value itself
  int open;         ///< 0: nothing is left to select
};

/// What the kernels of the op share. A part is one KV head of one map, in map-major order.
struct joint_part {
  op::layer_counts<device_space> o;
  index_t heads;
  float* factor;  ///< [entry][part], or null: 1
  /// [entry][part] key of the last safe candidate, and how many equal ones are open; or null.
  uint2* safe;
  unsigned* bins;    ///< [entry][select_bins]
  unsigned* above;   ///< [entry][part] open keys above the limit
  unsigned* equal;   ///< [entry][part] open keys equal to it
  joint_rank* rank;  ///< [entry]

  __device__ index_t parts() const { return o.n_maps * heads; }
  __device__ index_t size(index_t entry, index_t part) const {
    return max(0, o.candidates(entry, part % heads) - o.skip);
  }
  __device__ float const* scores(index_t entry, index_t part) const {
    return o.scores.at(part / heads, entry, part % heads, o.skip);
  }
  __device__ index_t& out(index_t entry, index_t part) const {
    return o.out(part / heads, entry, part % heads);
  }
};

/// Hands `left` out to the parts, lower ones first: give(part, share) with a share of at most want(part).
/// @return what is left
template <class Want, class Give>
__device__ long long hand_out(index_t parts, long long left, long long* box, Want const& want,
                              Give const& give) {
  for (index_t first = 0; first < parts; first += threads_of_block()) {
    index_t const p = first + thread_of_block();
    long long const own = p < parts ? want(p) : 0;
    prefix_sum<long long> const s = sum_before(own, box);
    if (p < parts) give(p, static_cast<index_t>(min(max(left - s.before, 0ll), own)));
    left = max(left - s.total, 0ll);
  }
  return left;
}

/// Factor and safe candidates of one part. One block per entry and part.
struct joint_head_kernel : select_kernel, joint_part {
  static std::size_t bytes() { return select_box::bytes() + sum_box::bytes(2); }

  __device__ void operator()() const {
    shared_pieces shared;
    select_box const s(shared);
    sum_box const sums(shared, 2);
    index_t const entry = static_cast<index_t>(blockIdx.x) / parts();
    index_t const part = static_cast<index_t>(blockIdx.x) % parts(), n = size(entry, part);
    float const* const scores_of = scores(entry, part);
    float share = 1;
    if (factor != nullptr) {
      if (n > 0) share = share_of_best(scores_of, n, s, sums);
      if (thread_of_block() == 0) factor[blockIdx.x] = share;
    }
    if (safe == nullptr) return;
    index_t const n_safe = min(max(o.safe, 0), n);
    uint2 limit = make_uint2(0xffffffffu, 0u);  // above every key: none is safe
    if (n_safe > 0) {
      ranked const r = find_rank(
          n, n_safe, [&](index_t j) { return order_key(__fmul_rn(scores_of[j], share)); }, s);
      limit = make_uint2(r.value, static_cast<unsigned>(r.equals - r.rank));
    }
    if (thread_of_block() == 0) safe[blockIdx.x] = limit;
  }

 private:
  /// The score that has a key.
  __device__ static float score_of(unsigned key) {
    if (key == 1u) return __uint_as_float(0x7fc00000u);
    return __uint_as_float(key >= 0x80000000u ? key - 0x80000000u
                                              : 0x80000000u | (0x80000000u - key));
  }
  /// (Sum of the best scores) / (sum of all), 0 where the latter is 0.
  __device__ float share_of_best(float const* x, index_t n, select_box const& s,
                                 sum_box const& sums) const {
    ranked const r = find_rank(
        n, min(max(o.best_per_head, 1), n), [&](index_t j) { return order_key(x[j]); }, s);
    sum_slots<2>(n, sums, 0, [&](index_t j, double(&sum)[2]) {
      sum[0] += static_cast<double>(x[j]);
      if (order_key(x[j]) > r.value) sum[1] += static_cast<double>(x[j]);
    });
    double const all = sums.sums[0];
    double const top =
        sums.sums[1] + static_cast<double>(r.rank) * static_cast<double>(score_of(r.value));
    return all == 0 || o.best_per_head <= 0 ? 0.0f : static_cast<float>(top / all);
  }
};

/// Safe candidates count first; the rest is what the selection looks for. One block per entry.
struct joint_start_kernel : joint_part {
  static constexpr int most_threads = 256, blocks_per_sm = 1;

  __device__ void operator()() const {
    shared_pieces shared;
    long long* const box = shared.take<long long>(warp_size);
    index_t const entry = static_cast<index_t>(blockIdx.x);
    offset_t const first = static_cast<offset_t>(entry) * parts();
    long long total = 0;
    for (index_t p = thread_of_block(); p < parts(); p += threads_of_block()) {
      total += size(entry, p);
      above[first + p] = equal[first + p] = 0;
    }
    total = block_reduce(total, box, add{});
    for (int b = thread_of_block(); b < select_bins; b += threads_of_block())
      bins[entry * static_cast<offset_t>(select_bins) + b] = 0;
    long long const wanted = static_cast<long long>(o.best_per_head) * parts();
    long long const left = hand_out(
        parts(), min(max(wanted, 0ll), total), box,
        [&](index_t p) { return min(max(o.safe, 0), size(entry, p)); },
        [&](index_t p, index_t share) { out(entry, p) = share; });
    if (thread_of_block() == 0) rank[entry] = {left, 0u, left > 0 ? 1 : 0};
  }
};

/// Open keys of a stretch of one part. Grid: entries * parts, stretches.
struct joint_stretch : joint_part {
  static constexpr int most_threads = 512, blocks_per_sm = 2;
  static constexpr index_t stretch = 16384;  ///< slots of a block

  /// f(key, how many) for each open key of the block's stretch; equal ones of the last safe candidate all at
  /// once, by the first block.
  template <class F>
  __device__ void each_open(index_t entry, index_t part, F const& f) const {
    index_t const first = static_cast<index_t>(blockIdx.y) * stretch, n = size(entry, part);
    index_t const end = min(n - first, stretch) + first;
    float const* const x = scores(entry, part);
    float const share = factor != nullptr ? factor[blockIdx.x] : 1.0f;
    uint2 const limit = safe != nullptr ? safe[blockIdx.x] : make_uint2(0xffffffffu, 0u);
    for (index_t j = first + thread_of_block(); j < end; j += threads_of_block()) {
      unsigned const key = order_key(__fmul_rn(x[j], share));
      if (key < limit.x) f(key, 1u);
    }
    if (blockIdx.y == 0 && thread_of_block() == 0 && limit.y > 0) f(limit.x, limit.y);
  }
};

/// Counts one digit of the open keys that have the prefix.
struct joint_bins_kernel : joint_stretch {
  unsigned mask;  ///< of the prefix
  int shift;

  __device__ void operator()() const {
    shared_pieces shared;
    unsigned* const own = shared.take<unsigned>(select_bins);
    index_t const entry = static_cast<index_t>(blockIdx.x) / parts();
    index_t const part = static_cast<index_t>(blockIdx.x) % parts();
    joint_rank const r = rank[entry];
    if (r.open == 0 || static_cast<index_t>(blockIdx.y) * stretch >= size(entry, part)) return;
    for (int b = thread_of_block(); b < select_bins; b += threads_of_block()) own[b] = 0;
    __syncthreads();
    each_open(entry, part, [&](unsigned key, unsigned count) {
      if ((key & mask) == r.prefix) atomicAdd(&own[key >> shift & (select_bins - 1u)], count);
    });
    __syncthreads();
    unsigned* const all = bins + entry * static_cast<offset_t>(select_bins);
    for (int b = thread_of_block(); b < select_bins; b += threads_of_block())
      if (own[b] != 0) atomicAdd(&all[b], own[b]);
  }
};

/// Finds the bin of the rank, and clears the bins. One block per entry.
struct joint_digit_kernel : joint_part {
  static constexpr int most_threads = 256, blocks_per_sm = 1;
  unsigned keep;  ///< bits of the bin that the prefix lacks
  int shift;

  __device__ void operator()() const {
    shared_pieces shared;
    long long* const box = shared.take<long long>(warp_size);
    index_t const entry = static_cast<index_t>(blockIdx.x);
    joint_rank const r = rank[entry];
    if (r.open == 0) return;
    unsigned* const all = bins + entry * static_cast<offset_t>(select_bins);
    // Thread t looks at bins from the top: those of lower threads hold larger keys.
    int const each = select_bins / threads_of_block();
    int const top = select_bins - 1 - thread_of_block() * each;
    long long own = 0;
    for (int i = 0; i < each; ++i) own += all[top - i];
    long long const before = sum_before(own, box).before;  // every thread has read the rank
    if (before < r.left && r.left <= before + own) {
      int bin = top;
      long long left = r.left - before;
      for (; left > static_cast<long long>(all[bin]); --bin) left -= all[bin];
      rank[entry] = {left, r.prefix | (static_cast<unsigned>(bin) & keep) << shift, 1};
    }
    for (int i = 0; i < each; ++i) all[top - i] = 0;
  }
};

/// Counts what is above the limit, and what is equal to it.
struct joint_tally_kernel : joint_stretch {
  __device__ void operator()() const {
    shared_pieces shared;
    auto* const box = shared.take<unsigned long long>(warp_size);
    index_t const entry = static_cast<index_t>(blockIdx.x) / parts();
    index_t const part = static_cast<index_t>(blockIdx.x) % parts();
    joint_rank const r = rank[entry];
    if (r.open == 0 || static_cast<index_t>(blockIdx.y) * stretch >= size(entry, part)) return;
    unsigned long long both = 0;  // above in the upper half, equal in the lower
    each_open(entry, part, [&](unsigned key, unsigned count) {
      if (key > r.prefix) both += static_cast<unsigned long long>(count) << 32;
      if (key == r.prefix) both += count;
    });
    both = block_reduce(both, box, add{});
    if (thread_of_block() != 0) return;
    atomicAdd(&above[blockIdx.x], static_cast<unsigned>(both >> 32));
    atomicAdd(&equal[blockIdx.x], static_cast<unsigned>(both));
  }
};

/// Hands out the equal ones. One block per entry.
struct joint_finish_kernel : joint_part {
  static constexpr int most_threads = 256, blocks_per_sm = 1;

  __device__ void operator()() const {
    shared_pieces shared;
    long long* const box = shared.take<long long>(warp_size);
    index_t const entry = static_cast<index_t>(blockIdx.x);
    joint_rank const r = rank[entry];
    if (r.open == 0) return;
    offset_t const first = static_cast<offset_t>(entry) * parts();
    hand_out(
        parts(), r.left, box, [&](index_t p) { return static_cast<long long>(equal[first + p]); },
        [&](index_t p, index_t share) {
          out(entry, p) += static_cast<index_t>(above[first + p]) + share;
        });
  }
};

}  // namespace kvkeep::cuda
