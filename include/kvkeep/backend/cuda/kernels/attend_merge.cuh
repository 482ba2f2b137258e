// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Decode attention after its splits: their sums are merged in order, then logits become weights, which
/// are folded on the way. By the block of a row's last split, by kernels of their own, or as a stage.
#pragma once

#include "attend_weights.cuh"

namespace kvkeep::cuda {

/// The sum of a row's exp(z - max), its sink's term included. @param sink  logit, or null
__device__ inline float normaliser(softmax_part const& s, float const* sink) {
  if (sink == nullptr) return s.sum;
  double const above = static_cast<double>(sanitise(*sink)) - static_cast<double>(s.max);
  // More than that leaves no probability to the slots.
  return static_cast<float>(static_cast<double>(s.sum) + exp(fmin(above, 80.0)));
}
/// Its log-sum-exp.
__device__ inline float log_sum_exp(softmax_part const& s, float const* sink) {
  double const lse = static_cast<double>(s.max) + log(static_cast<double>(s.sum));
  if (sink == nullptr) return static_cast<float>(lse);
  double const z = static_cast<double>(sanitise(*sink)), above = fmax(lse, z);
  return static_cast<float>(above + log1p(exp(fmin(lse, z) - above)));
}

/// One part of the splits' softmax; all lanes get it.
__device__ inline softmax_part merge_parts_of(softmax_part const* parts, index_t n) {
  softmax_part r{-largest_float, 0};
  KVKEEP_UNROLL(4)
  for (index_t s = lane_of_warp(); s < n; s += warp_size) r.max = larger{}(r.max, parts[s].max);
  r.max = warp_reduce(r.max, larger{});
  double sum = 0;
  KVKEEP_UNROLL(4)
  for (index_t s = lane_of_warp(); s < n; s += warp_size)
    sum += static_cast<double>(parts[s].sum) * static_cast<double>(weight_of(parts[s].max - r.max));
  r.sum = static_cast<float>(warp_reduce(sum, add{}));
  return r;
}

/// Shared memory of a merge: a row's maximum and what its sum of values is multiplied by, and sums of values.
struct merge_box {
  static constexpr index_t each = 4, chunk = each * warp_size;  ///< features of a warp at a time
  float *top, *inverse;                                         ///< [row]
  float* sums;  ///< [warp, or part if those are more][chunk]

