// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Runs a recorded prompt and its decoded tokens through a session and writes down what is cached.
#pragma once

#include <functional>

#include "scores.hpp"

namespace kvkeep::replay {

/// B sequences of T0 prompt tokens and `steps` decoded ones. Arrays hold T0 + steps tokens.
struct trace_data {
  prompt_data tokens{};  ///< shape.max_slots = tokens = T0 + steps; q of all tokens, or null
  index_t prompt = 0;    ///< T0
  index_t steps = 0;
};

/// When the live set of a step is written down.
enum class moment : std::uint8_t {
  appended,  ///< the token has its slot, its own step has decided nothing yet
  settled    ///< after the step and its decision
};

struct trace_options {
  moment when = moment::settled;
  bool after_prompt = false;  ///< entry 0 is the set after the prompt
  index_t slots = 0;          ///< slots per head of the cache
  layout_kind layout = layout_kind::strided;
};

/// Live slots of one head, by ascending position. `head` counts sequences, then KV heads.
using slot_observer =
    std::function<void(index_t seq, index_t head, std::vector<index_t> const& slots)>;

struct trace_log {
  int_rows kept;                 ///< [entry, B, Hkv] positions, ascending
  std::vector<float> attention;  ///< [step, B, Hq, dim_v], empty without queries
};

/// Without queries no attention is computed: the policy must not need evidence.
/// @param see  called for every head when its live set is written down, or null
trace_log run_trace(policy_type const& policy, trace_data const& t, trace_options const& o,
                    slot_observer const& see = nullptr);

}  // namespace kvkeep::replay
