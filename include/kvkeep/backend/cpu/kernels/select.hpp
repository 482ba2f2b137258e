// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Selection by score descending, position ascending. Scores compare as integer keys, so that ties,
/// -0, NaN and fast-math builds cannot change a kept set.
#pragma once

#include <algorithm>
#include <bit>
#include <functional>

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

/// Slots to choose from.
struct candidates {
  float const* scores = nullptr;  ///< [n], host
  index_t const* positions =
      nullptr;  ///< [n], host, distinct, >= 0, any order; null: the slot number
  std::uint8_t const* allowed =
      nullptr;  ///< [n], host: 0 for slots that are no candidates; null: all are
  index_t n = 0;

  index_t position(index_t j) const noexcept { return positions == nullptr ? j : positions[j]; }
};

/// Keys of eight slots from `j` on.
inline vi full_candidate_keys(candidates const& c, index_t j) noexcept {
  vi const key = order_key(load(c.scores + j));
  if (c.allowed == nullptr) return key;
  return select(equal(load_bytes(c.allowed + j), splat(std::int32_t{0})), splat(no_key), key);
}

/// The same where there may be fewer: `no_key` in the lanes behind the end.
inline vi candidate_keys(candidates const& c, index_t j) noexcept {
  index_t const width = c.n - j;
  if (width >= lanes) return full_candidate_keys(c, j);
  float scores[8] = {};
  std::uint8_t allowed[8] = {};
  for (index_t i = 0; i < width; ++i) {
    scores[i] = c.scores[j + i];
    allowed[i] = c.allowed == nullptr || c.allowed[j + i] != 0 ? 1 : 0;
  }
  return full_candidate_keys({scores, nullptr, allowed, lanes}, 0);
}

/// Positions of up to eight slots from `j` on.
inline vi candidate_positions(candidates const& c, index_t j) noexcept {
  constexpr std::int32_t numbers[8] = {0, 1, 2, 3, 4, 5, 6, 7};
  return c.positions == nullptr ? splat(j) + load(numbers) : load_some(c.positions + j, c.n - j);
}

/// The candidate to evict: lowest score, of equal ones the highest position. -1 without candidates.
/// Cost: 8 bytes (9 with `allowed`) read per slot, no branch on data.
inline index_t evict_index(candidates const& c) noexcept {
  vi const none = splat(no_key), top = splat(std::int32_t{INT32_MAX});
  vi best = top, best_position = splat(std::int32_t{-1}), best_first = splat(std::int32_t{0});
  for (index_t j = 0; j < c.n; j += lanes) {
    vi key = candidate_keys(c, j);
    key = select(equal(key, none), top, key);
    vi const p = candidate_positions(c, j);
    vi const better = greater(best, key) | (equal(best, key) & greater(p, best_position));
    best = select(better, key, best);
    best_position = select(better, p, best_position);
    best_first = select(better, splat(j), best_first);
  }
  std::int32_t key[8], position[8], first[8];
  store(key, best);
  store(position, best_position);
  store(first, best_first);
  int at = 0;
  for (int i = 1; i < 8; ++i)
    if (key[i] < key[at] || (key[i] == key[at] && position[i] > position[at])) at = i;
  return key[at] == INT32_MAX ? -1 : first[at] + at;
}

inline constexpr index_t select_radix_from = 512;  ///< slots from which counting beats partitioning
inline constexpr index_t select_bins = 2048;
inline constexpr index_t select_copies =
    4;  ///< of the histogram: equal digits in a row do not wait

/// Bytes of scratch that select_top needs for n slots.
constexpr std::size_t select_scratch_bytes(index_t n) noexcept {
  std::size_t const tables = select_bins * select_copies * sizeof(std::uint32_t);
  return (n < select_radix_from ? 0 : tables) + static_cast<std::size_t>(n) * 8 + 64;
}

/// What is kept: keys above `key`, and of those equal to it positions up to `position`.
struct select_limit {
  std::int32_t key = 0;
  index_t position = 0;
};

