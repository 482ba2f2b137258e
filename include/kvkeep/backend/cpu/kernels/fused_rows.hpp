// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Scores from rows over slots: MorphKV's cached rows E = e^(z - m).
#pragma once

#include "panel_softmax.hpp"
#include "select.hpp"

namespace kvkeep::cpu {
inline namespace KVKEEP_CPU_ISA {

inline constexpr index_t slot_block = 64;  ///< slots of one partial sum

/// Cached exponentials of one KV head.
struct cached_rows {
  float const* e = nullptr;       ///< [n_heads][ring row][n_slots], host
  offset_t stride_head = 0;       ///< floats between query heads
  offset_t stride_row = 0;        ///< floats between ring rows
  index_t const* ring = nullptr;  ///< [n_rows], host: ring row of row r, oldest first
  index_t n_heads = 0;            ///< query heads of the group
  index_t n_rows = 0;
  index_t n_slots = 0;

  float const* row(index_t head, index_t r) const noexcept {
    return e + head * stride_head + ring[r] * stride_row;
  }
};

/// Sum of up to 64 slots in a fixed order: eight lanes, then the lanes' tree.
/// @param e, old [n] slots, host; old[j] is -1 for a slot that counts and 0 for another (whose e
///        may be anything)
inline vf slot_block_lanes(float const* e, std::int32_t const* old, index_t n) noexcept {
  vf sum = splat(0.0f);
  if (n == slot_block) {
    KVKEEP_CPU_UNROLL
    for (int j = 0; j < slot_block; j += lanes)
      sum = sum + float_of_bits(bits_of(load(e + j)) & load(old + j));
    return sum;
  }
  for (index_t j = 0; j < n; j += lanes)
    sum = sum + float_of_bits(bits_of(load_some(e + j, n - j)) & load_some(old + j, n - j));
  return sum;
}
inline float slot_block_sum(float const* e, std::int32_t const* old, index_t n) noexcept {
  return sum_lanes(slot_block_lanes(e, old, n));
}

/// Partial sums of one row, one per 64 slots. When few slots changed, renewing their blocks with
/// slot_block_sum gives the same bits as summing the whole row again.
/// @param sums [ceil(n / 64)], host
/// Cost: 8 bytes read per slot.
inline void slot_block_sums(float const* e, std::int32_t const* old, index_t n,
                            float* sums) noexcept {
  index_t j = 0;
  for (; j + 8 * slot_block <= n; j += 8 * slot_block, sums += 8) {
    vf part[8];
    for (index_t b = 0; b < 8; ++b)
      part[b] = slot_block_lanes(e + j + b * slot_block, old + j + b * slot_block, slot_block);
    store(sums, sum_each(part));
  }
  for (; j < n; j += slot_block)
    *sums++ = slot_block_sum(e + j, old + j, n - j < slot_block ? n - j : slot_block);
}

/// Sum of partial sums in ascending order, in double.
inline float sum_blocks(float const* sums, index_t n_blocks) noexcept {
  double total = 0;
  for (index_t b = 0; b < n_blocks; ++b) total += static_cast<double>(sums[b]);
  return static_cast<float>(total);
}

/// Z[g][r] = sum of E over the slots that count, for every row of the group.
/// @param old [n_slots], host: -1 or 0 per slot, see slot_block_sum
/// @param z [n_heads][n_rows], host
/// Cost: 4 bytes read per row and slot.
inline void cached_row_sums(cached_rows const& c, std::int32_t const* old, float* z) noexcept {
  constexpr index_t chunk = 16;
  for (index_t g = 0; g < c.n_heads; ++g)
    for (index_t r = 0; r < c.n_rows; ++r) {
      float const* const e = c.row(g, r);
      float sums[chunk];
      double total = 0;
      for (index_t j = 0; j < c.n_slots; j += chunk * slot_block) {
        index_t const n = c.n_slots - j < chunk * slot_block ? c.n_slots - j : chunk * slot_block;
        slot_block_sums(e + j, old + j, n, sums);
        for (index_t b = 0; b * slot_block < n; ++b) total += static_cast<double>(sums[b]);
      }
      *z++ = static_cast<float>(total);
    }
}

/// 1 / z, and 0 where z is 0 (a row without mass on the slots that count has no say).
inline void invert_sums(float const* z, index_t n, float* inverse) noexcept {
  for (index_t i = 0; i < n; ++i) inverse[i] = z[i] > 0 ? 1.0f / z[i] : 0.0f;
}

/// Query head g's row r joins the group's maximum of N vectors of slots (`width` slots where N is 1).
template <int N>
inline void join_head(cached_rows const& c, float const* inverse, index_t g, index_t r, index_t j,
                      index_t width, vf* top) noexcept {
  float const* const e = c.row(g, r) + j;
  vf const scale = splat(inverse[g * c.n_rows + r]);
  KVKEEP_CPU_UNROLL
  for (int i = 0; i < N; ++i)
    top[i] = max(top[i], scale * (N == 1 ? load_some(e, width) : load(e + i * lanes)));
}

/// The group's maximum of row r for N vectors of slots from j on. `Heads` > 0: a known number.
template <int N, int Heads>
inline void group_top(cached_rows const& c, float const* inverse, index_t r, index_t j,
                      index_t width, vf* top) noexcept {
  KVKEEP_CPU_UNROLL
  for (int i = 0; i < N; ++i) top[i] = splat(0.0f);
  if constexpr (Heads > 0) {
    KVKEEP_CPU_UNROLL
    for (index_t g = 0; g < Heads; ++g) join_head<N>(c, inverse, g, r, j, width, top);
  } else {
    for (index_t g = 0; g < c.n_heads; ++g) join_head<N>(c, inverse, g, r, j, width, top);
  }
}

template <row_fold Fold>
inline vf fold_top(vf before, vf top) noexcept {
  return Fold == row_fold::sum ? before + top : max(before, top);
}

/// Blocks of slots outside, so that f stays in the first-level cache and rows are read in long
/// runs. The last few vectors stay in registers instead: a partial store would stall the next load.
template <row_fold Fold, int Heads>
inline void fuse_all_slots(cached_rows const& c, float const* inverse, std::int32_t const* old,
                           float* f) noexcept {
  constexpr index_t block = 512, wide = 4;
  vf const never = float_of_bits(splat(std::int32_t{0x7f800000}));
  for (index_t begin = 0; begin < c.n_slots; begin += block) {
    index_t const end = c.n_slots - begin < block ? c.n_slots : begin + block;
    index_t const whole = begin + (end - begin) / (wide * lanes) * (wide * lanes);
    for (index_t j = begin; j < whole; ++j) f[j] = 0;
    for (index_t r = 0; r < c.n_rows; ++r)
      for (index_t j = begin; j < whole; j += wide * lanes) {
        vf top[wide];
        group_top<wide, Heads>(c, inverse, r, j, lanes, top);
        KVKEEP_CPU_UNROLL
        for (int i = 0; i < wide; ++i)
          store(f + j + i * lanes, fold_top<Fold>(load(f + j + i * lanes), top[i]));
      }
    for (index_t j = whole; j < end; j += lanes) {
      index_t const width = end - j < lanes ? end - j : lanes;
      vf sum = splat(0.0f), top[1];
      for (index_t r = 0; r < c.n_rows; ++r) {
        group_top<1, Heads>(c, inverse, r, j, width, top);
        sum = fold_top<Fold>(sum, top[0]);
      }
      store_some(f + j, sum, width);
    }
    for (index_t j = begin; j < end; j += lanes)
      store_some(f + j, select(load_some(old + j, end - j), load_some(f + j, end - j), never),
                 end - j);
  }
}

/// f[j] = fold over rows (in the given order) of the group's maximum of E[g][r][j] * inverse[g][r].
/// Slots that do not count get +infinity, so that the smallest f is the one to evict.
/// @param inverse [n_heads][n_rows], host, see invert_sums
/// @param old [n_slots], host: -1 or 0 per slot
/// @param f [n_slots], host
/// Cost: 4 bytes read per row and slot.
inline void fuse_cached_rows(cached_rows const& c, float const* inverse, std::int32_t const* old,
                             row_fold fold, float* f) noexcept {
  if (fold == row_fold::sum)
    c.n_heads == 4 ? fuse_all_slots<row_fold::sum, 4>(c, inverse, old, f)
                   : fuse_all_slots<row_fold::sum, 0>(c, inverse, old, f);
  else
    c.n_heads == 4 ? fuse_all_slots<row_fold::max, 4>(c, inverse, old, f)
                   : fuse_all_slots<row_fold::max, 0>(c, inverse, old, f);
}

}  // namespace KVKEEP_CPU_ISA
}  // namespace kvkeep::cpu
