// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// All policies on the bundled evaluation: what each keeps of the model's abilities, at equal cache sizes.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "generate/by_position.hpp"

namespace kvkeep::generate {

struct comparison_options {
  std::vector<std::string> policies;                  ///< empty: all; "random", "oracle" are two
  std::vector<index_t> percents{6, 12, 25, 50, 100};  ///< budgets, of the final length
  std::size_t episodes = 0;                           ///< of each task and seed; 0: all
  index_t seeds = 0;                                  ///< 0: all
  index_t batch = 8;                                  ///< episodes that share a step
  index_t bucket = 64;  ///< positions of an entry of `by_position`; 0: none, which saves time
  /// Told before each evaluation: policy, percent, done and all of them.
  std::function<void(std::string const&, index_t, std::size_t, std::size_t)> progress;
};

/// One policy at one budget. Columns: complete, once, range, periodic, average (of the three), default;
/// passkey, recall, requery; passkey by depth as passkey@0, @25, @50, @75.
struct comparison_row {
  std::string policy;
  index_t percent = 100;
  index_t capacity = 0;  ///< of the longest task
  std::map<std::string, estimate> columns;
  /// Of the reference responses of all tasks without their questions, teacher-forced; the last entry is of all
  /// positions.
  std::vector<position_bucket> by_position;
  std::size_t kv_bytes = 0;      ///< peak slots of one sequence, largest task
  std::size_t state_bytes = 0;   ///< policy state of one sequence
  double tokens_per_second = 0;  ///< decode
};

/// Policies that `compare` runs by default, full cache, random eviction and oracle included. The oracle knows the
/// attention of the full cache's run of an episode: the future of another text where a free one differs.
std::vector<std::string> compared_policies();

/// Diaries are written freely; the other tasks are teacher-forced, as their responses hold questions.
/// Every policy holds the same number of slots at its peak. Policies that cut prompts only go on with MorphKV.
/// @throws std::invalid_argument before the first run, where one of the policies cannot be had at one of the budgets
std::vector<comparison_row> compare(runtime& rt, model const& m, episode_set const& set,
                                    comparison_options const& o);

/// A table of the tasks and, with `by_position`, of passkeys by depth and of both figures by position; for all budgets.
std::string comparison_text(std::vector<comparison_row> const& rows);
std::string comparison_csv(std::vector<comparison_row> const& rows);
std::string comparison_json(std::vector<comparison_row> const& rows);

}  // namespace kvkeep::generate