/// Threshold of the k best by partitioning composite keys. @param list [n] words of scratch
inline select_limit limit_by_partition(candidates const& c, index_t k,
                                       std::uint64_t* list) noexcept {
  index_t m = 0;
  for (index_t j = 0; j < c.n; ++j) {
    std::uint32_t const key = static_cast<std::uint32_t>(order_key(c.scores[j])) ^ 0x80000000u;
    list[m] = (std::uint64_t{key} << 32) | static_cast<std::uint32_t>(~c.position(j));
    m += c.allowed == nullptr || c.allowed[j] != 0 ? 1 : 0;
  }
  std::nth_element(list, list + (k - 1), list + m, std::greater<>{});
  std::uint64_t const last = list[k - 1];
  return {static_cast<std::int32_t>(static_cast<std::uint32_t>(last >> 32) ^ 0x80000000u),
          static_cast<index_t>(~static_cast<std::uint32_t>(last))};
}

/// The bin in which the k-th largest key lies; `k` becomes its rank inside the bin.
inline std::uint32_t bin_of_rank(std::uint32_t const* table, index_t& k) noexcept {
  for (index_t b = select_bins - 1; b > 0; --b) {
    std::uint32_t const count =
        table[b] + table[b + select_bins] + table[b + 2 * select_bins] + table[b + 3 * select_bins];
    if (count >= static_cast<std::uint32_t>(k)) return static_cast<std::uint32_t>(b);
    k -= static_cast<index_t>(count);
  }
  return 0;
}

/// Keeps the keys whose digit holds rank k, and makes k the rank among them. Returns how many are
/// left.
inline index_t narrow(std::uint32_t const* in, index_t n, int shift, index_t& k,
                      std::uint32_t* table, std::uint32_t* out) noexcept {
  std::fill_n(table, select_bins * select_copies, 0u);
  auto const digit = [=](std::uint32_t key) { return (key >> shift) & (select_bins - 1u); };
  index_t i = 0;
  for (; i + 4 <= n; i += 4) {
    ++table[digit(in[i])];
    ++table[digit(in[i + 1]) + select_bins];
    ++table[digit(in[i + 2]) + 2 * select_bins];
    ++table[digit(in[i + 3]) + 3 * select_bins];
  }
  for (; i < n; ++i) ++table[digit(in[i])];
  std::uint32_t const bin = bin_of_rank(table, k);
  index_t m = 0;
  for (i = 0; i < n; ++i) {
    std::uint32_t const key = in[i];
    out[m] = key;
    m += digit(key) == bin ? 1 : 0;
  }
  return m;
}

/// Position up to which `need` of the slots with this key are kept.
inline index_t tie_position(candidates const& c, std::uint32_t const* keys, std::uint32_t key,
                            index_t need, index_t* list) noexcept {
  bool const ascending = c.positions == nullptr || std::is_sorted(c.positions, c.positions + c.n);
  index_t m = 0;
  for (index_t j = 0; j < c.n; ++j) {
    if (keys[j] != key) continue;
    if (ascending && --need == 0) return c.position(j);
    list[m++] = c.position(j);
  }
  std::nth_element(list, list + (need - 1), list + m);
  return list[need - 1];
}

/// Threshold of the k best by counting 11-bit digits of the keys.
/// @param words [2 n + 4 * 2048] of scratch
inline select_limit limit_by_radix(candidates const& c, index_t k, std::uint32_t* words) noexcept {
  std::uint32_t* const keys = words;
  std::uint32_t* const list = keys + c.n;
  std::uint32_t* const table = list + c.n;
  vi const flip = splat(no_key);
  for (index_t j = 0; j < c.n; j += lanes)
    store_some(reinterpret_cast<std::int32_t*>(keys) + j, candidate_keys(c, j) ^ flip, c.n - j);
  index_t m = narrow(keys, c.n, 21, k, table, list);
  for (int shift = 10; shift >= 0 && m > 512; shift -= 10)
    m = narrow(list, m, shift, k, table, list);
  std::nth_element(list, list + (k - 1), list + m, std::greater<>{});
  std::uint32_t const key = list[k - 1];
  index_t above = 0, equals = 0;  // k is the rank among the listed keys
  for (index_t i = 0; i < m; ++i) above += list[i] > key ? 1 : 0, equals += list[i] == key ? 1 : 0;
  index_t position = INT32_MAX;
  if (k - above < equals)
    position = tie_position(c, keys, key, k - above, reinterpret_cast<index_t*>(list));
  return {static_cast<std::int32_t>(key ^ 0x80000000u), position};
}

