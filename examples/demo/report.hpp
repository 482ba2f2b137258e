// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The figures of one policy at one budget, the table, the JSON file, and what must hold of them.
#pragma once

#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include "replay.hpp"

namespace kvkeep::demo {

/// One policy at one budget, mean over traces.
struct result {
  std::string policy;
  bool evicts = true, random = false;
  index_t budget = 0;  ///< slots per KV head, mean over heads and layers
  std::size_t kv_bytes = 0, state_bytes = 0;
  quality all, answers;
  double decision_us = 0;  ///< per decoded token and layer
  std::vector<std::pair<std::string, outcome>> traces;
};

/// @param outcomes  one per trace
result summarize(contestant const& c, index_t budget, std::vector<trace> const& traces,
                 std::vector<outcome> outcomes);

/// Title and table of one budget, best first.
void print_table(std::vector<result> rows, trace const& t);
/// What the columns mean and how the figures were taken.
void print_legend(trace const& t);
/// @throws std::runtime_error when the file cannot be written
void write_json(std::filesystem::path const& file, std::vector<result> const& rows);

/// Problems, one line each: FullKV is exact, nobody is over budget, more slots keep more.
/// @param rows  ascending budgets
std::vector<std::string> violations(std::vector<result> const& rows, trace const& t);

}  // namespace kvkeep::demo
