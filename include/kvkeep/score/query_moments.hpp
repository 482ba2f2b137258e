// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Mean and covariance of a prompt's queries, chunk by chunk.
#pragma once

#include <algorithm>
#include <type_traits>

#include "rope.hpp"

namespace kvkeep::detail {
inline namespace KVKEEP_CPU_ISA {  // of the CPU backend's functors

/// What one KV head has gathered of its group's queries: how many there were, their mean and the sum of
/// products of what they deviate from it by (its lower triangle), query head after query head.
struct moment_plan {
  index_t group = 1;
  index_t dim = 0;
  bool spreads = true;  ///< not the mean alone

  KVKEEP_HD index_t floats() const noexcept {
    return 1 + group * dim + (spreads ? group * dim * dim : 0);
  }
  KVKEEP_HD float* mean(float* head, index_t g) const noexcept { return head + 1 + g * dim; }
  /// Row d of the triangle.
  KVKEEP_HD float* spread(float* head, index_t g, index_t d) const noexcept {
    return head + 1 + group * dim + (static_cast<offset_t>(g) * dim + d) * dim;
  }
};

/// A chunk of queries on its way into the moments. Rows of positions below `first` do not count.
template <class Space>
struct moment_chunk {
  /// Features that one index sums: on the host enough to fill vectors, on a device the neighbour's are next.
  static constexpr bool wide = std::is_same_v<Space, host_space>;
  static constexpr index_t width = wide ? 16 : 1;

  moment_plan plan;
  query_rows<Space> from;
  batch_ref<Space> batch;
  index_t first = 0;
  tensor_ref<float, 4, Space> x{};     ///< [entry, q_head, row, padded dim] deviations from `mean`
  tensor_ref<float, 3, Space> mean{};  ///< [entry, q_head, padded dim] of this chunk
  float* weights = nullptr;            ///< [entry, 2] queries before this chunk, and in it
  tensor_ref<float, 3, Space> to{};    ///< [id, kv_head, floats]

  KVKEEP_HD index_t rows() const noexcept { return x.extent[2]; }
  KVKEEP_HD index_t heads() const noexcept { return x.extent[1]; }
  KVKEEP_HD index_t padded() const noexcept { return x.extent[3]; }
  /// Features of a row that one index copies: on the host all of them.
  KVKEEP_HD index_t stretch() const noexcept { return wide ? padded() : 1; }
  KVKEEP_HD bool counts(index_t entry, index_t row) const noexcept {
    index_t const p = from.position(entry, row);
    return p >= 0 && p >= first;
  }
  KVKEEP_HD float* gathered(index_t entry, index_t q_head) const noexcept {
    return to.at(batch.id_of(entry), q_head / plan.group);
  }
};

/// A stretch of one row of a chunk.
struct row_part {
  index_t entry, head, row, first;

  template <class Space>
  KVKEEP_HD row_part(moment_chunk<Space> const& c, index_t i) noexcept {
    index_t const parts = c.padded() / c.stretch();
    first = i % parts * c.stretch();
    row = i / parts % c.rows();
    head = i / parts / c.rows() % c.heads();
    entry = i / parts / c.rows() / c.heads();
  }
};

/// Copies rows, turned back to position 0; index: ((entry * q_heads + head) * rows + row) * parts + part of a row.
template <class Space>
struct turn_back {
  moment_chunk<Space> c;
  rope_pairs rope;
  float const* turns;  ///< [entry, row, pair, 2]; null: the rows have not been rotated

  KVKEEP_HD void operator()(index_t i) const noexcept {
    row_part const at(c, i);
    float const* const q = c.from.q.at(at.entry, at.head, at.row);
    float* const out = c.x.at(at.entry, at.head, at.row);
    offset_t const row = static_cast<offset_t>(at.entry) * c.rows() + at.row;
    for (index_t d = at.first; d < at.first + c.stretch(); ++d) {
      float y = d < c.plan.dim ? q[d] : 0;
      if (turns != nullptr && d < rope.dims) {
        float const* const t = turns + (row * rope.pairs() + rope.pair_of(d)) * 2;
        float const other = q[rope.partner(d)];
        y = y * t[0] + (rope.first(d) ? other : -other) * t[1];
      }
      out[d] = y;
    }
  }
};

/// Mean of a chunk, and how much it counts; index: (entry * q_heads + head) * padded + feature.
template <class Space>
struct mean_of_chunk {
  moment_chunk<Space> c;

  KVKEEP_HD void operator()(index_t i) const noexcept {
    index_t const d = i % c.padded(), head = i / c.padded() % c.heads();
    index_t const entry = i / c.padded() / c.heads();
    float sum = 0, n = 0;
    for (index_t r = 0; r < c.rows(); ++r)
      if (c.counts(entry, r)) sum += c.x(entry, head, r, d), ++n;
    c.mean(entry, head, d) = n > 0 ? sum / n : 0;
    if (d > 0 || head > 0) return;
    // What lies there before a prompt's first token says nothing.
    bool const begins = c.from.position(entry, 0) == 0;
    c.weights[2 * entry] = begins ? 0 : c.gathered(entry, 0)[0];
    c.weights[2 * entry + 1] = n;
  }
};

/// Rows become what they deviate from the chunk's mean by; index as in turn_back.
template <class Space>
struct deviations {
  moment_chunk<Space> c;

  KVKEEP_HD void operator()(index_t i) const noexcept {
    row_part const at(c, i);
    float* const x = c.x.at(at.entry, at.head, at.row);
    float const* const mean = c.mean.at(at.entry, at.head);
    bool const counts = c.counts(at.entry, at.row);
    for (index_t d = at.first; d < at.first + c.stretch(); ++d) x[d] = counts ? x[d] - mean[d] : 0;
  }
};

/// Adds a chunk's products, and those of its distance from the queries before (Chan et al.);
/// index: ((entry * q_heads + head) * dim + feature) * parts + part.
template <class Space>
struct add_spread {
  static constexpr index_t width = moment_chunk<Space>::width;
  moment_chunk<Space> c;

  KVKEEP_HD index_t parts() const noexcept { return (c.plan.dim + width - 1) / width; }
  KVKEEP_HD void operator()(index_t i) const noexcept {
    index_t const e = i % parts() * width, d = i / parts() % c.plan.dim;
    index_t const head = i / parts() / c.plan.dim % c.heads();
    index_t const entry = i / parts() / c.plan.dim / c.heads();
    float const before = c.weights[2 * entry], now = c.weights[2 * entry + 1];
    if (e > d || now == 0) return;
    float sum[width] = {};
    float const* x = c.x.at(entry, head, 0, 0);
    for (index_t r = 0; r < c.rows(); ++r, x += c.padded()) {
      float const a = x[d];
      for (index_t k = 0; k < width; ++k) sum[k] += a * x[e + k];
    }
    float* const head_floats = c.gathered(entry, head);
    float const* const was = c.plan.mean(head_floats, head % c.plan.group);
    float* const out = c.plan.spread(head_floats, head % c.plan.group, d);
    float const* const mean = c.mean.at(entry, head);
    bool const some = before > 0;
    float const apart = some ? (mean[d] - was[d]) * (before * now / (before + now)) : 0;
    for (index_t k = 0; k < width; ++k) {
      if (e + k > d) break;
      out[e + k] = some ? out[e + k] + sum[k] + apart * (mean[e + k] - was[e + k]) : sum[k];
    }
  }
};

/// The mean with a chunk's, and how many there are now; index: (entry * q_heads + head) * dim + feature.
template <class Space>
struct add_mean {
  moment_chunk<Space> c;

  KVKEEP_HD void operator()(index_t i) const noexcept {
    index_t const d = i % c.plan.dim, head = i / c.plan.dim % c.heads();
    index_t const entry = i / c.plan.dim / c.heads(), g = head % c.plan.group;
    float const before = c.weights[2 * entry], now = c.weights[2 * entry + 1];
    float* const head_floats = c.gathered(entry, head);
    if (d == 0 && g == 0) head_floats[0] = before + now;
    float* const mean = c.plan.mean(head_floats, g);
    float const was = before > 0 ? mean[d] : 0;
    mean[d] = now > 0 ? was + (c.mean(entry, head, d) - was) * (now / (before + now)) : was;
  }
};

/// Adds query rows to the moments of `to` `[id, kv_head, floats]`. A chunk that begins with position 0 begins anew.
/// Operations: group * dim^2 / 2 multiplications with additions per row and KV head.
/// @param rows      of the batch's entries, in the order of their positions
/// @param first     rows of positions below do not count
/// @param rotation  of the rows by their positions, which is undone; null: they are not rotated
/// @return unsupported where a step has 2^31 indices or more
template <class Ctx>
status add_moments(Ctx& ctx, moment_plan const& plan, batch_ref<space_of<Ctx>> const& batch,
                   query_rows<space_of<Ctx>> const& rows, index_t first, rope_pairs const* rotation,
                   tensor_ref<float, 3, space_of<Ctx>> to, workspace& ws) {
  using space = space_of<Ctx>;
  using chunk = moment_chunk<space>;
  index_t const entries = batch.n, heads = rows.q.extent[1], n = rows.q.extent[2];
  index_t const padded = (plan.dim + chunk::width - 1) / chunk::width * chunk::width;
  index_t const pairs = rotation != nullptr ? rotation->pairs() : 0;
  if (rows.by_id) return status::bad_argument;
  if (product(entries, heads, std::max(n, plan.dim), padded) >= std::size_t{1} << 31)
    return status::unsupported;
  if (n == 0) return status::ok;
  workspace::frame const frame(ws);
  chunk c{plan, rows, batch, first};
  c.x = row_major<space>(ws.take<float>(product(entries, heads, n, padded)), entries, heads, n,
                         padded);
  c.mean =
      row_major<space>(ws.take<float>(product(entries, heads, padded)), entries, heads, padded);
  c.weights = ws.take<float>(product(entries, 2));
  c.to = to;
  float* const turns = pairs > 0 ? ws.take<float>(product(entries, n, pairs, 2)) : nullptr;
  if (ws.measuring()) return status::ok;
  if (!ws.ok()) return status::workspace_too_small;
  index_t const all = entries * heads * n * (padded / c.stretch());
  if (pairs > 0)
    KVKEEP_TRY(
        run_each(ctx, entries * n * pairs, row_turns<space>{*rotation, rows.position, turns}, ws));
  rope_pairs const none;
  KVKEEP_TRY(
      run_each(ctx, all, turn_back<space>{c, rotation != nullptr ? *rotation : none, turns}, ws));
  KVKEEP_TRY(run_each(ctx, entries * heads * padded, mean_of_chunk<space>{c}, ws));
  KVKEEP_TRY(run_each(ctx, all, deviations<space>{c}, ws));
  if (plan.spreads) {
    add_spread<space> const add{c};
    KVKEEP_TRY(run_each(ctx, entries * heads * plan.dim * add.parts(), add, ws));
  }
  return run_each(ctx, entries * heads * plan.dim, add_mean<space>{c}, ws);
}

}  // namespace KVKEEP_CPU_ISA
}  // namespace kvkeep::detail