/// keep[i] = bit i of `bits`, for the first `width` of eight bytes.
inline void store_keep(std::uint8_t* keep, unsigned bits, index_t width) noexcept {
  if (std::endian::native == std::endian::little && width >= lanes) {
    // Bit i moves to byte i, then every byte that is not zero becomes 1.
    std::uint64_t const spread = ((bits & 0xffu) * 0x0101010101010101ull) & 0x8040201008040201ull;
    std::uint64_t const ones = ((spread + 0x7f7f7f7f7f7f7f7full) >> 7) & 0x0101010101010101ull;
    std::memcpy(keep, &ones, sizeof ones);
  } else {
    for (index_t i = 0; i < lanes && i < width; ++i)
      keep[i] = static_cast<std::uint8_t>((bits >> i) & 1u);
  }
}

inline void mark_kept(candidates const& c, select_limit const& limit, std::uint8_t* keep) noexcept {
  vi const key = splat(limit.key), position = splat(limit.position);
  for (index_t j = 0; j < c.n; j += lanes) {
    vi const x = candidate_keys(c, j), p = candidate_positions(c, j);
    unsigned const above = lane_bits(greater(x, key));
    unsigned const tied = lane_bits(equal(x, key)) & ~lane_bits(greater(p, position));
    store_keep(keep + j, above | tied, c.n - j);
  }
}

/// Number of candidates.
inline index_t count_candidates(candidates const& c) noexcept {
  if (c.allowed == nullptr) return c.n;
  index_t count = 0;
  for (index_t j = 0; j < c.n; ++j) count += c.allowed[j] != 0 ? 1 : 0;
  return count;
}

/// keep[j] = 1 for the k best candidates by (score descending, position ascending), else 0.
/// @param keep [n] bytes, host
/// @param scratch select_scratch_bytes(n) bytes, host, any alignment
/// @return how many are kept: min(k, candidates)
/// Cost: about 20 bytes read and 5 written per slot, and the keys of the boundary's digit again.
inline index_t select_top(candidates const& c, index_t k, std::uint8_t* keep,
                          void* scratch) noexcept {
  index_t const count = count_candidates(c);
  if (k <= 0 || k >= count) {
    for (index_t j = 0; j < c.n; ++j)
      keep[j] = k > 0 && (c.allowed == nullptr || c.allowed[j] != 0) ? 1 : 0;
    return k > 0 ? count : 0;
  }
  auto const address = (reinterpret_cast<std::uintptr_t>(scratch) + 63) & ~std::uintptr_t{63};
  select_limit const limit =
      c.n < select_radix_from ? limit_by_partition(c, k, reinterpret_cast<std::uint64_t*>(address))
                              : limit_by_radix(c, k, reinterpret_cast<std::uint32_t*>(address));
  mark_kept(c, limit, keep);
  return k;
}

/// Slots whose keep byte is 1, ascending. @param slots room for all of them, host @return their
/// number
inline index_t kept_slots(std::uint8_t const* keep, index_t n, index_t* slots) noexcept {
  index_t count = 0, j = 0;
  for (; std::endian::native == std::endian::little && j + 8 <= n; j += 8) {
    std::uint64_t word;
    std::memcpy(&word, keep + j, sizeof word);
    for (; word != 0; word &= word - 1) slots[count++] = j + std::countr_zero(word) / 8;
  }
  for (; j < n; ++j)
    if (keep[j] != 0) slots[count++] = j;
  return count;
}

}  // namespace KVKEEP_CPU_ISA
}  // namespace kvkeep::cpu
