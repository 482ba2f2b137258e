// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Policies of the command line: a name or PROMPT+DECODE, and what the options mean for them.
#pragma once

#include <kvkeep/kvkeep.hpp>

#include <optional>
#include <string>
#include <vector>

namespace kvkeep::generate {

using any = any_cpu_policy;

inline constexpr index_t most_default_sinks = 4;  ///< of StreamingLLM, LagKV and ExpectedAttention

struct policy_request {
  std::string policy = "morphkv";  ///< NAME, or PROMPT+DECODE
  index_t capacity = 128;          ///< tokens kept per KV head; decoding adds the current one
  std::string budget;              ///< what the capacity was made from, for messages
  std::optional<index_t> window;   ///< default: a quarter of the capacity, at most 32; H2O: half
  std::optional<index_t> sinks;    ///< default: 4 for StreamingLLM, LagKV and ExpectedAttention
  double rope_base = 10000;        ///< of the model, for ExpectedAttention
  std::optional<reduction> fusion;
  std::optional<double> evict_after;
  std::optional<morph_rows> rows;  ///< MorphKV; none: the cheapest form
  std::string layer_budget;        ///< "", uniform, pyramid, dynamic, ada
  scope granularity = scope::head;
};

/// What a session is bound to.
struct policy_pair {
  std::string name;
  any prompt;
  any decode;

  bool cuts_prompt() const;
  bool cuts_decode() const;
  /// One set per sequence: layers are decided together, so prompts lie in the cache itself.
  bool joins_layers() const;
};

/// @throws std::invalid_argument naming option, value and what is allowed
policy_pair make_policies(policy_request const& r);

}  // namespace kvkeep::generate
