// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Decode attention: a block takes the slots of one split, for the query heads that share them. It leaves
/// maximum, sum and weighted values of the split, and the logits if somebody asks for weights
/// (attend_merge.cuh goes on from there). What differs by type and layout is a `Path`: the plain one here,
/// a fast one in attend_rows.cuh. Both add in the same order, so that a layout does not change bits.
#pragma once

#include "../../../op/attend.hpp"
#include "../attend_plan.hpp"
#include "rows.cuh"

namespace kvkeep::cuda {

/// Largest logit of some slots, and the sum of exp(z - max).
struct softmax_part {
  float max, sum;
};

/// What turns a row's logits into weights, and those into probabilities.
struct row_scale {
  float max, inverse;
};

/// What a launch sequence works on: op::attend (one query row), or op::row_weights.
struct attend_task {
  batch_ref<device_space> batch;
  kv_ref<device_space> kv;
  tensor_ref<index_t, 2, device_space> lengths;
  queries q;                                            ///< [entry or id, q_head, row, dim_k]
  tensor_ref<index_t const, 2, device_space> position;  ///< of the rows, negative: absent; or null
  bool rows_by_id = false;
  index_t n_rows = 1;
  index_t ring = 1;
  index_t const* weight_row = nullptr;
  tensor_ref<float, 3, device_space> out;
  tensor_ref<float, 2, device_space> lse;
  tensor_ref<float, 4, device_space> weights, weight_sum, weight_max;
  offset_t ring_stride = 0;
  weight_fold<device_space> fold;
  tensor_ref<std::uint8_t const, 3, device_space> visible;

  float* values = nullptr;        ///< [entry, q_head, row, split, dim_v] scratch
  softmax_part* shown = nullptr;  ///< [entry, q_head, row, split] of the visible slots
  softmax_part* all = nullptr;    ///< the same of all slots
  row_scale* totals = nullptr;    ///< [entry, q_head, row] of all slots
  float* logits = nullptr;        ///< [entry, q_head, slot], where `weights` cannot hold them
  index_t splits = 0, tile = 1, tiles = 1;

  /// Index of a query row in the scratch.
  __device__ offset_t row_index(index_t entry, index_t q_head, index_t row) const {
    return (static_cast<offset_t>(entry) * kv.shape.n_q_heads + q_head) * n_rows + row;
  }
  __device__ index_t source_of(index_t entry) const {
    return rows_by_id ? batch.id_of(entry) : entry;
  }
  /// Where a query row starts, in elements.
  __device__ offset_t query_at(index_t entry, index_t q_head, index_t row) const {
    return source_of(entry) * q.entry_stride + q_head * q.head_stride + row * q.row_stride;
  }
  __device__ bool present(index_t entry, index_t row) const {
    return position.data == nullptr || position(source_of(entry), row) >= 0;
  }
  __device__ index_t ring_row(index_t entry, index_t row) const {
    if (position.data != nullptr) return position(source_of(entry), row) % ring;
    return weight_row != nullptr ? weight_row[entry] : 0;
  }
  /// Where query head g of the group keeps its logits, later weights if `weights` is given; null: nowhere.
  __device__ float* weight_slots(index_t entry, index_t head, index_t g, index_t row) const {
    if (weights.data != nullptr)
      return weights.at(batch.id_of(entry), head, g, 0) + ring_row(entry, row) * ring_stride;
    if (logits == nullptr) return nullptr;
    return logits + row_index(entry, head * kv.shape.group() + g, row) * kv.shape.max_slots;
  }
};

/// What a block of a split_grid works on.
struct split_place {
  index_t entry, head, row;
  index_t g;      ///< first query head of the tile in its group
  index_t count;  ///< query heads of the tile
  index_t split, n;

  __device__ explicit split_place(attend_task const& t) {
    index_t x = static_cast<index_t>(blockIdx.x);
    g = x % t.tiles * t.tile;
    x /= t.tiles;
    row = x % t.n_rows;
    x /= t.n_rows;
    head = x % t.kv.shape.n_kv_heads;
    entry = x / t.kv.shape.n_kv_heads;
    count = min(t.tile, t.kv.shape.group() - g);
    split = static_cast<index_t>(blockIdx.y);
    n = min(t.lengths(t.batch.id_of(entry), head) - split * split_slots, split_slots);
    if (!t.present(entry, row)) n = 0;
  }
  __device__ index_t q_head(attend_task const& t) const { return head * t.kv.shape.group() + g; }
  /// Index of a split of query head g + i in the scratch.
  __device__ offset_t piece(attend_task const& t, index_t i) const {
    return t.row_index(entry, q_head(t) + i, row) * t.splits + split;
  }
};

/// A block's shared memory: row addresses, a tile of logits, then weights, and sums of its warps.
struct split_box {
  std::byte const **keys, **values;  ///< [split_slots]
  float* z;                          ///< [query head of the tile][split_slots]
  float* sums;

