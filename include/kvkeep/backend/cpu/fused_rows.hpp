// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CPU: MorphKV's fused rows, directly from queries and keys.
#pragma once

#include "../../op/window_score.hpp"
#include "query_block.hpp"

namespace kvkeep::cpu {
inline namespace KVKEEP_CPU_ISA {

/// One head's direct MorphKV score.
struct fused_job {
  head_slots s;
  open_range old{};                 ///< positions of old slots
  reduction fuse = reduction::max;  ///< sum or max
  float* out = nullptr;             ///< [n]
  float* heads = nullptr;           ///< [group] rows, or null
  offset_t heads_stride = 0;
};

/// Bits of a panel's old columns.
inline std::uint16_t old_columns(fused_job const& job, index_t at, index_t n) noexcept {
  index_t const* const p = job.s.positions + at;
  unsigned const low = open_bits(job.old, p, n);
  unsigned const high = n > lanes ? open_bits(job.old, p + lanes, n - lanes) : 0;
  return static_cast<std::uint16_t>(low | high << 8);
}

/// Old columns of a panel for all rows of a tile, or null where all 16 are old.
inline std::uint16_t const* old_mask(query_block const& block, std::uint16_t columns,
                                     index_t rows) noexcept {
  if (columns == 0xffff) return nullptr;
  std::fill_n(block.visible, rows, columns);
  return block.visible;
}

/// Folds the probabilities of one tile, `rows` packed rows in block.z, into 16 columns.
inline void fuse_tile(query_block const& block, index_t rows, fused_job const& job, index_t at,
                      index_t n) noexcept {
  auto const fold = [&](vf acc, vf x) {
    return job.fuse == reduction::sum ? acc + x : max(acc, x);
  };
  for (index_t half = 0; half < n; half += lanes) {
    index_t const width = std::min<index_t>(lanes, n - half);
    float* const to = job.out + at + half;
    vf acc = load_some(to, width);
    for (index_t r = 0; r < rows; r += block.group) {
      vf top = load(block.z + r * panel_keys + half);
      for (index_t g = 1; g < block.group; ++g)
        top = max(top, load(block.z + (r + g) * panel_keys + half));
      acc = fold(acc, top);
    }
    store_some(to, acc, width);
    for (index_t g = 0; job.heads != nullptr && g < block.group; ++g) {
      float* const own = job.heads + g * job.heads_stride + at + half;
      vf one = load_some(own, width);
      for (index_t r = g; r < rows; r += block.group)
        one = fold(one, load(block.z + r * panel_keys + half));
      store_some(own, one, width);
    }
  }
}

/// Softmax over the old columns and fusing for the rows of one block.
inline void fuse_block(query_block const& block, fused_job const& job) noexcept {
  row_stats const stats{block.max, block.sum};
  row_stats_begin(stats, block.packed());
  auto const each_tile = [&](index_t at, index_t n, auto const& tile, auto const& f) {
    std::uint16_t const columns = old_columns(job, at, n);
    for_tiles(0, block.packed(), block.group, [&](index_t first, index_t rows) {
      logit_tile t = tile(first, rows);
      t.visible = old_mask(block, columns, rows);
      f(first, t);
    });
  };
  for_panels_twice(
      block, job.s.k, job.s.n, [&](index_t at, index_t n) { return old_columns(job, at, n) != 0; },
      [&](index_t at, index_t n, auto const& tile) {
        each_tile(at, n, tile, [&](index_t first, logit_tile const& t) {
          row_stats_update(t, {stats.max + first, stats.sum + first});
        });
      },
      [&] { row_stats_finish(stats, block.packed()); },
      [&](index_t at, index_t n, auto const& tile) {
        each_tile(at, n, tile, [&](index_t first, logit_tile const& t) {
          exp_rows_write(t, block.norm(first), block.z, panel_keys);
          fuse_tile(block, t.n_rows, job, at, n);
        });
      });
}

/// Scores one head from `count` present rows; `source(i, g)` is query row i of head g of the group.
template <class Source>
void fused_direct(query_block& block, index_t capacity, fused_job const& job, index_t count,
                  Source const& source) noexcept {
  head_slots const& s = job.s;
  index_t const heads = job.heads != nullptr ? block.group : 0;
  auto const row = [&](index_t r) { return r < 0 ? job.out : job.heads + r * job.heads_stride; };
  for (index_t r = -1; r < heads; ++r) std::fill_n(row(r), s.n, 0.0F);
  block.by_head = false;
  for (index_t first = 0; first < count; first += capacity / block.group) {
    index_t const n = std::min(capacity / block.group, count - first);
    block.pack(
        n, [&](index_t i, index_t g) { return source(first + i, g); }, [](index_t) { return 0; });
    fuse_block(block, job);
  }
  for (index_t r = -1; r < heads; ++r)
    for (index_t j = 0; j < s.n; ++j) {
      if (!job.old.has(s.positions[j]))
        row(r)[j] = std::numeric_limits<float>::infinity();
      else if (count == 0)
        row(r)[j] = static_cast<float>(s.positions[j]);
    }
}

/// MorphKV's direct form. Cost as the op says.
KVKEEP_CPU_OP status enqueue(context& c, op::fused_rows<host_space> const& o,
                             workspace& ws) noexcept {
  kv_ref<host_space> const& kv = o.layer.kv;
  auto const& slots = o.layer.slots;
  if (!readable(kv.k)) return status::unsupported;
  if (!slots_contiguous(o.rows.q) || !slots_contiguous(o.out) || !slots_contiguous(o.out_heads) ||
      !slots_contiguous(slots.positions) || o.fuse == reduction::mean)
    return status::bad_argument;
  workspace::frame const frame(ws);
  index_t const n_rows = o.rows.q.extent[2], group = kv.shape.group();
  int const workers = c.workers(o.batch.n * kv.shape.n_kv_heads);
  auto const scratch = query_block_scratch::take(ws, workers, kv.shape, kv.k, n_rows, true);
  auto const lists = take_each<index_t>(ws, workers, size_of(kv.shape.max_slots) + size_of(n_rows));
  if (!placed(ws)) return not_placed(ws);
  for_heads(c, o.batch.n, kv.shape.n_kv_heads, [&](index_t b, index_t h, int worker) {
    index_t const id = o.batch.id_of(b), src = o.rows.by_id ? id : b;
    index_t* const present = lists(worker) + kv.shape.max_slots;
    index_t count = 0;
    for (index_t r = 0; r < n_rows; ++r)
      if (o.rows.position(src, r) >= 0) present[count++] = r;
    fused_job job{
        {{&kv.k, o.batch.row_of(b), h}, slots.positions.at(id, h, 0), slots.lengths(id, h)}};
    job.old = find_open(job.s.positions, job.s.n, 0, o.recent, 0, lists(worker));
    job.fuse = o.fuse;
    job.out = o.out.at(b, h, 0);
    if (o.out_heads.data != nullptr) job.heads = o.out_heads.at(b, h * group, 0);
    job.heads_stride = o.out_heads.stride[1];
    query_block block(scratch, worker);
    block.form = form_of(kv);
    fused_direct(block, scratch.capacity, job, count, [&](index_t i, index_t g) {
      return o.rows.q.at(src, h * group + g, present[i], 0);
    });
  });
  return status::ok;
}

}  // namespace KVKEEP_CPU_ISA
}  // namespace kvkeep::cpu
