// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// What a run reports, for people and as JSON.
#pragma once

#include <string>
#include <vector>

#include "generate/engine.hpp"

namespace kvkeep::generate {

struct run_figures {
  std::string model_file;
  std::string policy;
  std::string layout;
  index_t capacity = 0;
  index_t slots_per_head = 0;
  bool evicts = false;  ///< at the prompt's end or while decoding
  int threads = 1;
  std::vector<index_t> prompt;
  std::vector<std::vector<index_t>> written;  ///< per sequence
  std::string text;                           ///< of the first sequence
  std::size_t full_bytes = 0;                 ///< K and V of all tokens that were fed
  engine_usage usage;
  int checks = 0, checks_held = 0;  ///< of the task

  std::size_t bytes() const { return usage.peak_bytes() + usage.state_bytes; }
};

void print_report(run_figures const& f);
std::string to_json(run_figures const& f);

}  // namespace kvkeep::generate
