// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The baseline of comparisons: evict at random.
#pragma once

#include <kvkeep/kvkeep.hpp>

namespace kvkeep::tools {

/// Evicts whatever a hash of the position says: what a policy has to beat.
struct random_fn {
  static constexpr char const* name = "random";
  static constexpr bool reads_k = false;
  static constexpr bool reads_v = false;

  KVKEEP_HD float operator()(slot_values const& s) const noexcept {
    std::uint32_t x = static_cast<std::uint32_t>(s.position) + 0x9e3779b9U;
    x = (x ^ (x >> 16)) * 0x85ebca6bU;
    x = (x ^ (x >> 13)) * 0xc2b2ae35U;
    return static_cast<float>((x ^ (x >> 16)) >> 8);
  }
};

inline policy<slot_score<random_fn>> make_random(index_t capacity, index_t window) {
  return {"random", {}, {capacity}, {}, {0, window}};
}

}  // namespace kvkeep::tools
