// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The command line of kvkeep-generate.
#pragma once

#include <string>
#include <vector>

#include "generate/engine.hpp"
#include "generate/sampler.hpp"

namespace kvkeep::generate {

struct arguments {
  std::string model;
  std::string tokenizer;
  std::string prompt;
  std::string prompt_ids;
  std::string task;
  policy_request policy;
  std::string budget = "25%";
  std::string fusion;
  std::string rows;
  std::string granularity = "head";
  std::string layout = "contiguous";
  index_t block = 16;
  index_t chunk = 64;
  index_t batch = 1;
  index_t tokens = -1;  ///< -1: what the model's context leaves, at most 256
  int threads = 1;
  sampling_options sampling;
  bool no_stop = false;
  bool quiet = false;
  index_t verify = 0;
  std::string json;
  std::string record;
  bool compare = false;
  bool demo = false;
  bool quick = false;
  std::vector<std::string> policies;  ///< of a comparison; empty: all
  std::vector<index_t> percents;      ///< its budgets; empty: the usual ones
  std::string csv;
};

/// @return -1 to go on, else the exit code (help was shown, or a line on stderr says what is wrong)
int parse(int argc, char** argv, arguments& a);

/// Tokens of "N" or "N%" of the final length. @throws std::invalid_argument
index_t capacity_of(std::string const& budget, index_t final_length);

layout_kind layout_of(std::string const& name);

}  // namespace kvkeep::generate
