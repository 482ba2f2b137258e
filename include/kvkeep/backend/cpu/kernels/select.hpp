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

/// Writes unsigned keys and counts slots that are no candidates, per lane.
struct key_writer {
  std::uint32_t* keys = nullptr;
  index_t n = 0;
  vi others = splat(std::int32_t{0});

  void operator()(vi key, vi, index_t j) noexcept {
    vi const flip = splat(no_key);
    others = others - equal(key, flip);
    store_some(reinterpret_cast<std::int32_t*>(keys) + j, key ^ flip, n - j);
  }
};

/// Writes the unsigned keys of all slots. @param keys [n] @return the number of candidates
inline index_t write_keys(candidates const& c, std::uint32_t* keys) noexcept {
  key_writer const start{keys, c.n};
  auto const [a, b] = each_key(c, no_key, start, start);
  std::int32_t count[8];
  store(count, a.others + b.others);
  index_t n = (c.n + lanes - 1) / lanes * lanes;  // the lanes behind the end are no candidates
  for (std::int32_t x : count) n -= x;
  return n;
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

/// Position up to which `need` of the slots with this key are kept.
inline index_t tie_position(candidates const& c, std::uint32_t const* keys, std::uint32_t key,
                            index_t need, index_t* list) noexcept {
  bool const ascending = c.positions == nullptr || std::is_sorted(c.positions, c.positions + c.n);
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
inline select_limit limit_by_radix(candidates const& c, index_t k, std::uint32_t const* keys,
                                   std::uint32_t* list, std::uint32_t* table) noexcept {
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

/// Marks what the limit keeps, and with `protect` the slots that are no candidates.
inline void mark_kept(candidates const& c, std::uint32_t const* keys, select_limit const& limit,
                      bool protect, std::uint8_t* keep) noexcept {
  vi const flip = splat(no_key), position = splat(limit.position);
  vi const key = splat(static_cast<std::int32_t>(limit.key)) ^ flip;
  unsigned const others = protect ? 0xffu : 0u;
  for (index_t j = 0; j < c.n; j += lanes) {
    vi const x = load_some(reinterpret_cast<std::int32_t const*>(keys) + j, c.n - j) ^ flip;
    vi const p = candidate_positions(c, j);
    unsigned const above = lane_bits(greater(x, key));
    unsigned const tied = lane_bits(equal(x, key)) & ~lane_bits(greater(p, position));
    store_keep(keep + j, above | tied | (lane_bits(equal(x, flip)) & others), c.n - j);
  }
}

/// keep[j] = 1 for the k best candidates by (score descending, position ascending), else 0. With
/// `protect` the slots that are no candidates are kept too and count among the k.
/// @param keep [n] bytes, host
/// @param scratch select_scratch_bytes(n) bytes, host, any alignment
/// @return how many are kept
/// Cost: about 24 bytes read and 9 written per slot, and the keys of the boundary's digit again.
inline index_t select_top(candidates const& c, index_t k, std::uint8_t* keep, void* scratch,
                          bool protect = false) noexcept {
  auto const address = (reinterpret_cast<std::uintptr_t>(scratch) + 63) & ~std::uintptr_t{63};
  auto const n_keys = (static_cast<std::size_t>(c.n) + 15) / 16 * 16;
  // Composite keys come first: they need the larger alignment.
  bool const partition = c.n < select_radix_from;
  auto* const words = reinterpret_cast<std::uint32_t*>(address);
  std::uint32_t* const keys = words + (partition ? 2 * static_cast<std::size_t>(c.n) : 0);
  index_t const count = write_keys(c, keys), others = protect ? c.n - count : 0;
  index_t const wanted = k - others;
  if (wanted <= 0 || wanted >= count) {  // no key is above the largest one, none below 1
    select_limit const all{wanted > 0 ? 1u : 0xffffffffu, wanted > 0 ? INT32_MAX : -1};
    mark_kept(c, keys, all, protect, keep);
    return others + (wanted > 0 ? count : 0);
  }
  select_limit const limit =
      partition ? limit_by_partition(c, wanted, keys, reinterpret_cast<std::uint64_t*>(address))
                : limit_by_radix(c, wanted, keys, keys + n_keys,
                                 keys + n_keys + static_cast<std::size_t>(c.n));
  mark_kept(c, keys, limit, protect, keep);
  return others + wanted;
}

/// Slots whose keep byte is 1, ascending, no branch on data. @param n_kept their number
/// @param slots [n_kept], host @return their number, or n_kept where there are more
inline index_t kept_slots(std::uint8_t const* keep, index_t n, index_t n_kept,
                          index_t* slots) noexcept {
  index_t count = 0;
  for (index_t j = 0; j < n && count < n_kept; ++j) {
    slots[count] = j;
    count += keep[j];
  }
  return count;
}

}  // namespace KVKEEP_CPU_ISA
}  // namespace kvkeep::cpu