  __device__ explicit split_box(index_t tile) {
    shared_pieces pieces;
    keys = pieces.take<std::byte const*>(split_slots);
    values = pieces.take<std::byte const*>(split_slots);
    z = pieces.take<float>(tile * split_slots);
    sums = pieces.take<float>(0);
  }
  static std::size_t bytes(index_t tile, index_t sums) {
    return 2 * shared_pieces::bytes<std::byte const*>(split_slots) +
           shared_pieces::bytes<float>(tile * split_slots) + shared_pieces::bytes<float>(sums);
  }
};

/// Dot products become logits, which are put where weights are asked for, and then weights of this
/// split's own maximum. A warp takes a query head.
__device__ inline void weigh_split(attend_task const& t, split_place const& at, float* z) {
  constexpr int each = split_slots / warp_size;
  logit_form const form{t.kv.scale, t.kv.softcap};
  index_t const first = at.split * split_slots, lane = lane_of_warp();
  for (index_t i = warp_of_block(); i < at.count; i += warps_of_block()) {
    float* const row = z + i * split_slots;
    float* const kept = t.weight_slots(at.entry, at.head, at.g + i, at.row);
    float x[each];
    softmax_part part{-largest_float, 0};
    for (int k = 0; k < each; ++k) {
      index_t const j = lane + k * warp_size;
      x[k] = j < at.n ? form(row[j]) : -largest_float;
      if (kept != nullptr && j < at.n) kept[first + j] = x[k];
      part.max = larger{}(part.max, x[k]);
    }
    part.max = warp_reduce(part.max, larger{});
    for (int k = 0; k < each; ++k) {
      index_t const j = lane + k * warp_size;
      float const e = j < at.n ? weight_of(x[k] - part.max) : 0.0f;
      row[j] = e;
      part.sum += e;
    }
    part.sum = warp_reduce(part.sum, add{});
    if (lane == 0) t.all[at.piece(t, i)] = part;
    if (t.visible.data == nullptr) continue;

    std::uint8_t const* const see = t.visible.at(at.entry, at.q_head(t) + i, first);
    part = {-largest_float, 0};
    unsigned hidden = 0;
    for (int k = 0; k < each; ++k) {
      index_t const j = lane + k * warp_size;
      if (j < at.n && see[j] != 0)
        part.max = larger{}(part.max, x[k]);
      else
        hidden |= 1u << k;
    }
    part.max = warp_reduce(part.max, larger{});
    for (int k = 0; k < each; ++k) {
      float const e = (hidden >> k & 1) != 0 ? 0.0f : weight_of(x[k] - part.max);
      row[lane + k * warp_size] = e;
      part.sum += e;
    }
    part.sum = warp_reduce(part.sum, add{});
    if (lane == 0) t.shown[at.piece(t, i)] = part;
  }
}

/// Heads that a kernel works on: all, those whose rows are 16-byte aligned, or the others.
enum class rows_taken : std::uint8_t { all, aligned, others };

/// One block's split.
template <class Path>
__device__ void attend_split(attend_task const& t, rows_taken which) {
  split_place const at(t);
  if (at.n <= 0) return;
  split_box const box(t.tile);
  index_t const seq = t.batch.row_of(at.entry), first = at.split * split_slots;
  bool const wants_values = t.out.data != nullptr;
  bool aligned = true;
  {
    head_rows const rows(t.kv.k, seq, at.head);
    aligned = rows.alignment(t.kv.k.dim * dtype_bytes(t.kv.k.type)) == 16;
    for (index_t j = thread_of_block(); j < at.n; j += split_threads)
      box.keys[j] = rows.bytes(first + j);
  }
  if (wants_values) {
    head_rows const rows(t.kv.v, seq, at.head);
    aligned = aligned && rows.alignment(t.kv.v.dim * dtype_bytes(t.kv.v.type)) == 16;
    for (index_t j = thread_of_block(); j < at.n; j += split_threads)
      box.values[j] = rows.bytes(first + j);
  }
  if (which != rows_taken::all && aligned != (which == rows_taken::aligned)) return;
  __syncthreads();
  Path::dot_products(t, at, box);
  typename Path::first_rows ahead(at, box, wants_values);
  __syncthreads();
  weigh_split(t, at, box.z);
  if (!wants_values) return;
  __syncthreads();
  Path::add_values(t, at, box, ahead);
}

/// Rows of any type, dimension and feature order.
struct plain_path {
  /// Values that are loaded before they are needed: none.
  struct first_rows {
    __device__ first_rows(split_place const&, split_box const&, bool) {}
  };

  /// Lane l of a row takes pieces l, l + lanes, ... of 16 bytes, as the fast path does.
  __device__ static void dot_products(attend_task const& t, split_place const& at,
                                      split_box const& box) {
    index_t const dim = t.kv.shape.dim_k, lanes = row_lanes(dim), groups = split_threads / lanes;
    index_t const group = thread_of_block() / lanes, lane = thread_of_block() % lanes;
    index_t const each = 16 / dtype_bytes(t.kv.k.type);
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

struct attend_plain_kernel {
  static constexpr int most_threads = split_threads, blocks_per_sm = 4;
  attend_task t;
  rows_taken which;

  __device__ void operator()() const { attend_split<plain_path>(t, which); }
  std::size_t shared_bytes() const { return split_box::bytes(t.tile, plain_path::sums_floats); }
};

}  // namespace kvkeep::cuda
