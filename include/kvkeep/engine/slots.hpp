// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// What decoding needs of every head.
#pragma once

#include "../policy/policy.hpp"

namespace kvkeep::detail {

/// Fewest tokens that decoding can hold a head to: the protected ones, and the room for the next one.
template <class P>
index_t least_budget(P const& decode) noexcept {
  return decode.keep.sinks + decode.keep.recent + decode.when.room;
}

}  // namespace kvkeep::detail
