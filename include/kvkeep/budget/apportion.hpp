// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Exact integer split of a total in proportion to weights (spec 1.2, Apportion).
#pragma once

#include "../core/types.hpp"

namespace kvkeep {

/// part[i] proportional to weight[i], at most cap[i], summing to min(total, sum of caps). Parts that
/// reach their cap are fixed and the rest is split again; missing units go to the largest remainders,
/// lower index first; if all open weights are zero they count as one. Integers only.
/// @param[in]  weight, cap  [n], >= 0
/// @param[out] part         [n]
/// @param      remainder    [n] scratch
/// Cost: O(n^2) worst case, n is a number of layers or heads. Products must stay below 2^63.
KVKEEP_HD inline void apportion(offset_t total, index_t const* weight, index_t const* cap,
                                index_t n, index_t* part, offset_t* remainder) noexcept {
  offset_t room = 0;
  for (index_t i = 0; i < n; ++i) {
    room += cap[i];
    part[i] = cap[i] > 0 ? -1 : 0;  // -1: open
  }
  offset_t left = total < 0 ? 0 : total < room ? total : room;
  for (;;) {
    offset_t sum = 0;
    index_t open = 0;
    for (index_t i = 0; i < n; ++i) {
      if (part[i] >= 0) continue;
      sum += weight[i];
      ++open;
    }
    if (open == 0) return;
    bool const equal = sum == 0;
    if (equal) sum = open;
    offset_t fixed = 0;
    for (index_t i = 0; i < n; ++i) {
      if (part[i] >= 0) continue;
      offset_t const w = equal ? 1 : weight[i];
      if (left > 0 && left * w >= static_cast<offset_t>(cap[i]) * sum) {
        remainder[i] = -1;  // fixed in this round
        fixed += cap[i];
      } else {
        remainder[i] = left * w % sum;
      }
    }
    if (fixed > 0) {
      for (index_t i = 0; i < n; ++i)
        if (part[i] < 0 && remainder[i] < 0) part[i] = cap[i];
      left -= fixed;
      continue;
    }
    offset_t missing = left;
    for (index_t i = 0; i < n; ++i) {
      if (part[i] >= 0) {
        remainder[i] = -1;
        continue;
      }
      offset_t const w = equal ? 1 : weight[i];
      part[i] = static_cast<index_t>(left * w / sum);
      missing -= part[i];
    }
    for (; missing > 0; --missing) {
      index_t best = -1;
      for (index_t i = 0; i < n; ++i)
        if (remainder[i] >= 0 && (best < 0 || remainder[i] > remainder[best])) best = i;
      ++part[best];
      remainder[best] = -1;
    }
    return;
  }
}

}  // namespace kvkeep
