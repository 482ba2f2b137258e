// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Whether what an engine declares can be: bounds, and evidence that serves a scorer.
#pragma once

#include <string>

#include "../../policy/policy.hpp"
#include "../limits.hpp"

namespace kvkeep::detail {

/// Refuses a scorer that asks for memory of queries that its traits do not ask for: it would find what others left.
template <class Score>
KVKEEP_COLD void check_rings(Score const& score, cache_shape const& shape, bool decode_role) {
  scorer_traits const t = score.traits();
  state_spec const s = score.state(shape);
  bool const at_prompt = t.prompt == evidence::window_queries || t.prompt == evidence::all_queries;
  bool const at_decode = decode_role && t.at_decode && s.ring_at_decode;
  std::string const scorer = std::string(" for the scorer ") + t.name;
  KVKEEP_EXPECTS(!at_decode || t.decode == evidence::token_queries, "state.ring_at_decode", "true",
                 "false" + scorer + ", whose traits ask for no queries of tokens");
  KVKEEP_EXPECTS(!at_decode || s.query_ring > 0, "state.query_ring", s.query_ring,
                 "> 0" + scorer + ", as queries of tokens enter it (ring_at_decode)");
  KVKEEP_EXPECTS(s.query_ring == 0 || at_prompt || at_decode, "state.query_ring", s.query_ring,
                 "0" + scorer + ", whose traits ask for no queries");
}

/// Refuses evidence that cannot serve a scorer.
template <class Score>
KVKEEP_COLD void check_offer(Score const& score, cache_shape const& shape, limits const& lim,
                             bool decode_role) {
  scorer_traits const t = score.traits();
  check_rings(score, shape, decode_role);
  auto const wants = [&](char const* field, char const* offer, char const* need) {
    refuse(field, std::string(offer), std::string(need) + " for the scorer " + t.name);
  };
  if (t.at_prompt || decode_role) {
    if (t.prompt == evidence::all_queries && lim.prompt != prompt_offer::all_queries)
      wants("limits.prompt", to_string(lim.prompt), "all_queries");
    if (t.prompt == evidence::window_queries && lim.prompt != prompt_offer::all_queries &&
        lim.prompt != prompt_offer::window_queries)
      wants("limits.prompt", to_string(lim.prompt), "window_queries or all_queries");
    if (t.prompt == evidence::engine_scores && lim.prompt != prompt_offer::scores)
      wants("limits.prompt", to_string(lim.prompt), "scores");
  }
  if (!decode_role || !t.at_decode) return;
  if (t.decode == evidence::token_queries) {
    bool const needs_queries = score.state(shape).ring_at_decode;
    if (lim.decode != decode_offer::attend &&
        (needs_queries || lim.decode != decode_offer::attention_rows))
      wants("limits.decode", to_string(lim.decode),
            needs_queries ? "attend" : "attend or attention_rows");
  }
  if (t.decode == evidence::engine_scores && lim.decode != decode_offer::scores)
    wants("limits.decode", to_string(lim.decode), "scores");
  KVKEEP_EXPECTS(lim.max_draft == 0 || t.draft_safe, "limits.max_draft", lim.max_draft,
                 std::string("0 for the scorer ") + t.name);
}

KVKEEP_COLD inline void check_limits(limits const& l) {
  auto const within = [](char const* field, index_t v, index_t least, index_t most) {
    KVKEEP_EXPECTS(v >= least && v <= most, field, v,
                   std::to_string(least) + ".." + std::to_string(most));
  };
  within("limits.max_sequences", l.max_sequences, 1, 1 << 20);
  within("limits.max_batch", l.max_batch, 1, l.max_sequences);
  within("limits.max_prompt", l.max_prompt, 0, most_tokens);
  within("limits.max_chunk", l.max_chunk, 1, 1 << 20);
  within("limits.max_draft", l.max_draft, 0, 1 << 16);
}

/// The scorer can decide with the newest token's own query, or per query head.
template <class Score, class Ctx>
concept scores_directly = requires(Score const& s, Ctx& c, score_input<space_of<Ctx>> const& in,
                                   score_map<space_of<Ctx>> m,
                                   tensor_ref<float, 3, space_of<Ctx>> h, workspace& w) {
  { s.score_direct(c, in, m, h, w) } -> std::same_as<status>;
};

}  // namespace kvkeep::detail
