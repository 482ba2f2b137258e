// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CPU: what slots receive from query rows, whatever is made of their weights.
#pragma once

#include "../../op/window_score.hpp"
#include "query_block.hpp"

namespace kvkeep::cpu {
inline namespace KVKEEP_CPU_ISA {

/// f(first, rows) over the packed rows; a tile never mixes two output rows.
template <class F>
void for_segments(query_block const& block, F const& f) noexcept {
  index_t const segments = block.by_head ? block.group : 1;
  index_t const length = block.packed() / segments;
  for (index_t s = 0; s < segments; ++s)
    for_tiles(s * length, (s + 1) * length, 1,
              [&](index_t first, index_t rows) { f(s, first, rows); });
}

/// The sink logits join the rows' statistics.
inline void join_sinks(query_block const& block, float const* sinks) noexcept {
  for (index_t g = 0; sinks != nullptr && g < block.group; ++g)
    for (index_t i = 0; i < block.n; ++i) {
      float &top = block.max[block.index(i, g)], &sum = block.sum[block.index(i, g)];
      if (!(sum > 0)) continue;
      float const z = first_lane(sanitise(splat(sinks[g]))), high = std::max(top, z);
      sum = sum * std::exp(top - high) + std::exp(z - high);
      top = high;
    }
}

/// What slots receive from the block's rows, each of which sees the positions up to its own. `Add` takes a panel's
/// part: `begin(block)` once the rows' normalisers are known, `operator()(block, at, n, segment, first row, tile)`.
template <class Add>
struct causal_job {
  query_block const& block;
  head_slots const& s;
  Add const& take;

  /// Panels that no row of the block sees change nothing, so they are left out.
  bool seen(index_t at, index_t n) const noexcept {
    return bounds_of(s.positions + at, n).low <= block.highest;
  }
  /// f(segment, first row, tile) for the rows that see something of a panel.
  template <class Tile, class F>
  void each_tile(index_t at, index_t n, Tile const& tile, F const& f) const noexcept {
    panel_positions const keys(s.positions + at, n);
    for_segments(block, [&](index_t segment, index_t first, index_t rows) {
      causal_view const view = see_causally(block, keys, first, rows);
      if (view.skip == rows) return;
      index_t const from = first + view.skip;
      logit_tile t = tile(from, rows - view.skip);
      t.visible = view.visible;
      f(segment, from, t);
    });
  }
  /// Hands a panel's rows over, in packed order.
  template <class Tile>
  void add(index_t at, index_t n, Tile const& tile) const noexcept {
    each_tile(at, n, tile, [&](index_t segment, index_t from, logit_tile const& t) {
      take(block, at, n, segment, from, t);
    });
  }
  /// With the rows' normalisers given.
  void sums() const noexcept {
    take.begin(block);
    for_panels(
        block, s.k, s.n, [&](index_t at, index_t n) { return seen(at, n); },
        [&](index_t at, index_t n) {
          add(at, n, [&](index_t first, index_t rows) { return block.tile(first, rows, block.z); });
        });
  }
  /// With normalisers over the slots that the rows see.
  void norms_and_sums(float const* sinks) const noexcept {
    row_stats const stats{block.max, block.sum};
    row_stats_begin(stats, block.packed());
    for_panels_twice(
        block, s.k, s.n, [&](index_t at, index_t n) { return seen(at, n); },
        [&](index_t at, index_t n, auto const& tile) {
          each_tile(at, n, tile, [&](index_t, index_t from, logit_tile const& t) {
            row_stats_update(t, {stats.max + from, stats.sum + from});
          });
        },
        [&] {
          join_sinks(block, sinks);
          row_stats_finish(stats, block.packed());
          take.begin(block);
        },
        [&](index_t at, index_t n, auto const& tile) { add(at, n, tile); });
  }
};

/// Hands a head's rows to `add` (see causal_job), a block of present ones after the other.
/// @param o  an op with batch, layer and rows
template <class Op, class Add>
void add_rows(Op const& o, query_block& block, index_t capacity, index_t b, index_t h,
              Add const& add) noexcept {
  kv_ref<host_space> const& kv = o.layer.kv;
  index_t const id = o.batch.id_of(b), src = o.rows.by_id ? id : b, group = block.group;
  head_slots const s{{&kv.k, o.batch.row_of(b), h},
                     o.layer.slots.positions.at(id, h, 0),
                     o.layer.slots.lengths(id, h)};
  block.form = form_of(kv);
  index_t const n_rows = o.rows.q.extent[2];
  index_t present[block_rows];
  for (index_t r = 0; r < n_rows;) {
    index_t count = 0;
    for (; r < n_rows && count < capacity / group; ++r)
      if (o.rows.position(src, r) >= 0) present[count++] = r;
    block.before += block.n;
    block.pack(
        count, [&](index_t i, index_t g) { return o.rows.q.at(src, h * group + g, present[i], 0); },
        [&](index_t i) { return o.rows.position(src, present[i]); });
    causal_job<Add> const job{block, s, add};
    if (o.rows.lse.data == nullptr) {
      job.norms_and_sums(kv.sink_logits ? kv.sink_logits + h * group : nullptr);
    } else {
      for (index_t i = 0; i < count; ++i)
        for (index_t g = 0; g < group; ++g) {
          float const lse = o.rows.lse(src, h * group + g, present[i]);
          // A row that saw nothing has no say; its log-sum-exp may be -infinity.
          bool const saw = lse > -FLT_MAX;
          block.max[block.index(i, g)] = saw ? lse : FLT_MAX;
          block.sum[block.index(i, g)] = saw ? 1.0F : 0.0F;
        }
      job.sums();
    }
  }
}

/// What ops on column statistics refuse.
template <class Op>
status check_columns(Op const& o) noexcept {
  if (!readable(o.layer.kv.k)) return status::unsupported;
  bool const rows = slots_contiguous(o.rows.q) && slots_contiguous(o.out) &&
                    slots_contiguous(o.layer.slots.positions);
  return rows ? status::ok : status::bad_argument;
}

/// f(entry, KV head, query block, its capacity, worker) for all heads of an op.
template <class Op, class F>
status for_query_blocks(context& c, Op const& o, workspace& ws, F const& f) noexcept {
  cache_shape const& shape = o.layer.kv.shape;
  int const workers = c.workers(o.batch.n * shape.n_kv_heads);
  query_block_scratch const scratch = query_block_scratch::take(
      ws, workers, shape, o.layer.kv.k, o.rows.q.extent[2], o.rows.lse.data == nullptr);
  if (!placed(ws)) return not_placed(ws);
  for_heads(c, o.batch.n, shape.n_kv_heads, [&](index_t b, index_t h, int worker) {
    query_block block(scratch, worker);
    f(b, h, block, scratch.capacity, worker);
  });
  return status::ok;
}

}  // namespace KVKEEP_CPU_ISA
}  // namespace kvkeep::cpu
