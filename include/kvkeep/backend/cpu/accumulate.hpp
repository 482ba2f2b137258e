// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CPU: attention weights folded into per-slot rows, and MorphKV's scores from cached weights.
#pragma once

#include "../../op/accumulate.hpp"
#include "fold.hpp"
#include "fused_rows.hpp"
#include "kernels/fused_rows.hpp"

namespace kvkeep::cpu {
inline namespace KVKEEP_CPU_ISA {

/// Fetches what a later head will read.
inline void prefetch_accumulate(op::accumulate<host_space> const& o, index_t b,
                                index_t h) noexcept {
  index_t const id = o.batch.id_of(b), n = o.slots.lengths(id, h);
  index_t const ring = o.ring_row != nullptr ? o.ring_row[b] : 0;
  for (index_t g = 0; g < o.weights.extent[2]; ++g)
    prefetch_slots(o.weights.at(id, h, g, 0) + ring * o.ring_stride, n);
  weight_fold<host_space> const& f = o.fold;
  for (index_t r = 0; !f.clear && r < (f.per_query_head ? o.weights.extent[2] : 1); ++r)
    prefetch_slots(f.out.at(f.out_by_id ? id : b, h, r, 0), n);
}

inline void accumulate_head(op::accumulate<host_space> const& o, float* inverse, index_t b,
                            index_t h) noexcept {
  index_t const id = o.batch.id_of(b), n = o.slots.lengths(id, h), group = o.weights.extent[2];
  index_t const ring = o.ring_row != nullptr ? o.ring_row[b] : 0;
  for (index_t g = 0; g < group; ++g) inverse[g] = inverse_of(o.weight_sum(id, h, g, ring));
  weight_rows const w{o.weights.at(id, h, 0, 0) + ring * o.ring_stride, o.weights.stride[2],
                      inverse, group};
  fold_head(o.fold, w, o.fold.out_by_id ? id : b, id, h, n);
}

/// Folds one token's weights into the slots' sums. Cost: 4 bytes per weight, 8 per output.
KVKEEP_CPU_OP status enqueue(context& c, op::accumulate<host_space> const& o,
                             workspace& ws) noexcept {
  if (!slots_contiguous(o.weights) || !slots_contiguous(o.fold.out)) return status::bad_argument;
  workspace::frame const frame(ws);
  index_t const heads = o.slots.lengths.extent[1];
  auto const inverse =
      take_each<float>(ws, c.workers(o.batch.n * heads), size_of(o.weights.extent[2]));
  if (!placed(ws)) return not_placed(ws);
  for_heads(c, o.batch.n, heads, [&](index_t b, index_t h, int worker) {
    with_next_head(o.batch.n, heads, b, h,
                   [&](index_t b2, index_t h2) { prefetch_accumulate(o, b2, h2); });
    accumulate_head(o, inverse(worker), b, h);
  });
  return status::ok;
}

/// Scratch of one worker for ring scores.
struct ring_scratch {
  query_block_scratch direct;    ///< for heads that the cached weights cannot serve
  worker_scratch<index_t> rows;  ///< [n_rows] ring rows of the present rows
  worker_scratch<index_t> old;   ///< [max_slots] lane masks, and scratch of the guard
  worker_scratch<float> sums;    ///< [2][group * n_rows]
};

/// Whether every row has mass on the old slots. Otherwise dividing by it would be meaningless: the
/// row was dominated by tokens that are protected now, and its cached weights have underflowed.
inline bool usable_sums(float const* z, index_t n) noexcept {
  for (index_t i = 0; i < n; ++i)
    if (!(z[i] >= 1e-30F && z[i] <= FLT_MAX)) return false;
  return true;
}

/// Whether the lowest of the old slots' scores stands clear of what their weights have lost: a weight
/// below the least normal number is 0, and divided by a small sum that is no longer nothing.
inline bool scores_hold(float const* scores, std::int32_t const* old, index_t n, float const* z,
                        index_t n_sums, index_t n_rows) noexcept {
  float const least = *std::min_element(z, z + n_sums);
  if (least >= 0.5F) return true;  // the row's maximum is among the old slots: nothing to gain
  float low = FLT_MAX;
  for (index_t j = 0; j < n; ++j)
    if (old[j] != 0) low = std::min(low, scores[j]);
  return low >= 1e6F * static_cast<float>(n_rows) * (FLT_MIN / least);
}

/// Sums of all rows over the old slots. While one row is added up the next one is fetched: rows are
/// about a page long, where the processor's own prefetching ends. @param z [group][n_rows]
inline void ring_sums(cached_rows const& c, std::int32_t const* old, float* z) noexcept {
  index_t const total = c.n_heads * c.n_rows;
  for (index_t i = 0; i < total; ++i) {
    if (i + 1 < total)
      prefetch_row(c.row((i + 1) / c.n_rows, (i + 1) % c.n_rows),
                   std::min<index_t>(c.n_slots, 2048));
    cached_rows one = c;
    one.e += i / c.n_rows * c.stride_head;
    one.ring += i % c.n_rows;
    one.n_heads = one.n_rows = 1;
    cached_row_sums(one, old, z + i);
  }
}

inline void ring_score_head(op::ring_score<host_space> const& o, ring_scratch const& scratch,
                            index_t b, index_t h, int worker) noexcept {
  kv_ref<host_space> const& kv = o.layer.kv;
  index_t const id = o.batch.id_of(b), group = kv.shape.group(), n_rows = o.positions.extent[1];
  index_t* const ring = scratch.rows(worker);
  index_t* const old = scratch.old(worker);
  index_t count = 0;
  for (index_t r = 0; r < n_rows; ++r)
    if (o.positions(b, r) >= 0) ring[count++] = o.positions(b, r) % o.ring;

  fused_job job{{{&kv.k, o.batch.row_of(b), h},
                 o.layer.slots.positions.at(id, h, 0),
                 o.layer.slots.lengths(id, h)}};
  head_slots const& s = job.s;
  job.old = find_open(s.positions, s.n, 0, o.recent, 0, old);
  job.fuse = o.fuse;
  job.out = o.out.at(b, h, 0);
  write_open(job.old, s.positions, s.n, old);
  cached_rows const cached{
      o.weights.at(id, h, 0, 0), o.weights.stride[2], o.ring_stride, ring, group, count, s.n};
  float* const z = scratch.sums(worker);
  float* const inverse = z + static_cast<offset_t>(group) * n_rows;
  if (count > 0) ring_sums(cached, old, z);
  if (count > 0 && usable_sums(z, group * count)) {
    invert_sums(z, group * count, inverse);
    fuse_cached_rows(cached, inverse, old, o.fuse == reduction::sum ? row_fold::sum : row_fold::max,
                     job.out);
    if (scores_hold(job.out, old, s.n, z, group * count, count)) return;
  }
  query_block block(scratch.direct, worker);
  block.form = form_of(kv);
  fused_direct(block, scratch.direct.capacity, job, count, [&](index_t i, index_t g) {
    index_t const position = o.positions(b, n_rows - count + i);  // absent rows come first
    return o.q.at(id, h * group + g, position % o.q.extent[2], 0);
  });
}

/// MorphKV's scores from cached weights. Cost as the op says.
KVKEEP_CPU_OP status enqueue(context& c, op::ring_score<host_space> const& o,
                             workspace& ws) noexcept {
  kv_ref<host_space> const& kv = o.layer.kv;
  if (!readable(kv.k)) return status::unsupported;
  if (!slots_contiguous(o.weights) || !slots_contiguous(o.q) || !slots_contiguous(o.out) ||
      !slots_contiguous(o.layer.slots.positions) || o.ring < 1 || o.fuse == reduction::mean)
    return status::bad_argument;
  workspace::frame const frame(ws);
  index_t const n_rows = o.positions.extent[1];
  int const workers = c.workers(o.batch.n * kv.shape.n_kv_heads);
  ring_scratch scratch;
  scratch.direct = query_block_scratch::take(ws, workers, kv.shape, kv.k, n_rows, true);
  scratch.rows = take_each<index_t>(ws, workers, size_of(n_rows));
  scratch.old = take_each<index_t>(ws, workers, size_of(kv.shape.max_slots));
  scratch.sums = take_each<float>(ws, workers, 2 * size_of(n_rows) * size_of(kv.shape.group()));
  if (!placed(ws)) return not_placed(ws);
  for_heads(c, o.batch.n, kv.shape.n_kv_heads,
            [&](index_t b, index_t h, int worker) { ring_score_head(o, scratch, b, h, worker); });
  return status::ok;
}

}  // namespace KVKEEP_CPU_ISA
}  // namespace kvkeep::cpu
