// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Evaluation episodes: a prompt, the reference continuation, and the places where it is checked.
#pragma once

#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include <kvkeep/core/types.hpp>

namespace kvkeep::generate {

struct episode_check {
  std::string kind;    ///< once, range, periodic, default, passkey, recall, requery
  index_t entry = -1;  ///< -1: none
  double depth = -1;   ///< 0..1, -1: none
  index_t at = 0;      ///< first checked token of the response
  index_t n = 0;
  std::vector<index_t> anchor;  ///< tokens before it, which find it in free text
};

struct episode {
  std::string task;
  std::int64_t seed = 0;
  std::vector<index_t> prompt;
  std::vector<index_t> response;  ///< the end token is its last
  std::vector<episode_check> checks;
};

struct episode_set {
  std::string vocabulary_sha256;
  std::vector<episode> episodes;
};

/// @param vocabulary  tokens of the model: ids are below
/// @throws bad_input naming file and field
episode_set load_episodes(std::filesystem::path const& file, index_t vocabulary);

/// "NAME" or "NAME:INDEX", the index counting the task's episodes from 0.
/// @throws bad_input naming the task or the range of its episodes
episode const& find_episode(episode_set const& set, std::string const& name);

/// Whether text that the model wrote freely has the checked tokens behind the anchor's first occurrence.
bool holds_freely(episode const& e, episode_check const& c, std::span<index_t const> written);
/// Whether the best tokens under teacher forcing are the checked ones.
bool holds_forced(episode const& e, episode_check const& c, std::span<index_t const> choices);

/// [response token] whether it is part of a question: nothing in front of it says what will be asked next. Diaries
/// ask nothing; their anchors follow from the text.
std::vector<bool> questions_of(episode const& e);

}  // namespace kvkeep::generate
