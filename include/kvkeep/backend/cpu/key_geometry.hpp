// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CPU: KeyDiff and LagKV.
#pragma once

#include <cmath>
#include <limits>

#include "../../op/key_geometry.hpp"
#include "kernels/key_rows.hpp"
#include "kernels/select.hpp"
#include "pool.hpp"
#include "rows.hpp"

namespace kvkeep::cpu {
inline namespace KVKEEP_CPU_ISA {

/// sum[d] += factor * row[d], in double.
template <class T>
void add_scaled(T const* row, float factor, index_t dim, double* sum) noexcept {
  index_t d = 0;
  float x[lanes];
  for (; d + lanes <= dim; d += lanes) {
    store(x, load(row + d) * splat(factor));
    for (index_t i = 0; i < lanes; ++i) sum[d + i] += static_cast<double>(x[i]);
  }
  for (; d < dim; ++d) sum[d] += static_cast<double>(to_float(row[d]) * factor);
}

/// Whether a norm is neither infinite nor NaN. By integers: safe under fast-math.
inline bool finite_norm(float norm) noexcept { return bit_copy<std::uint32_t>(norm) < 0x7f800000u; }

/// Scratch of one worker: the order of slots and what it is made in, gathered rows, lines of numbers.
struct geometry_scratch {
  worker_scratch<index_t> order;
  worker_scratch<float> gathered;
  worker_scratch<float> lines;
  worker_scratch<double> sums;
};

inline void key_diff_head(op::key_diff<host_space> const& o, geometry_scratch const& scratch,
                          index_t b, index_t h, int worker) noexcept {
  kv_ref<host_space> const& kv = o.layer.kv;
  index_t const id = o.batch.id_of(b), n = o.layer.slots.lengths(id, h), dim = kv.shape.dim_k;
  index_t const* const positions = o.layer.slots.positions.at(id, h, 0);
  index_t const* const order = position_order(positions, n, scratch.order(worker));
  head_rows const k{&kv.k, o.batch.row_of(b), h};
  double* const sum = scratch.sums(worker);
  float* const mean = scratch.lines(worker);
  float* const norms = mean + dim;
  std::fill_n(sum, dim, 0.0);
  for_row_chunks(k, {order, 0, n}, scratch.gathered(worker),
                 [&](index_t at, index_t m, auto const* rows) {
                   row_norms(row_list<row_element<decltype(rows)>>{rows, m}, dim, norms + at);
                   for (index_t i = 0; i < m; ++i)
                     if (finite_norm(norms[at + i]))
                       add_scaled(rows[i], 1.0F / std::max(norms[at + i], 1e-12F), dim, sum);
                 });
  double square = 0;
  for (index_t d = 0; d < dim; ++d) {
    sum[d] /= std::max<index_t>(n, 1);
    square += sum[d] * sum[d];
    mean[d] = static_cast<float>(sum[d]);
  }
  float const length = static_cast<float>(std::sqrt(square));
  float* const out = o.out.at(b, h, 0);
  query_rows const anchor{mean, dim, 1, dim, {}};
  for_row_chunks(
      k, {order, 0, n}, scratch.gathered(worker), [&](index_t at, index_t m, auto const* rows) {
        float dot[row_chunk];
        qk_rows(anchor, row_list<row_element<decltype(rows)>>{rows, m}, dot, row_chunk);
        for (index_t i = 0; i < m; ++i)
          out[order != nullptr ? order[at + i] : at + i] =
              finite_norm(norms[at + i]) ? -dot[i] / std::max(norms[at + i] * length, 1e-8F)
                                         : std::numeric_limits<float>::quiet_NaN();
      });
}

/// KeyDiff. Cost as the op says.
KVKEEP_CPU_OP status enqueue(context& c, op::key_diff<host_space> const& o,
                             workspace& ws) noexcept {
  kv_ref<host_space> const& kv = o.layer.kv;
  if (!readable(kv.k)) return status::unsupported;
  if (!slots_contiguous(o.out) || !slots_contiguous(o.layer.slots.positions))
    return status::bad_argument;
  workspace::frame const frame(ws);
  int const workers = c.workers(o.batch.n * kv.shape.n_kv_heads);
  geometry_scratch scratch;
  scratch.order = take_each<index_t>(ws, workers, 2 * size_of(kv.shape.max_slots));
  scratch.gathered = take_each<float>(ws, workers, gather_floats(kv.k));
  scratch.lines =
      take_each<float>(ws, workers, size_of(kv.shape.dim_k) + size_of(kv.shape.max_slots));
  scratch.sums = take_each<double>(ws, workers, size_of(kv.shape.dim_k));
  if (!placed(ws)) return not_placed(ws);
  for_heads(c, o.batch.n, kv.shape.n_kv_heads,
            [&](index_t b, index_t h, int worker) { key_diff_head(o, scratch, b, h, worker); });
  return status::ok;
}

/// A run of slots in position order.
inline slot_span span_of(index_t const* order, index_t first, index_t n) noexcept {
  return order != nullptr ? slot_span{order + first, 0, n} : slot_span{nullptr, first, n};
}

/// Softmax over one partition of the deviation of its rows, each channel scaled by its range in the
/// next partition. @param lines [4 * dim] scratch  @param out [lag]
inline void lag_deviation(head_rows const& rows_of, index_t const* order, index_t first,
                          index_t lag, float* gathered, float* lines, float* out) noexcept {
  index_t const dim = rows_of.p->dim;
  float* const low = lines;
  float* const high = low + dim;
  for_row_chunks(
      rows_of, span_of(order, first + lag, lag), gathered,
      [&](index_t at, index_t n, auto const* rows) {
        float* const part = at == 0 ? low : high + dim;
        channel_range(row_list<row_element<decltype(rows)>>{rows, n}, dim, part, part + dim);
        for (index_t d = 0; at > 0 && d < dim; ++d) {
          low[d] = std::min(low[d], part[d]);
          high[d] = std::max(high[d], part[d + dim]);
        }
      });
  invert_range(low, high, dim, high);  // a channel without range counts as 0 (spec 3.8)
  if (dim == 1) {                      // one feature does not deviate
    std::fill_n(out, lag, 1.0F / static_cast<float>(lag));
    return;
  }
  for_row_chunks(rows_of, span_of(order, first, lag), gathered,
                 [&](index_t at, index_t n, auto const* rows) {
                   normalised_deviation(row_list<row_element<decltype(rows)>>{rows, n}, dim, low,
                                        high, out + at);
                 });
  softmax_sum const s = softmax_row(out, lag, out);
  for (index_t i = 0; i < lag; ++i) out[i] /= s.sum;
}

inline void lag_score_head(op::lag_score<host_space> const& o, geometry_scratch const& scratch,
                           index_t b, index_t h, int worker) noexcept {
  kv_ref<host_space> const& kv = o.layer.kv;
  index_t const id = o.batch.id_of(b), n = o.layer.slots.lengths(id, h), lag = o.lag;
  index_t* const list = scratch.order(worker);
  index_t const* const order = position_order(o.layer.slots.positions.at(id, h, 0), n, list);
  auto const slot = [&](index_t i) { return order != nullptr ? order[i] : i; };
  float* const out = o.out.at(b, h, 0);
  std::fill_n(out, n, 1.0F);
  index_t const dim = std::max(kv.shape.dim_k, kv.shape.dim_v);
  float* const lines = scratch.lines(worker);
  float* const key = lines + 4 * dim;
  float* const value = key + lag;
  index_t* const ranked = list + 2 * static_cast<offset_t>(kv.shape.max_slots);
  index_t const parts = n > o.sinks ? (n - o.sinks) / lag : 0;
  index_t const seq = o.batch.row_of(b);
  for (index_t m = 0; m + 1 < parts; ++m) {
    index_t const first = o.sinks + m * lag;
    lag_deviation({&kv.k, seq, h}, order, first, lag, scratch.gathered(worker), lines, key);
    lag_deviation({&kv.v, seq, h}, order, first, lag, scratch.gathered(worker), lines, value);
    for (index_t i = 0; i < lag; ++i) {
      key[i] = (key[i] + value[i]) / 2;
      ranked[i] = i;
    }
    if (!o.cross_scoring)
      std::sort(ranked, ranked + lag, [=](index_t a, index_t c) {
        std::int32_t const x = order_key(key[a]), y = order_key(key[c]);
        return x != y ? x < y : a < c;
      });
    for (index_t i = 0; i < lag; ++i)
      out[slot(first + ranked[i])] =
          o.cross_scoring ? key[i] : static_cast<float>(i) / static_cast<float>(lag);
  }
}

/// LagKV. Cost: K and V twice, 10 operations per feature, sorting inside the partitions.
KVKEEP_CPU_OP status enqueue(context& c, op::lag_score<host_space> const& o,
                             workspace& ws) noexcept {
  kv_ref<host_space> const& kv = o.layer.kv;
  if (!readable(kv.k) || !readable(kv.v)) return status::unsupported;
  if (!slots_contiguous(o.out) || !slots_contiguous(o.layer.slots.positions) || o.lag < 1 ||
      o.sinks < 0)
    return status::bad_argument;
  workspace::frame const frame(ws);
  int const workers = c.workers(o.batch.n * kv.shape.n_kv_heads);
  std::size_t const dim = size_of(std::max(kv.shape.dim_k, kv.shape.dim_v)), lag = size_of(o.lag);
  geometry_scratch scratch;
  scratch.order = take_each<index_t>(ws, workers, 2 * size_of(kv.shape.max_slots) + lag);
  scratch.gathered =
      take_each<float>(ws, workers, std::max(gather_floats(kv.k), gather_floats(kv.v)));
  scratch.lines = take_each<float>(ws, workers, 4 * dim + 2 * lag);
  if (!placed(ws)) return not_placed(ws);
  for_heads(c, o.batch.n, kv.shape.n_kv_heads,
            [&](index_t b, index_t h, int worker) { lag_score_head(o, scratch, b, h, worker); });
  return status::ok;
}

}  // namespace KVKEEP_CPU_ISA
}  // namespace kvkeep::cpu
