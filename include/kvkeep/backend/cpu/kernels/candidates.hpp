// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Slots to choose from as integer keys, so that ties, -0, NaN and fast-math builds cannot change a
/// kept set; and the one slot to evict.
#pragma once

#include <utility>

#include "../simd.hpp"

namespace kvkeep::cpu {
inline namespace KVKEEP_CPU_ISA {

/// Key of a slot that is no candidate: below every key of a score.
inline constexpr std::int32_t no_key = INT32_MIN;

/// Monotone integer key of a score: -0 equals +0, NaN is lowest, below -infinity.
inline std::int32_t order_key(float x) noexcept {
  std::int32_t const u = bit_copy<std::int32_t>(x);
  std::int32_t const magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) return INT32_MIN + 1;
  return u < 0 ? -magnitude : magnitude;
}
inline vi order_key(vf x) noexcept {
  vi const u = bits_of(x), magnitude = u & splat(std::int32_t{0x7fffffff});
  vi const sign = shift_right<31>(u), key = (magnitude ^ sign) - sign;
  vi const nan = greater(magnitude, splat(std::int32_t{0x7f800000}));
  return select(nan, splat(std::int32_t{INT32_MIN + 1}), key);
}

/// Slots to choose from: those that are allowed and whose position lies in [from, to).
struct candidates {
  float const* scores = nullptr;  ///< [n], host
  index_t const* positions =
      nullptr;  ///< [n], host, distinct, >= 0, any order; null: the slot number
  std::uint8_t const* allowed =
      nullptr;  ///< [n], host: 0 for slots that are no candidates; null: all are
  index_t n = 0;
  index_t from = 0;
  index_t to = INT32_MAX;

  index_t position(index_t j) const noexcept { return positions == nullptr ? j : positions[j]; }
  bool in_range(index_t j) const noexcept { return position(j) >= from && position(j) < to; }
};

/// Positions of eight slots from `j` on.
inline vi full_candidate_positions(candidates const& c, index_t j) noexcept {
  constexpr std::int32_t numbers[8] = {0, 1, 2, 3, 4, 5, 6, 7};
  return c.positions == nullptr ? splat(j) + load(numbers) : load(c.positions + j);
}
/// The same where there may be fewer.
inline vi candidate_positions(candidates const& c, index_t j) noexcept {
  if (c.n - j >= lanes || c.positions == nullptr) return full_candidate_positions(c, j);
  return load_part(c.positions + j, c.n - j);
}

/// Keys of eight slots with positions `p` from `j` on, `other` for those that are no candidates.
template <bool Bytes>
inline vi full_candidate_keys(candidates const& c, index_t j, vi p, vi other) noexcept {
  vi key = order_key(load(c.scores + j));
  if constexpr (Bytes)
    key = select(equal(load_bytes(c.allowed + j), splat(std::int32_t{0})), other, key);
  return select(greater(splat(c.to), p) & greater(p, splat(c.from - 1)), key, other);
}

/// Calls f(keys, positions, j) and g(...) in turn, for eight slots at a time, and returns what they
/// have become: running results stay in registers, and two of them hide latency. Lanes behind the
/// end, and slots that are no candidates, have the key `other`.
template <bool Bytes, class F>
inline std::pair<F, F> each_key(candidates const& c, std::int32_t other, F f, F g) noexcept {
  vi const none = splat(other);
  index_t j = 0;
  for (; j + 2 * lanes <= c.n; j += 2 * lanes) {
    vi const p = full_candidate_positions(c, j), q = full_candidate_positions(c, j + lanes);
    f(full_candidate_keys<Bytes>(c, j, p, none), p, j);
    g(full_candidate_keys<Bytes>(c, j + lanes, q, none), q, j + lanes);
  }
  for (; j < c.n; j += lanes) {
    index_t const width = c.n - j < lanes ? c.n - j : lanes;
    float scores[8] = {};
    std::uint8_t allowed[8] = {};
    for (index_t i = 0; i < width; ++i) {
      scores[i] = c.scores[j + i];
      allowed[i] = (c.allowed == nullptr || c.allowed[j + i] != 0) && c.in_range(j + i) ? 1 : 0;
    }
    candidates const rest{scores, nullptr, allowed, lanes};
    vi const p = candidate_positions(c, j);
    f(full_candidate_keys<true>(rest, 0, p, none), p, j);
  }
  return {f, g};
}
template <class F>
inline std::pair<F, F> each_key(candidates const& c, std::int32_t other, F f, F g) noexcept {
  return c.allowed != nullptr ? each_key<true>(c, other, f, g) : each_key<false>(c, other, f, g);
}

/// The lowest key of each lane, and of equal ones the highest position.
struct lane_minimum {
  vi key = splat(std::int32_t{INT32_MAX});
  vi position = splat(std::int32_t{-1});
  vi first = splat(std::int32_t{0});

  void take(vi k, vi p, vi at) noexcept {
    vi const better = greater(key, k) | (equal(key, k) & greater(p, position));
    key = select(better, k, key);
    position = select(better, p, position);
    first = select(better, at, first);
  }
  void operator()(vi k, vi p, index_t j) noexcept { take(k, p, splat(j)); }
};

/// The candidate to evict: lowest score, of equal ones the highest position. -1 without candidates.
/// Cost: 8 bytes (9 with `allowed`) read per slot, no branch on data.
inline index_t evict_index(candidates const& c) noexcept {
  auto [least, odd] = each_key(c, INT32_MAX, lane_minimum{}, lane_minimum{});
  least.take(odd.key, odd.position, odd.first);
  std::int32_t key[8], position[8], first[8];
  store(key, least.key);
  store(position, least.position);
  store(first, least.first);
  int at = 0;
  for (int i = 1; i < 8; ++i)
    if (key[i] < key[at] || (key[i] == key[at] && position[i] > position[at])) at = i;
  return key[at] == INT32_MAX ? -1 : first[at] + at;
}

}  // namespace KVKEEP_CPU_ISA
}  // namespace kvkeep::cpu
