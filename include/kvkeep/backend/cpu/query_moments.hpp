// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CPU: moments of query rows, and the logits of keys by them.
#pragma once

#include <cmath>

#include "../../op/query_moments.hpp"
#include "kernels/quadratic.hpp"
#include "query_block.hpp"

namespace kvkeep::cpu {
inline namespace KVKEEP_CPU_ISA {

/// Of a block: with 128 features the first-level cache.
inline constexpr index_t gathered_rows = 64;

/// Turns a row's pairs back. @param cosine, sine  [pairs]  @param q, out  [dim], not the same
inline void turn_row_back(float const* q, turned_pairs const& pairs, float const* cosine,
                          float const* sine, float* out) noexcept {
  index_t const n = pairs.pairs();
  index_t i = 0;
  for (; !pairs.interleaved && i + lanes <= n; i += lanes) {
    vf const a = load(q + i), b = load(q + n + i), c = load(cosine + i), s = load(sine + i);
    store(out + i, fma(a, c, b * s));
    store(out + n + i, fnma(a, s, b * c));
  }
  index_t const step = pairs.interleaved ? 1 : n;
  for (; i < n; ++i) {
    index_t const d = pairs.interleaved ? 2 * i : i;
    float const a = q[d], b = q[d + step];
    out[d] = a * cosine[i] + b * sine[i];
    out[d + step] = b * cosine[i] - a * sine[i];
  }
}

/// The moments of one query head on their way.
struct head_moments {
  op::query_moments<host_space> const& o;
  index_t b, q_head;
  float* x;  ///< [gathered_rows + 1][padded] scratch
  float *mean, *spread;
  index_t padded;

  float* row(index_t i) const noexcept { return x + static_cast<offset_t>(i) * padded; }

  /// Copies the rows of [first, last) that count, turned back. @return how many
  index_t take(index_t first, index_t last) const noexcept {
    index_t const dim = o.layout.dim;
    index_t n = 0;
    for (index_t r = first; r < last; ++r) {
      index_t const p = o.rows.position(b, r);
      if (p < 0 || p < o.first) continue;
      float const* const q = o.rows.q.at(b, q_head, r);
      float* const out = row(n++);
      index_t const turned = o.turns ? o.pairs.dims : 0;
      if (turned > 0) turn_row_back(q, o.pairs, o.turns.at(b, r, 0), o.turns.at(b, r, 1), out);
      std::memcpy(out + turned, q + turned, size_of(dim - turned) * sizeof(float));
      std::fill(out + dim, out + padded, 0.0F);
    }
    return n;
  }
  /// Adds `n` rows to `before` ones (Chan et al.): their products, and those of their mean's distance, one more row.
  void add(index_t n, float before) const noexcept {
    auto const now = static_cast<float>(n);
    float const share = now / (before + now), apart = std::sqrt(before * share);
    float* const distance = row(n);
    index_t const dim = o.layout.dim;
    for (index_t d = 0; d < padded; d += lanes) {
      vf sum = splat(0.0F);
      for (index_t i = 0; i < n; ++i) sum = sum + load(row(i) + d);
      vf const own = sum * splat(1 / now);
      if (o.layout.spreads)
        for (index_t i = 0; i < n; ++i) store(row(i) + d, load(row(i) + d) - own);
      store(distance + d, own);
    }
    for (index_t d = 0; d < dim; ++d) {
      float const was = before > 0 ? mean[d] : 0, off = distance[d] - was;
      mean[d] = was + off * share;
      distance[d] = off * apart;
    }
    if (o.layout.spreads) add_products(x, padded, before > 0 ? n + 1 : n, dim, spread, before > 0);
  }
};

/// Moments of query rows. A worker takes a KV head, 64 rows at a time.
KVKEEP_CPU_OP status enqueue(context& c, op::query_moments<host_space> const& o,
                             workspace& ws) noexcept {
  if (o.rows.by_id || !slots_contiguous(o.rows.q) || !slots_contiguous(o.turns))
    return status::bad_argument;
  workspace::frame const frame(ws);
  index_t const n_rows = o.rows.q.extent[2], kv_heads = o.to.extent[1];
  index_t const padded = whole_panels(o.layout.dim);
  auto const scratch = take_each<float>(ws, c.workers(o.batch.n * kv_heads),
                                        size_of(gathered_rows + 1) * size_of(padded));
  if (!placed(ws)) return not_placed(ws);
  if (n_rows == 0) return status::ok;
  for_heads(c, o.batch.n, kv_heads, [&](index_t b, index_t h, int worker) {
    float* const head = o.to.at(o.batch.id_of(b), h);
    float const before = o.rows.position(b, 0) == 0 ? 0 : head[0];
    float count = before;
    for (index_t g = 0; g < o.layout.group; ++g) {
      count = before;
      head_moments const m{o,
                           b,
                           h * o.layout.group + g,
                           scratch(worker),
                           o.layout.mean(head, g),
                           o.layout.spread(head, g, 0),
                           padded};
      for (index_t r = 0; r < n_rows; r += gathered_rows) {
        index_t const n = m.take(r, std::min(n_rows, r + gathered_rows));
        if (n > 0) m.add(n, count);
        count += static_cast<float>(n);
      }
    }
    head[0] = count;
  });
  return status::ok;
}

/// Quadratic logits. The keys are packed once, and pass by all of the group's forms.
KVKEEP_CPU_OP status enqueue(context& c, op::quadratic_logits<host_space> const& o,
                             workspace& ws) noexcept {
  kv_ref<host_space> const& kv = o.layer.kv;
  if (!readable(kv.k)) return status::unsupported;
  if (!slots_contiguous(o.form) || !slots_contiguous(o.out) ||
      !slots_contiguous(o.layer.slots.positions))
    return status::bad_argument;
  workspace::frame const frame(ws);
  index_t const heads = kv.shape.n_kv_heads, dim = kv.shape.dim_k, group = kv.shape.group();
  int const workers = c.workers(o.batch.n * heads);
  auto const panels = take_each<float>(ws, workers, panel_floats(1 + dim));
  auto const gathered = take_each<float>(ws, workers, gather_floats(kv.k));
  if (!placed(ws)) return not_placed(ws);
  for_heads(c, o.batch.n, heads, [&](index_t b, index_t h, int worker) {
    index_t const id = o.batch.id_of(b), n_slots = o.layer.slots.lengths(id, h);
    index_t const* const positions = o.layer.slots.positions.at(id, h, 0);
    float* const panel = panels(worker);
    std::fill_n(panel, panel_keys, 1.0F);
    auto const take = [&](index_t at, index_t n) {
      for (index_t g = 0; g < group; ++g) {
        float z[panel_keys];
        quadratic_panel(o.form.at(b, h * group + g), o.form.stride[2], dim, o.spreads, panel, z);
        float* const out = o.out.at(b, h * group + g, at);
        for (index_t j = 0; j < n; ++j)
          out[j] = positions[at + j] < o.first ? -std::numeric_limits<float>::infinity() : z[j];
      }
    };
    for_row_chunks({&kv.k, o.batch.row_of(b), h}, {nullptr, 0, n_slots}, gathered(worker),
                   [&](index_t at, index_t n, auto const* rows) {
                     for (index_t j = 0; j < n; j += panel_keys) {
                       index_t const count = std::min(panel_keys, n - j);
                       pack_panel(rows + j, count, dim, panel + panel_keys);
                       take(at + j, count);
                     }
                   });
  });
  return status::ok;
}

}  // namespace KVKEEP_CPU_ISA
}  // namespace kvkeep::cpu
