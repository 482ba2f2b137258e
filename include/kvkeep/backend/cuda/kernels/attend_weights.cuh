// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Decode attention: logits become weights, which are kept, or folded, or both. After the merge of the sums.
#pragma once

#include "attend.cuh"
#include "slots.cuh"

namespace kvkeep::cuda {

/// Some slots of one query row per head.
template <int N>
__device__ void weigh_slots(attend_task const& t, index_t entry, index_t head, index_t row,
                            some_slots<N> const& slots) {
  struct loaded {
    float logit[N];
    row_scale scale;
  };
  index_t const id = t.batch.id_of(entry), group = t.kv.shape.group();
  row_scale const* const scales = t.totals + t.row_index(entry, head * group, row);
  float* const z = t.weight_slots(entry, head, 0, row);
  bool const kept = t.weights.data != nullptr, folds = t.fold.out.data != nullptr;
  offset_t const step =
      kept ? t.weights.stride[2] : static_cast<offset_t>(t.n_rows) * t.kv.shape.max_slots;
  auto const load = [&](index_t g) {
    loaded x;
    unrolled<N>([&](int i) { x.logit[i] = z[g * step + slots[i]]; });
    x.scale = scales[g * t.n_rows];
    return x;
  };
  auto const weigh = [&](index_t g, loaded const& x, float(&e)[N]) {
    unrolled<N>([&](int i) {
      e[i] = weight_of(x.logit[i] - x.scale.max);
      if (kept && slots.has(i)) z[g * step + slots[i]] = e[i];
    });
  };
  float e[N];
  if (!folds)
    return each_query_head(group, load, [&](index_t g, loaded const& x) { weigh(g, x, e); });
  slot_fold<N> fold(t.fold, t.fold.out_by_id ? id : entry, id, head, slots, group);
  each_query_head(group, load, [&](index_t g, loaded const& x) {
    weigh(g, x, e);
    fold.add(g, e, x.scale.inverse);
  });
}

/// All slots of a head, by one block. @tparam N  of a thread at once, as registers allow
template <int N>
__device__ void weigh_head(attend_task const& t, index_t entry, index_t head, index_t row) {
  index_t const n = t.lengths(t.batch.id_of(entry), head);
  for (index_t j = thread_of_block(); j < n; j += N * threads_of_block())
    weigh_slots<N>(t, entry, head, row, {j, threads_of_block(), n});
}

/// Grid: entry, KV head, row; strides of slots.
struct attend_weights_kernel : slot_kernel {
  attend_task t;

  __device__ void operator()() const {
    index_t x = static_cast<index_t>(blockIdx.x);
    index_t const row = x % t.n_rows;
    x /= t.n_rows;
    index_t const head = x % t.kv.shape.n_kv_heads, entry = x / t.kv.shape.n_kv_heads;
    index_t const j = slot();
    if (j < t.lengths(t.batch.id_of(entry), head) && t.present(entry, row))
      weigh_slots<1>(t, entry, head, row, {j, 1, j + 1});
  }
};

}  // namespace kvkeep::cuda
