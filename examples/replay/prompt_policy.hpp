// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// From the parameters of a prefill case to a policy, and to the form in which scores are reported.
#pragma once

#include "arrays.hpp"
#include "window_options.hpp"

namespace kvkeep::replay {

/// Which scores a case reports.
enum class reported : std::uint8_t {
  all,         ///< of all T tokens
  candidates,  ///< of all but the window
  padded       ///< of all tokens; those that are no candidates are the largest other score plus one
};

struct prompt_policy {
  char const* name = "";
  policy_options options{};
  std::vector<index_t> head_tokens{};  ///< [kv_head], where heads have budgets of their own
  reported scores = reported::all;
  index_t window = 0;    ///< tokens at the end that are no candidates
  index_t sinks = 0;     ///< the first ones that are none, where scores are padded
  index_t n_layers = 1;  ///< layers of the model, of which the case records `layer`
  index_t layer = 0;
  bool skipped = false;  ///< the layer is left alone

  chosen policy() const {
    policy_options o = options;
    o.head_tokens = head_tokens;
    return {name, o};
  }
};

/// The policy of a prefill case. @throws unsupported, or std::runtime_error naming the parameter
prompt_policy read_prompt_policy(recorded_case const& c, parameters& p, cache_shape const& shape);

/// Extents of a prefill or decode case; `tokens` is the number of rows of q, k and v.
inline cache_shape read_shape(recorded_case const& c, index_t tokens) {
  cache_shape s;
  s.n_seq = extent(c, "B", 1);
  s.n_kv_heads = extent(c, "Hkv", 1);
  s.n_q_heads = extent(c, "Hq", s.n_kv_heads);
  s.dim_k = extent(c, "D", 8);
  s.dim_v = extent(c, "Dv", s.dim_k);
  s.max_slots = tokens;
  if (s.n_q_heads % s.n_kv_heads != 0)
    c.fail("shape.Hq", std::to_string(s.n_q_heads) +
                           ", allowed: a multiple of shape.Hkv = " + std::to_string(s.n_kv_heads));
  return s;
}

}  // namespace kvkeep::replay
