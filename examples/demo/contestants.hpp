// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// What is compared: every policy of the table, at the same number of slots.
#pragma once

#include <kvkeep/engine/policy_table.hpp>
#include <kvkeep/kvkeep.hpp>

#include <string>
#include <vector>

#include "trace.hpp"

namespace kvkeep::demo {

using any = any_policy<cpu::context>;

/// A policy for the prompt and one for decoding (often the same).
struct contestant {
  std::string name;
  any prompt, decode;
  bool evicts = true;     ///< false: FullKV, the reference
  bool random = false;    ///< the baseline
  index_t max_slots = 0;  ///< per KV head, for the head that gets most
};

/// FullKV, the policies of the table and the baseline, each holding `budget` slots per KV head on
/// average, the current token's included. Policies that cut the prompt only go on with MorphKV.
std::vector<contestant> make_contestants(trace const& t, index_t budget);

}  // namespace kvkeep::demo
