// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Decode attention: what follows the splits, by the block of a row's last one. It has few threads and no time, so what
/// it reads comes all at once.
#pragma once

#include "attend_merge.cuh"

namespace kvkeep::cuda {

/// Four features of a row's output, from its splits: the same sums in the same order as merge_values, the parts side by
/// side.
struct merged_features {
  static constexpr int each = 4;
  float x[merge_parts][each], top[merge_parts];  ///< of as many splits
  float acc[merge_parts][each];

  /// Splits from `first` on; the last one stands for those behind it.
  /// @param values  of split 0, from this feature on  @param count  features that a row has from here on
  __device__ void load(softmax_part const* parts, float const* values, index_t dim, index_t count,
                       index_t first, index_t splits) {
    unrolled<merge_parts>([&](int p) {
      index_t const split = min(first + p, splits - 1);
      float const* const at = values + static_cast<offset_t>(split) * dim;
      if (dim % each == 0) {
        uint4 const w = *reinterpret_cast<uint4 const*>(at);
        x[p][0] = __uint_as_float(w.x), x[p][1] = __uint_as_float(w.y);
        x[p][2] = __uint_as_float(w.z), x[p][3] = __uint_as_float(w.w);
      } else {
        for (index_t k = 0; k < each; ++k) x[p][k] = at[min(k, count - 1)];
      }
      top[p] = parts[split].max;
    });
  }
  __device__ void add(float most, index_t first, index_t splits) {
    unrolled<merge_parts>([&](int p) {
      float const factor = weight_of(top[p] - most);
      bool const there = first + p < splits;
      for (int k = 0; k < each; ++k) {
        float const before = first == 0 ? 0.0f : acc[p][k];
        acc[p][k] = there ? __fmaf_rn(factor, x[p][k], before) : before;
      }
    });
  }
  __device__ float sum(int k) const {
    float s = 0;
    unrolled<merge_parts>([&](int p) { s = __fadd_rn(s, acc[p][k]); });
    return s;
  }
};

/// All that follows. The first features come while sums are merged.
__device__ inline void merge_as_last(attend_task const& t, split_place const& at) {
  constexpr index_t each = merged_features::each;
  merge_place const rows{at.entry, at.head, at.row, at.g, at.count};
  merge_box const box(at.count);
  index_t const dim = t.kv.shape.dim_v, width = (dim + each - 1) / each;
  index_t const n = t.out.data != nullptr ? at.count * width : 0;
  softmax_part const* const parts = t.visible.data != nullptr ? t.shown : t.all;
  merged_features f;
  auto const load = [&](index_t i, index_t first) {
    offset_t const index = t.row_index(at.entry, at.q_head(t) + i / width, at.row) * t.splits;
    index_t const d = i % width * each;
    f.load(parts + index, t.values + index * dim + d, dim, dim - d, first, at.splits);
  };
  if (thread_of_block() < n && at.splits > 0) load(thread_of_block(), 0);
  merge_sums(t, rows, at.splits, box, merge_part::all);
  __syncthreads();
  for (index_t i = thread_of_block(); i < n; i += threads_of_block()) {
    index_t const r = i / width, d = i % width * each;
    for (index_t first = 0; first < max(at.splits, 1); first += merge_parts) {
      if (at.splits > 0 && (first > 0 || i != thread_of_block())) load(i, first);
      f.add(box.top[r], first, at.splits);
    }
    float* const out = t.out.at(at.entry, at.q_head(t) + r, d);
    for (index_t k = 0; k < each; ++k)
      if (d + k < dim) out[k] = __fmul_rn(f.sum(k), box.inverse[r]);
  }
  if (t.last_weighs && t.weighs()) weigh_head<4>(t, at.entry, at.head, at.row);
}

}  // namespace kvkeep::cuda
