// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// FullKV: keep everything. The baseline of every comparison.
#pragma once

#include "policy.hpp"

namespace kvkeep {

using fullkv = policy<keep_all_score>;

inline fullkv make_fullkv() { return {"fullkv"}; }

}  // namespace kvkeep
