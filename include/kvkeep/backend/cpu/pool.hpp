// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CPU: rows of scores reduced over heads, and pooled over positions.
#pragma once

#include <algorithm>
#include <utility>

#include "../../op/window_score.hpp"
#include "guard.hpp"

namespace kvkeep::cpu {
inline namespace KVKEEP_CPU_ISA {

/// Reduction over the rows for eight slots from `in` on, rows ascending. A maximum ignores NaN.
inline vf reduce_at(float const* in, offset_t stride, index_t n_rows, reduction how,
                    index_t width) noexcept {
  bool const top = how == reduction::max;
  vf sum = splat(top ? -std::numeric_limits<float>::infinity() : 0.0F);
  for (index_t r = 0; r < n_rows; ++r) {
    vf const x = load_some(in + r * stride, width);
    sum = top ? max(x, sum) : sum + x;
  }
  return how == reduction::mean ? sum / splat(static_cast<float>(n_rows)) : sum;
}

/// out[j] = scale * in[j]. One row is the common case while decoding.
inline void scale_row(float const* in, index_t n, float scale, float* out) noexcept {
  vf const factor = splat(scale);
  index_t j = 0;
  for (; j + lanes <= n; j += lanes) store(out + j, load(in + j) * factor);
  if (j < n) store_part(out + j, load_part(in + j, n - j) * factor, n - j);
}

/// Reduces rows. Cost: 4 bytes per input, 4 per output.
KVKEEP_CPU_OP status enqueue(context& c, op::reduce_rows<host_space> const& o,
                             workspace& ws) noexcept {
  if (!slots_contiguous(o.in) || !slots_contiguous(o.out) ||
      (o.by_age && o.seen == nullptr && !ws.measuring()) || !slots_contiguous(o.slots.positions))
    return status::bad_argument;
  if (!placed(ws)) return not_placed(ws);
  vf const scale = splat(o.scale);
  index_t const heads = o.slots.lengths.extent[1];
  for_heads(c, o.batch.n, heads, [&](index_t b, index_t h, int) {
    index_t const id = o.batch.id_of(b), n = o.slots.lengths(id, h);
    index_t const from = o.in_by_id ? id : b;
    if (o.in.extent[2] == 1 && !o.by_age && o.how != reduction::max) {
      if (h + 1 < heads) prefetch_slots(o.in.at(from, h + 1, 0, 0), n);
      scale_row(o.in.at(from, h, 0, 0), n, o.scale, o.out.at(b, h, 0));
      return;
    }
    vi const seen = splat(o.by_age ? o.seen[id] : 0);
    for (index_t j = 0; j < n; j += lanes) {
      index_t const width = n - j;
      float const* const in = o.in.at(from, h, 0, j);
      vf x = reduce_at(in, o.in.stride[2], o.in.extent[2], o.how, width) * scale;
      if (o.by_age) x = x / convert(seen - load_some(o.slots.positions.at(id, h, j), width));
      store_some(o.out.at(b, h, j), x, width);
    }
  });
  return status::ok;
}

/// Pools `n` values. @param x [n + kernel - 1] with the padding in place  @param y [n]
inline void pool_line(float const* x, index_t n, index_t kernel, op::pooling kind,
                      float* y) noexcept {
  vf const divisor = splat(static_cast<float>(kernel));
  for (index_t j = 0; j < n; j += lanes) {
    index_t const width = n - j;
    vf acc = splat(kind == op::pooling::average ? 0.0F : -std::numeric_limits<float>::infinity());
    for (index_t d = 0; d < kernel; ++d) {
      vf const v = load_some(x + j + d, width);
      acc = kind == op::pooling::average ? acc + v : max(v, acc);
    }
    store_some(y + j, kind == op::pooling::average ? acc / divisor : acc, width);
  }
}

/// Slots in position order, or null where the slots are in that order already: sorted by one digit after
/// another, the lowest first, for as many as positions differ in. A decision while decoding finds slots in
/// any order, and sorting them by comparisons would take a third of KeyDiff's time.
/// @param list [2 * n] scratch, where the result lies. Cost: 16 bytes per slot and digit.
inline index_t const* position_order(index_t const* positions, index_t n, index_t* list) noexcept {
  if (std::is_sorted(positions, positions + n)) return nullptr;
  constexpr int bits = 8;
  auto const ends = std::minmax_element(positions, positions + n);
  auto const lowest = static_cast<std::uint32_t>(*ends.first);
  std::uint32_t const range = static_cast<std::uint32_t>(*ends.second) - lowest;
  index_t *from = list, *to = list + n;
  for (index_t j = 0; j < n; ++j) from[j] = j;
  for (int shift = 0; shift < 32 && range >> shift != 0; shift += bits) {
    auto const digit = [&](index_t slot) {
      return (static_cast<std::uint32_t>(positions[slot]) - lowest) >> shift & ((1U << bits) - 1);
    };
    index_t place[1 << bits] = {};  // of each digit's next slot
    for (index_t j = 0; j < n; ++j) ++place[digit(j)];
    for (index_t d = 0, sum = 0; d < 1 << bits; ++d) sum += std::exchange(place[d], sum);
    for (index_t i = 0; i < n; ++i) to[place[digit(from[i])]++] = from[i];
    std::swap(from, to);
  }
  return from;
}

/// Pools rows in place. Cost: 16 bytes and `kernel` operations per value.
KVKEEP_CPU_OP status enqueue(context& c, op::pool_rows<host_space> const& o,
                             workspace& ws) noexcept {
  if (!slots_contiguous(o.values) || !slots_contiguous(o.slots.positions) || o.kernel < 1 ||
      o.kernel % 2 == 0)
    return status::bad_argument;
  workspace::frame const frame(ws);
  index_t const heads = o.slots.lengths.extent[1];
  std::size_t const slots = size_of(o.slots.positions.extent[2]);
  int const workers = c.workers(o.batch.n * heads);
  auto const lists = take_each<index_t>(ws, workers, slots * 2);
  auto const lines = take_each<float>(ws, workers, slots * 2 + size_of(o.kernel));
  if (!placed(ws)) return not_placed(ws);
  if (o.kind == op::pooling::none || o.kernel == 1) return status::ok;
  for_heads(c, o.batch.n, heads, [&](index_t b, index_t h, int worker) {
    index_t const id = o.batch.id_of(b), n = o.slots.lengths(id, h), side = o.kernel / 2;
    index_t const* const positions = o.slots.positions.at(id, h, 0);
    open_range const open = find_open(positions, n, 0, o.recent, 0, lists(worker));
    index_t const m = count_open(open, positions, n);
    index_t const* const order = position_order(positions, n, lists(worker));
    auto const slot = [&](index_t i) { return order != nullptr ? order[i] : i; };
    float* const x = lines(worker);
    float* const y = x + m + o.kernel;
    float const outside =
        o.kind == op::pooling::average ? 0.0F : -std::numeric_limits<float>::infinity();
    for (index_t r = 0; m > 0 && r < o.values.extent[2]; ++r) {
      float* const row = o.values.at(b, h, r, 0);
      std::fill_n(x, side, outside);
      for (index_t i = 0; i < m; ++i) x[side + i] = row[slot(i)];
      std::fill_n(x + side + m, side, outside);
      pool_line(x, m, o.kernel, o.kind, y);
      for (index_t i = 0; i < m; ++i) row[slot(i)] = y[i];
    }
  });
  return status::ok;
}

}  // namespace KVKEEP_CPU_ISA
}  // namespace kvkeep::cpu
