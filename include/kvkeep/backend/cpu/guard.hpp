// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The guard of one head as two thresholds on positions.
#pragma once

#include <limits>

#include "../../op/common.hpp"
#include "context.hpp"
#include "simd.hpp"

namespace kvkeep::cpu {
inline namespace KVKEEP_CPU_ISA {

/// Fetches a row of slots that the next head will read. Rows are about a page long, where the
/// processor's own prefetching ends.
template <class T>
inline void prefetch_slots(T const* row, index_t n) noexcept {
  constexpr index_t most = 2048, line = 64 / static_cast<index_t>(sizeof(T));
  for (index_t j = 0; j < n && j < most; j += line) prefetch(row + j);
}

/// A slot is open to eviction if its position lies in [from, to).
struct open_range {
  index_t from = 0;
  index_t to = std::numeric_limits<index_t>::max();

  bool has(index_t position) const noexcept { return position >= from && position < to; }
};

/// Smallest and largest position.
struct position_bounds {
  index_t low = 0;
  index_t high = 0;
};

inline position_bounds bounds_of(index_t const* positions, index_t n) noexcept {
  vi low = splat(std::int32_t{INT32_MAX}), high = splat(std::int32_t{INT32_MIN});
  vi low2 = low, high2 = high;
  index_t j = 0;
  for (; j + 2 * lanes <= n; j += 2 * lanes) {
    vi const a = load(positions + j), b = load(positions + j + lanes);
    low = min(low, a), low2 = min(low2, b);
    high = max(high, a), high2 = max(high2, b);
  }
  for (; j + lanes <= n; j += lanes) {
    low = min(low, load(positions + j));
    high = max(high, load(positions + j));
  }
  std::int32_t a[8], b[8];
  store(a, min(low, low2));
  store(b, max(high, high2));
  position_bounds r{*std::min_element(a, a + 8), *std::max_element(b, b + 8)};
  for (; j < n; ++j) r = {std::min(r.low, positions[j]), std::max(r.high, positions[j])};
  return r;
}

/// Bit i says whether position i of up to eight is open.
inline unsigned open_bits(open_range const& range, index_t const* positions, index_t n) noexcept {
  vi const p = load_some(positions, n);
  vi const inside = greater(p, splat(range.from - 1)) & greater(splat(range.to), p);
  return lane_bits(inside) & (n >= lanes ? 0xffu : (1u << n) - 1u);
}

inline index_t count_open(open_range const& range, index_t const* positions, index_t n) noexcept {
  vi const below = splat(range.from - 1), to = splat(range.to);
  vi open = splat(std::int32_t{0});
  index_t j = 0;
  for (; j + lanes <= n; j += lanes) {
    vi const p = load(positions + j);
    open = open - (greater(p, below) & greater(to, p));
  }
  std::int32_t each[8];
  store(each, open);
  index_t count = 0;
  for (std::int32_t x : each) count += x;
  for (; j < n; ++j) count += range.has(positions[j]) ? 1 : 0;
  return count;
}

/// mask[j] = -1 if slot j is open, else 0. @param mask [n]
inline void write_open(open_range const& range, index_t const* positions, index_t n,
                       std::int32_t* mask) noexcept {
  for (index_t j = 0; j < n; j += lanes)
    store_some(mask + j, lane_mask(open_bits(range, positions + j, n - j)), n - j);
}

/// Thresholds of a guard. Positions are distinct, in any order.
/// @param scratch [n], host; used only where live positions near an end have gaps
/// Cost: 8 bytes read per slot.
inline open_range find_open(index_t const* positions, index_t n, index_t sinks, index_t recent,
                            index_t frozen, index_t* scratch) noexcept {
  constexpr index_t lowest = std::numeric_limits<index_t>::min();
  open_range r{frozen, std::numeric_limits<index_t>::max()};
  if (n == 0) return r;
  if (sinks >= n || recent >= n) return {0, lowest};
  position_bounds const b = bounds_of(positions, n);
  if (recent > 0) {
    r.to = b.high - recent + 1;
    index_t const found = count_open({r.to, std::numeric_limits<index_t>::max()}, positions, n);
    if (found != recent) {
      std::copy_n(positions, n, scratch);
      std::nth_element(scratch, scratch + (n - recent), scratch + n);
      r.to = scratch[n - recent];
    }
  }
  if (sinks > 0) {
    index_t from = b.low + sinks;
    if (count_open({lowest + 1, from}, positions, n) != sinks) {
      std::copy_n(positions, n, scratch);
      std::nth_element(scratch, scratch + sinks, scratch + n);
      from = scratch[sinks];
    }
    r.from = std::max(r.from, from);
  }
  return r;
}

inline open_range find_open(guard_ref<host_space> const& g, index_t id, index_t const* positions,
                            index_t n, index_t* scratch) noexcept {
  return find_open(positions, n, g.sinks, g.recent, g.frozen != nullptr ? g.frozen[id] : 0,
                   scratch);
}

}  // namespace KVKEEP_CPU_ISA
}  // namespace kvkeep::cpu