  __device__ explicit merge_box(index_t rows) {
    shared_pieces pieces;
    top = pieces.take<float>(rows);
    inverse = pieces.take<float>(rows);
    sums = pieces.take<float>(0);
  }
  static constexpr std::size_t bytes(index_t rows, index_t warps) {
    return 2 * shared_pieces::bytes<float>(rows) +
           shared_pieces::bytes<float>((warps > merge_parts ? warps : merge_parts) * chunk);
  }
};

/// Query rows that a block merges: query heads g, .. g + count - 1 of a KV head.
struct merge_place {
  index_t entry, head, row, g, count;
};

/// What a block makes of the splits of its rows.
enum class merge_part : std::uint8_t { all, sums, values };

/// Log-sum-exp, sum and maximum of the rows' weights, and what the values need of them. A warp per row.
__device__ inline void merge_sums(attend_task const& t, merge_place const& at, index_t splits,
                                  merge_box const& box, merge_part part) {
  index_t const id = t.batch.id_of(at.entry), ring = t.ring_row(at.entry, at.row);
  for (index_t i = warp_of_block(); i < at.count; i += warps_of_block()) {
    index_t const g = at.g + i, q_head = at.head * t.kv.shape.group() + g;
    offset_t const index = t.row_index(at.entry, q_head, at.row);
    float const* const sink = t.kv.sink_logits != nullptr ? t.kv.sink_logits + q_head : nullptr;
    softmax_part const all = merge_parts_of(t.all + index * t.splits, splits);
    softmax_part shown = all;
    if (t.visible.data != nullptr) shown = merge_parts_of(t.shown + index * t.splits, splits);
    if (lane_of_warp() != 0) continue;
    bool const empty = !(shown.sum > 0);
    if (part != merge_part::sums) {
      box.top[i] = shown.max;
      box.inverse[i] = empty ? 0.0f : __fdiv_rn(1.0f, normaliser(shown, sink));
    }
    if (part == merge_part::values) continue;
    float const sum = splits > 0 ? normaliser(all, sink) : 0.0f;
    t.totals[index] = {all.max, inverse_of(sum)};
    if (t.weight_sum.data != nullptr) t.weight_sum(id, at.head, g, ring) = sum;
    if (t.weight_max.data != nullptr) t.weight_max(id, at.head, g, ring) = all.max;
    if (t.lse.data != nullptr)
      t.lse(at.entry, q_head) = empty ? -__uint_as_float(0x7f800000u) : log_sum_exp(shown, sink);
  }
}

/// Outputs of the rows: a warp adds up every eighth split of a row.
__device__ inline void merge_values(attend_task const& t, merge_place const& at, index_t splits,
                                    merge_box const& box) {
  constexpr index_t each = merge_box::each, chunk = merge_box::chunk;
  index_t const dim = t.kv.shape.dim_v, used = min(splits, merge_parts);
  index_t const at_once = max(1, warps_of_block() / max(used, 1));
  index_t const q_head = at.head * t.kv.shape.group() + at.g;
  softmax_part const* const parts = t.visible.data != nullptr ? t.shown : t.all;
  for (index_t first_row = 0; first_row < at.count; first_row += at_once) {
    index_t const rows = min(at_once, at.count - first_row);
    for (index_t first = 0; first < dim; first += chunk) {
      for (index_t task = warp_of_block(); task < rows * used; task += warps_of_block()) {
        index_t const i = first_row + task / used;
        offset_t const index = t.row_index(at.entry, q_head + i, at.row) * t.splits;
        float acc[each] = {};
        for (index_t s = task % used; s < splits; s += merge_parts) {
          float const factor = weight_of(parts[index + s].max - box.top[i]);
          for (index_t k = 0; k < each; ++k) {
            index_t const d = first + lane_of_warp() + k * warp_size;
            if (d < dim) acc[k] = __fmaf_rn(factor, t.values[(index + s) * dim + d], acc[k]);
          }
        }
        for (index_t k = 0; k < each; ++k)
          box.sums[task * chunk + lane_of_warp() + k * warp_size] = acc[k];
      }
      __syncthreads();
      index_t const width = min(chunk, dim - first);
      for (index_t at_sum = thread_of_block(); at_sum < rows * width;
           at_sum += threads_of_block()) {
        index_t const r = at_sum / width, d = at_sum % width;
        float sum = 0;
        for (index_t p = 0; p < used; ++p)
          sum = __fadd_rn(sum, box.sums[(r * used + p) * chunk + d]);
        t.out.at(at.entry, q_head + first_row + r, 0)[first + d] =
            __fmul_rn(sum, box.inverse[first_row + r]);
      }
      __syncthreads();
    }
  }
}

/// Output, log-sum-exp, and the sum and maximum of the weights of a block's rows.
__device__ inline void merge_rows(attend_task const& t, merge_place const& at,
                                  merge_part part = merge_part::all) {
  if (!t.present(at.entry, at.row)) return;
  merge_box const box(at.count);
  index_t const n = t.lengths(t.batch.id_of(at.entry), at.head);
  index_t const splits = (n + split_slots - 1) / split_slots;
  merge_sums(t, at, splits, box, part);
  if (t.out.data == nullptr || part == merge_part::sums) return;
  __syncthreads();
  merge_values(t, at, splits, box);
}

/// A block per query row.
struct attend_merge_kernel {
  static constexpr int most_threads = merge_parts * warp_size, blocks_per_sm = 4;
  attend_task t;

  static constexpr std::size_t shared_bytes() { return merge_box::bytes(1, merge_parts); }
  __device__ void operator()() const {
    index_t x = static_cast<index_t>(blockIdx.x);
    index_t const row = x % t.n_rows;
    x /= t.n_rows;
    index_t const q_head = x % t.kv.shape.n_q_heads, entry = x / t.kv.shape.n_q_heads;
    index_t const group = t.kv.shape.group();
    merge_rows(t, {entry, q_head / group, row, q_head % group, 1});
  }
};

/// What follows the splits: nothing, this block's stage, kernels that have done it before, or what the blocks of last
/// splits have left.
enum class merge_by : std::uint8_t { nobody, block, kernels, last };

/// All of it, of one query row per head: where that is work for one block, and other stages follow. No stage
/// reads the output, so a block beside the head's own one merges the values meanwhile.
struct attend_stage {
  static constexpr int most_threads = 512;
  attend_task t;
  merge_by merge = merge_by::block;

  std::size_t shared_bytes() const {
    return merge_box::bytes(t.kv.shape.group(), most_threads / warp_size);
  }
  bool has_beside() const { return merge == merge_by::block && t.out.data != nullptr; }
  __device__ void beside(block_head const& at) const {
    merge_rows(t, place(at), merge_part::values);
  }
  __device__ void operator()(block_head const& at) const {
    bool const weighs = t.weighs();
    bool const sums =
        t.lse.data != nullptr || t.weight_sum.data != nullptr || t.weight_max.data != nullptr;
    if (merge == merge_by::block && (weighs || sums)) {
      merge_rows(t, place(at), merge_part::sums);
      __syncthreads();
    }
    bool const mine = merge == merge_by::block || (merge == merge_by::last && !t.last_weighs);
    if (weighs && mine) weigh_head<2>(t, at.entry, at.head, 0);
  }

 private:
  __device__ merge_place place(block_head const& at) const {
    return {at.entry, at.head, 0, 0, t.kv.shape.group()};
  }
};

}  // namespace kvkeep::cuda
