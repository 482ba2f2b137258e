// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Decode attention: a split by a block, and by the last block of a row the rest. What differs by type and layout is a
/// `Path`: the plain one here, a fast one in attend_rows.cuh. Both add in the same order, so that a layout does not
/// change bits.
#pragma once

#include <algorithm>

#include "attend_last.cuh"

namespace kvkeep::cuda {

/// Heads that a kernel works on: all, those whose rows are 16-byte aligned, or the others.
enum class rows_taken : std::uint8_t { all, aligned, others };

/// A split's sums and logits, of `at.n` > 0 slots whose rows' addresses are in the box.
template <class Path>
__device__ void sum_split(attend_task const& t, split_place const& at, split_box const& box) {
  bool const wants_values = t.out.data != nullptr;
  Path::dot_products(t, at, box);
  typename Path::first_rows ahead(at, box, wants_values);
  __syncthreads();
  weigh_split(t, at, box.z);
  if (!wants_values) return;
  __syncthreads();
  Path::add_values(t, at, box, ahead);
}

/// Addresses of the split's rows. @return whether they are aligned
__device__ inline bool find_rows(attend_task const& t, split_place const& at,
                                 split_box const& box) {
  index_t const seq = t.batch.row_of(at.entry), first = at.split * split_slots;
  bool aligned = true;
  {
    head_rows const rows(t.kv.k, seq, at.head);
    aligned = rows.alignment(t.kv.k.dim * dtype_bytes(t.kv.k.type)) == 16;
    for (index_t j = thread_of_block(); j < at.n; j += split_threads)
      box.keys[j] = rows.bytes(first + j);
  }
  if (t.out.data != nullptr) {
    head_rows const rows(t.kv.v, seq, at.head);
    aligned = aligned && rows.alignment(t.kv.v.dim * dtype_bytes(t.kv.v.type)) == 16;
    for (index_t j = thread_of_block(); j < at.n; j += split_threads)
      box.values[j] = rows.bytes(first + j);
  }
  return aligned;
}

/// Rows of any type, dimension and feature order.
struct plain_path {
  /// Values that are loaded before they are needed: none.
  struct first_rows {
    __device__ first_rows(split_place const&, split_box const&, bool) {}
  };

  /// Lane l of a row takes pieces l, l + lanes, ... of 16 bytes (8 where a feature has one), as the fast path does.
  __device__ static void dot_products(attend_task const& t, split_place const& at,
                                      split_box const& box) {
    index_t const dim = t.kv.shape.dim_k, lanes = row_lanes(dim), groups = split_threads / lanes;
    index_t const group = thread_of_block() / lanes, lane = thread_of_block() % lanes;
    index_t const each = min(16 / dtype_bytes(t.kv.k.type), 8);
    offset_t const q = t.query_at(at.entry, at.q_head(t), at.row);
    for (index_t base = 0; base < at.n; base += groups) {
      index_t const slot = base + group;
      std::byte const* const row = box.keys[min(slot, at.n - 1)];
      float x[most_tile_heads] = {};
      for (index_t first = lane * each; first < dim; first += lanes * each)
        for (index_t d = first; d < min(first + each, dim); ++d) {
          float const k = feature(t.kv.k, row, d);
          for (index_t i = 0; i < most_tile_heads; ++i)
            if (i < at.count)
              x[i] = __fmaf_rn(query_feature(t.q, q + i * t.q.head_stride + d), k, x[i]);
        }
      for (index_t i = 0; i < most_tile_heads; ++i) {
        for (index_t step = lanes / 2; step > 0; step /= 2)
          x[i] += __shfl_xor_sync(all_lanes, x[i], step);
        if (i < at.count && lane == 0 && slot < at.n) box.z[i * split_slots + slot] = x[i];
      }
    }
  }

  /// A group of lanes adds every `groups`th slot; then groups of a warp, then warps are added.
  __device__ static void add_values(attend_task const& t, split_place const& at,
                                    split_box const& box, first_rows const&) {
    index_t const dim = t.kv.shape.dim_v, lanes = row_lanes(dim), groups = split_threads / lanes;
    index_t const group = thread_of_block() / lanes, lane = thread_of_block() % lanes;
    for (index_t first = 0; first < dim; first += lanes) {
      index_t const d = first + lane;
      float x[most_tile_heads] = {};
      for (index_t j = group; j < at.n && d < dim; j += groups) {
        float const v = feature(t.kv.v, box.values[j], d);
        for (index_t i = 0; i < most_tile_heads; ++i)
          if (i < at.count) x[i] = __fmaf_rn(box.z[i * split_slots + j], v, x[i]);
      }
      __syncthreads();  // the sums may still be read for earlier features
      for (index_t i = 0; i < most_tile_heads; ++i) {
        for (index_t step = warp_size / 2; step >= lanes; step /= 2)
          x[i] += __shfl_xor_sync(all_lanes, x[i], step);
        if (lane_of_warp() < lanes)
          box.sums[(warp_of_block() * most_tile_heads + i) * lanes + lane] = x[i];
      }
      __syncthreads();
      for (index_t i = thread_of_block(); i < at.count * lanes; i += split_threads) {
        float sum = box.sums[i];
        for (index_t w = 1; w < warps_of_block(); ++w)
          sum += box.sums[w * most_tile_heads * lanes + i];
        if (first + i % lanes < dim)
          t.values[at.piece(t, i / lanes) * dim + first + i % lanes] = sum;
      }
    }
  }
  static constexpr index_t sums_floats = split_threads * most_tile_heads;
};

/// One block's split, and what follows if it is the last one of its rows. Where there are more splits than expected, a
/// block takes others too: by the plain path, so that the fast one stays as it is, without a loop's registers.
template <class Path>
__device__ void attend_split(attend_task const& t, rows_taken which) {
  split_place at(t);
  if (at.idle(t)) return;
  split_box const box(t.tile);
  bool const aligned = find_rows(t, at, box);
  if (which != rows_taken::all && aligned != (which == rows_taken::aligned)) return;
  __syncthreads();
  if (at.n > 0) sum_split<Path>(t, at, box);
  while (at.next()) {
    __syncthreads();  // of whoever still reads the box
    find_rows(t, at, box);
    __syncthreads();
    sum_split<plain_path>(t, at, box);
  }
  if (t.tickets != nullptr && at.last(t)) merge_as_last(t, at);
}
/// Shared memory of that.
inline std::size_t split_bytes(attend_task const& t, index_t sums) {
  constexpr index_t warps = split_threads / warp_size;
  return std::max(split_box::bytes(t.tile, std::max(sums, plain_path::sums_floats)),
                  merge_box::bytes(t.tile, warps));
}

struct attend_plain_kernel {
  static constexpr int most_threads = split_threads, blocks_per_sm = 3;
  attend_task t;
  rows_taken which;

  __device__ void operator()() const { attend_split<plain_path>(t, which); }
  std::size_t shared_bytes() const { return split_bytes(t, plain_path::sums_floats); }
};

}  // namespace kvkeep::cuda
