// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Decode attention after its splits: their sums are merged in order, then logits become weights, which
/// are folded on the way.
#pragma once

#include "attend.cuh"
#include "slots.cuh"

namespace kvkeep::cuda {

/// The normaliser of a row with its sink logit, and the row's log-sum-exp.
struct row_normaliser {
  float sum;  ///< sum of exp(z - max), the sink's term included
  float lse;
};

__device__ inline row_normaliser normaliser(softmax_part const& s, float const* sink) {
  double const top = static_cast<double>(s.max);
  double sum = static_cast<double>(s.sum);
  if (sink == nullptr) return {s.sum, static_cast<float>(top + log(sum))};
  double const z = static_cast<double>(sanitise(*sink));
  double const lse = top + log(sum), above = fmax(lse, z);
  sum += exp(fmin(z - top, 80.0));  // more than that leaves no probability to the slots
  return {static_cast<float>(sum), static_cast<float>(above + log1p(exp(fmin(lse, z) - above)))};
}

/// One part of the splits' softmax; all lanes get it.
__device__ inline softmax_part merge_parts_of(softmax_part const* parts, index_t n) {
  softmax_part r{-largest_float, 0};
  for (index_t s = lane_of_warp(); s < n; s += warp_size) r.max = larger{}(r.max, parts[s].max);
  r.max = warp_reduce(r.max, larger{});
  double sum = 0;
  for (index_t s = lane_of_warp(); s < n; s += warp_size)
    sum += static_cast<double>(parts[s].sum) * static_cast<double>(weight_of(parts[s].max - r.max));
  r.sum = static_cast<float>(warp_reduce(sum, add{}));
  return r;
}

/// One query row: output, log-sum-exp, and the sum and maximum of its weights.
struct attend_merge_kernel {
  static constexpr int most_threads = merge_parts * warp_size, blocks_per_sm = 4;
  static constexpr index_t each = 4, chunk = each * warp_size;  ///< features of a warp at a time
  attend_task t;

  static std::size_t shared_bytes() { return shared_pieces::bytes<float>(merge_parts * chunk); }

  __device__ void operator()() const {
    index_t x = static_cast<index_t>(blockIdx.x);
    index_t const row = x % t.n_rows;
    x /= t.n_rows;
    index_t const q_head = x % t.kv.shape.n_q_heads, entry = x / t.kv.shape.n_q_heads;
    if (!t.present(entry, row)) return;
    index_t const group = t.kv.shape.group(), head = q_head / group, g = q_head % group;
    index_t const id = t.batch.id_of(entry);
    index_t const splits = (t.lengths(id, head) + split_slots - 1) / split_slots;
    offset_t const index = t.row_index(entry, q_head, row);
    float const* const sink = t.kv.sink_logits != nullptr ? t.kv.sink_logits + q_head : nullptr;

    softmax_part const all = merge_parts_of(t.all + index * t.splits, splits);
    softmax_part shown = all;
    if (t.visible.data != nullptr) shown = merge_parts_of(t.shown + index * t.splits, splits);
    row_normaliser const r = normaliser(shown, sink);
    bool const empty = !(shown.sum > 0);
    if (thread_of_block() == 0) {
      float const sum = splits > 0 ? normaliser(all, sink).sum : 0.0f;
      index_t const ring = t.ring_row(entry, row);
      t.totals[index] = {all.max, sum};
      if (t.weight_sum.data != nullptr) t.weight_sum(id, head, g, ring) = sum;
      if (t.weight_max.data != nullptr) t.weight_max(id, head, g, ring) = all.max;
      if (t.lse.data != nullptr)
        t.lse(entry, q_head) = empty ? -__uint_as_float(0x7f800000u) : r.lse;
    }
    if (t.out.data != nullptr)
      merge_values(index, splits, shown.max, empty ? 0.0f : __fdiv_rn(1.0f, r.sum),
                   t.out.at(entry, q_head, 0));
  }

 private:
  /// @param out [dim_v], device
  __device__ void merge_values(offset_t index, index_t splits, float top, float inverse,
                               float* out) const {
    shared_pieces pieces;
    float* const sums = pieces.take<float>(merge_parts * chunk);
    softmax_part const* const parts =
        (t.visible.data != nullptr ? t.shown : t.all) + index * t.splits;
    index_t const dim = t.kv.shape.dim_v, used = min(splits, merge_parts);
    float const* const values = t.values + index * t.splits * dim;
    for (index_t first = 0; first < dim; first += chunk) {
      for (index_t p = warp_of_block(); p < used; p += warps_of_block()) {
        float acc[each] = {};
        for (index_t s = p; s < splits; s += merge_parts) {
          float const factor = weight_of(parts[s].max - top);
          for (index_t k = 0; k < each; ++k) {
            index_t const d = first + lane_of_warp() + k * warp_size;
            if (d < dim)
              acc[k] = __fmaf_rn(factor, values[static_cast<offset_t>(s) * dim + d], acc[k]);
          }
        }
        for (index_t k = 0; k < each; ++k)
          sums[p * chunk + lane_of_warp() + k * warp_size] = acc[k];
      }
      __syncthreads();
      for (index_t i = thread_of_block(); i < min(chunk, dim - first); i += threads_of_block()) {
        float sum = 0;
        for (index_t p = 0; p < used; ++p) sum = __fadd_rn(sum, sums[p * chunk + i]);
        out[first + i] = __fmul_rn(sum, inverse);
      }
      __syncthreads();
    }
  }
};

/// A slot's logits become weights, and are folded.
struct attend_weights_kernel : slot_kernel {
  attend_task t;

  __device__ void operator()() const {
    index_t x = static_cast<index_t>(blockIdx.x);
    index_t const row = x % t.n_rows;
    x /= t.n_rows;
    index_t const head = x % t.kv.shape.n_kv_heads, entry = x / t.kv.shape.n_kv_heads;
    index_t const id = t.batch.id_of(entry), j = slot(), group = t.kv.shape.group();
    if (j >= t.lengths(id, head) || !t.present(entry, row)) return;
    softmax_part const* const totals = t.totals + t.row_index(entry, head * group, row);
    for (index_t g = 0; g < group; ++g) {
      float* const z = t.weight_slots(entry, head, g, row) + j;
      *z = weight_of(*z - totals[g * t.n_rows].max);
    }
    if (t.fold.out.data == nullptr) return;
    fold_slot(
        t.fold, t.fold.out_by_id ? id : entry, id, head, j, group,
        [&](index_t g) { return t.weight_slots(entry, head, g, row)[j]; },
        [&](index_t g) { return inverse_of(totals[g * t.n_rows].sum); });
  }
};

}  // namespace kvkeep::cuda
