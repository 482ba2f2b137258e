// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Decode attention, what its kernels share: the task, a split's place and memory, logits into weights. A block
/// takes the slots of one split, for the query heads that share them (attend_split.cuh), and leaves maximum, sum and
/// weighted values of the split, and the logits if somebody asks for weights; attend_merge.cuh goes on from there.
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
  unsigned* tickets = nullptr;    ///< [entry, KV head, tile] if a row's last split merges; or null
  bool last_weighs = false;       ///< ... and makes the weights
  index_t splits = 0, tile = 1, tiles = 1;
  index_t usual_slots = 0;  ///< for the plan alone

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
  /// Whether logits become weights that are kept, or folded.
  KVKEEP_HD bool weighs() const { return weights.data != nullptr || fold.out.data != nullptr; }
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
  index_t length, splits;  ///< of the rows

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
    length = t.present(entry, row) ? t.lengths(t.batch.id_of(entry), head) : 0;
    n = min(length - split * split_slots, split_slots);
    splits = (length + split_slots - 1) / split_slots;
  }
  /// Goes on to the block's next split, if there is one.
  __device__ bool next() {
    split += static_cast<index_t>(gridDim.y);
    n = min(length - split * split_slots, split_slots);
    return n > 0;
  }
  /// Whether the block has nothing to do. Where the last one merges, somebody does so for a head without slots.
  __device__ bool idle(attend_task const& t) const {
    return n <= 0 && (t.tickets == nullptr || split > 0);
  }
  /// Whether it is the last one of its rows.
  __device__ bool last(attend_task const& t) const {
    index_t const tile = g / t.tile;
    offset_t const rows = (static_cast<offset_t>(entry) * t.kv.shape.n_kv_heads + head) * t.tiles;
    return last_to_come(t.tickets + rows + tile,
                        min(max(splits, 1), static_cast<index_t>(gridDim.y)));
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

}  // namespace kvkeep::cuda
