// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The k best slots: score descending, position ascending.
#pragma once

#include <algorithm>
#include <bit>
#include <functional>

#include "candidates.hpp"

namespace kvkeep::cpu {
inline namespace KVKEEP_CPU_ISA {

inline constexpr index_t select_radix_from = 512;  ///< slots from which counting beats partitioning
inline constexpr index_t select_bins = 2048;
inline constexpr index_t select_copies =
    4;  ///< of the histogram: equal digits in a row do not wait

/// Bytes of scratch that select_top needs for n slots.
constexpr std::size_t select_scratch_bytes(index_t n) noexcept {
  std::size_t const tables = select_bins * select_copies * sizeof(std::uint32_t);
  auto const slots = static_cast<std::size_t>(n < 0 ? 0 : n);
  return (n < select_radix_from ? slots * 12 : slots * 8 + tables) + 128;
}

/// What is kept: keys above `key`, and of those equal to it positions up to `position`. Keys are
/// unsigned here, 0 where a slot is no candidate.
struct select_limit {
  std::uint32_t key = 0;
  index_t position = 0;
};

/// Writes unsigned keys; per lane, counts slots that are no candidates and finds the lowest key.
struct key_writer {
  std::uint32_t* keys = nullptr;
  index_t n = 0;
  vi others = splat(std::int32_t{0});
  vi lowest = splat(std::int32_t{INT32_MAX});

  void operator()(vi key, vi, index_t j) noexcept {
    vi const flip = splat(no_key), other = equal(key, flip);
    others = others - other;
    lowest = min(lowest, select(other, lowest, key));
    store_some(reinterpret_cast<std::int32_t*>(keys) + j, key ^ flip, n - j);
  }
};

/// What `write_keys` learns on the way.
struct key_summary {
  index_t count = 0;         ///< candidates
  std::uint32_t lowest = 0;  ///< unsigned key of the worst of them
};

/// Writes the unsigned keys of all slots. @param keys [n]
inline key_summary write_keys(candidates const& c, std::uint32_t* keys) noexcept {
  key_writer const start{keys, c.n};
  auto const [a, b] = each_key(c, no_key, start, start);
  std::int32_t others[8], lowest[8];
  store(others, a.others + b.others);
  store(lowest, min(a.lowest, b.lowest));
  index_t n = (c.n + lanes - 1) / lanes * lanes;  // the lanes behind the end are no candidates
  for (std::int32_t x : others) n -= x;
  return {n, static_cast<std::uint32_t>(*std::min_element(lowest, lowest + 8) ^ no_key)};
}

/// Threshold of the k best by partitioning composite keys. @param list [n] words of scratch
inline select_limit limit_by_partition(candidates const& c, index_t k, std::uint32_t const* keys,
                                       std::uint64_t* list) noexcept {
  index_t m = 0;
  for (index_t j = 0; j < c.n; ++j) {
    list[m] = (std::uint64_t{keys[j]} << 32) | static_cast<std::uint32_t>(~c.position(j));
    m += keys[j] != 0 ? 1 : 0;
  }
  std::nth_element(list, list + (k - 1), list + m, std::greater<>{});
  std::uint64_t const last = list[k - 1];
  return {static_cast<std::uint32_t>(last >> 32),
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
  std::memset(table, 0, select_bins * select_copies * sizeof *table);
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

/// Whether all keys are the same: sparse or flat scores fall into one bin for good.
inline bool all_equal(std::uint32_t const* keys, index_t n) noexcept {
  vi const first = splat(static_cast<std::int32_t>(keys[0]));
  vi differ = splat(std::int32_t{0});
  index_t j = 0;
  for (; j + lanes <= n; j += lanes)
    differ = differ | (load(reinterpret_cast<std::int32_t const*>(keys) + j) ^ first);
  bool same = lane_bits(equal(differ, splat(std::int32_t{0}))) == 0xffu;
  for (; j < n; ++j) same = same && keys[j] == keys[0];
  return same;
}

inline index_t count_equal(std::uint32_t const* keys, index_t n, std::uint32_t key) noexcept {
  vi const wanted = splat(static_cast<std::int32_t>(key));
  vi found = splat(std::int32_t{0});
  index_t j = 0;
  for (; j + lanes <= n; j += lanes)
    found = found - equal(load(reinterpret_cast<std::int32_t const*>(keys) + j), wanted);
  std::int32_t each[8];
  store(each, found);
  index_t count = 0;
  for (std::int32_t x : each) count += x;
  for (; j < n; ++j) count += keys[j] == key ? 1 : 0;
  return count;
}

inline bool is_ascending(index_t const* positions, index_t n) noexcept {
  vi falls = splat(std::int32_t{0});
  index_t j = 0;
  for (; j + lanes < n; j += lanes)
    falls = falls | greater(load(positions + j), load(positions + j + 1));
  return lane_bits(falls) == 0 && std::is_sorted(positions + j, positions + n);
}

/// Position up to which `need` of the slots with this key are kept.
inline index_t tie_position(candidates const& c, std::uint32_t const* keys, std::uint32_t key,
                            index_t need, index_t* list) noexcept {
  bool const ascending = c.positions == nullptr || is_ascending(c.positions, c.n);
  vi const wanted = splat(static_cast<std::int32_t>(key));
  index_t m = 0;
  for (index_t j = 0; j < c.n; j += lanes) {
    index_t const width = c.n - j;
    vi const x = load_some(reinterpret_cast<std::int32_t const*>(keys) + j, width);
    unsigned bits = lane_bits(equal(x, wanted)) & (width >= lanes ? 0xffu : (1u << width) - 1u);
    if (ascending && m + std::popcount(bits) < need) {
      m += std::popcount(bits);
      continue;
    }
    for (; bits != 0; bits &= bits - 1) {
      index_t const at = c.position(j + std::countr_zero(bits));
      if (!ascending) list[m] = at;
      if (++m == need && ascending) return at;
    }
  }
  std::nth_element(list, list + (need - 1), list + m);
  return list[need - 1];
}

/// Threshold of the k best by counting 11-bit digits of the keys.
/// @param keys [n]  @param list [n] scratch  @param table [4 * 2048] scratch
inline select_limit limit_by_radix(candidates const& c, index_t k, key_summary const& all,
                                   std::uint32_t const* keys, std::uint32_t* list,
                                   std::uint32_t* table) noexcept {
  // Sparse and flat scores: the boundary lies among the many that share the lowest score.
  index_t const better = all.count - count_equal(keys, c.n, all.lowest);
  if (k > better)
    return {all.lowest,
            tie_position(c, keys, all.lowest, k - better, reinterpret_cast<index_t*>(list))};
  index_t m = narrow(keys, c.n, 21, k, table, list);
  for (int shift = 10; shift >= 0 && m > 512 && !all_equal(list, m); shift -= 10)
    m = narrow(list, m, shift, k, table, list);
  index_t above = 0, equals = m;  // k is the rank among the listed keys
  if (!all_equal(list, m)) {
    std::nth_element(list, list + (k - 1), list + m, std::greater<>{});
    std::uint32_t const last = list[k - 1];
    equals = 0;
    for (index_t i = 0; i < m; ++i)
      above += list[i] > last ? 1 : 0, equals += list[i] == last ? 1 : 0;
  }
  std::uint32_t const key = list[k - 1];
  index_t position = INT32_MAX;
  if (k - above < equals)
    position = tie_position(c, keys, key, k - above, reinterpret_cast<index_t*>(list));
  return {key, position};
}

/// The slots that a limit keeps of up to eight from `j` on, as bits; with `protect` also those that are
/// no candidates.
struct keep_test {
  candidates c;
  std::uint32_t const* keys;
  select_limit limit;
  bool protect = false;

  /// Calls f(bits, j) for eight slots at a time.
  template <class F>
  void each(F f) const noexcept {
    auto const* const key = reinterpret_cast<std::int32_t const*>(keys);
    index_t j = 0;
    for (; j + lanes <= c.n; j += lanes) f(bits(load(key + j), full_candidate_positions(c, j)), j);
    if (j == c.n) return;
    unsigned const present = (1u << (c.n - j)) - 1u;
    f(bits(load_part(key + j, c.n - j), candidate_positions(c, j)) & present, j);
  }

 private:
  unsigned bits(vi key, vi position) const noexcept {
    vi const flip = splat(no_key), last = splat(static_cast<std::int32_t>(limit.key)) ^ flip;
    vi const x = key ^ flip, none = splat(protect ? no_key : INT32_MAX);
    vi const late = greater(position, splat(limit.position));
    return lane_bits(greater(x, last) | equal(x, none)) |
           (lane_bits(equal(x, last)) & ~lane_bits(late));
  }
};

/// The numbers of the set bits of a byte, ascending.
struct bit_numbers {
  std::uint8_t of[256][8] = {};
  constexpr bit_numbers() {
    for (unsigned byte = 0; byte < 256; ++byte)
      for (unsigned bit = 0, n = 0; bit < 8; ++bit)
        if ((byte >> bit & 1u) != 0) of[byte][n++] = static_cast<std::uint8_t>(bit);
  }
};
inline constexpr bit_numbers set_bits;

/// Lists what is kept, ascending, no branch on data. @param slots [limit], host
/// @return how many are kept; entries beyond `limit` are not written
inline index_t list_kept(keep_test const& test, index_t limit, index_t* slots) noexcept {
  index_t count = 0;
  test.each([&](unsigned bits, index_t j) {
    index_t const found = std::popcount(bits);
    vi const list = splat(j) + load_bytes(set_bits.of[bits]);
    if (count + lanes <= limit)
      store(slots + count, list);
    else if (count < limit)
      store_part(slots + count, list, std::min(found, limit - count));
    count += found;
  });
  return count;
}

/// keep[j] = 1 for what is kept, else 0.
inline void mark_kept(keep_test const& test, std::uint8_t* keep) noexcept {
  test.each([&](unsigned bits, index_t j) {
    for (index_t i = 0; i < lanes && j + i < test.c.n; ++i)
      keep[j + i] = static_cast<std::uint8_t>((bits >> i) & 1u);
  });
}

/// Finds what to keep: the k best candidates by (score descending, position ascending). With `protect`
/// the slots that are no candidates are kept too and count among the k.
/// @param scratch select_scratch_bytes(n) bytes, host, any alignment; holds the result's keys
/// Cost: about 20 bytes read and 4 written per slot, and the keys of the boundary's digit again.
inline keep_test find_top(candidates const& c, index_t k, void* scratch, bool protect) noexcept {
  auto const address = (reinterpret_cast<std::uintptr_t>(scratch) + 63) & ~std::uintptr_t{63};
  auto const n_keys = (static_cast<std::size_t>(c.n) + 15) / 16 * 16;
  // Composite keys come first: they need the larger alignment.
  bool const partition = c.n < select_radix_from;
  auto* const words = reinterpret_cast<std::uint32_t*>(address);
  std::uint32_t* const keys = words + (partition ? 2 * static_cast<std::size_t>(c.n) : 0);
  key_summary const all = write_keys(c, keys);
  index_t const wanted = k - (protect ? c.n - all.count : 0);
  if (wanted <= 0) return {c, keys, {0xffffffffu, -1}, protect};  // no key is above the largest one
  if (wanted >= all.count) return {c, keys, {1u, INT32_MAX}, protect};  // and none is below 1
  std::uint32_t* const list = keys + n_keys;
  return {c, keys,
          partition
              ? limit_by_partition(c, wanted, keys, reinterpret_cast<std::uint64_t*>(address))
              : limit_by_radix(c, wanted, all, keys, list, list + static_cast<std::size_t>(c.n)),
          protect};
}

}  // namespace KVKEEP_CPU_ISA
}  // namespace kvkeep::cpu
