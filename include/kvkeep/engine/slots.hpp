// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// How many slots a cache needs, before there is one.
#pragma once

#include <algorithm>
#include <limits>
#include <string>

#include "../policy/policy.hpp"
#include "limits.hpp"

namespace kvkeep {

/// What a cache has to serve. @see slots_needed
struct cache_demand {
  cache_shape shape{};   ///< n_seq and max_slots are not read
  index_t n_layers = 1;  ///< managed ones
  index_t layer = -1;    ///< of those; -1: the one that needs most
  limits lim{};          ///< of the session: transient prompts, drafts, who commits
  index_t longest_prompt = 0;
  index_t shortest_prompt = 0;   ///< some policies leave short prompts whole (LagKV, bursts)
  index_t longest_sequence = 0;  ///< prompt and decoded tokens, where decoding evicts nothing
};

namespace detail {

template <class Score>
bool keeps_all(Score const& s) {
  return s.least_tokens() == std::numeric_limits<index_t>::max();
}
template <class Score>
bool cuts_while_decoding(Score const& s) {
  return s.traits().at_decode && !keeps_all(s);
}

/// Decides with the newest token's own query: a token more is in the cache by then.
inline bool decides_late(cadence const& when) noexcept {
  return when.before_attention || when.per_head_mask;
}

/// Most tokens that a policy's budget leaves a head.
template <class P>
index_t most_kept(P const& p, cache_demand const& d) {
  index_t const protect = p.keep.sinks + p.keep.recent;
  if (d.layer >= 0)
    return most_in(p.budget, d.layer, d.n_layers, d.shape, protect, d.longest_prompt);
  return p.budget.most(d.n_layers, d.shape, protect, d.longest_prompt);
}

/// Most slots in use when a policy keeps `k` tokens: those at which a cut is due; blocks leave once full.
template <class P>
index_t peak_slots(P const& p, index_t k) {
  index_t const block = p.select.traits().block, slots = decode_slots(k, p.when);
  return block > 1 ? std::max(slots, (k / block + 1) * block) : slots;
}

/// Most slots of a prompt that lie in the cache when it has ended.
template <class P>
index_t prompt_slots(P const& prompt, index_t kept, cache_demand const& d) {
  index_t const longest = d.longest_prompt;
  bool const cuts = !keeps_all(prompt.score) && !decides_late(prompt.when);
  if (!cuts || d.lim.max_prompt == 0) return longest;
  index_t const whole =
      std::min(longest, std::max(peak_slots(prompt, kept), prompt.score.least_tokens()) - 1);
  return std::max(std::min(longest, kept), whole >= d.shortest_prompt ? whole : 0);
}

/// Most slots of a head while a policy that cuts decodes, drafts left out.
template <class P, class D>
index_t decoding_slots(P const& prompt, D const& decode, cache_demand const& d) {
  bool const inherits = decode.budget.traits().inherits;
  index_t kept = inherits ? most_kept(prompt, d) : most_kept(decode, d);
  if (inherits && keeps_all(prompt.score)) kept = std::max(kept, d.longest_prompt);
  return peak_slots(decode, std::max(kept, least_budget(decode)));
}

}  // namespace detail

/// Slots per sequence and KV head that a cache needs for these policies, so that no call of a session finds it too
/// small as long as no draft stays unconfirmed for ever (limits::max_draft): every head may take what its budget leaves
/// at most. `bind_session` refuses smaller caches where no budget depends on the prompt. Frozen prefixes beyond a
/// budget come on top.
/// @throws std::invalid_argument naming field, value and allowed range
template <class P, class D>
KVKEEP_COLD index_t slots_needed(P const& prompt, D const& decode, cache_demand demand) {
  demand.shape.n_seq = demand.shape.max_slots = 1;
  check_policy(prompt, demand.n_layers, demand.shape);
  check_policy(decode, demand.n_layers, demand.shape);
  limits const& lim = demand.lim;
  index_t kept = detail::most_kept(prompt, demand);
  if (detail::keeps_all(prompt.score)) kept = std::max(kept, demand.longest_prompt);
  index_t const after_prompt = detail::prompt_slots(prompt, kept, demand);
  if (!detail::cuts_while_decoding(decode.score)) {
    index_t const longest = demand.longest_sequence;
    return std::max({longest > 0 ? longest + lim.max_draft : 0, after_prompt, 1});
  }
  // What the prompt's policy leaves is decided on before the next token, or else after it.
  bool const later = detail::decides_late(decode.when) ||
                     (!prompt.select.traits().moves_tokens && !lim.engine_commits);
  return std::max(detail::decoding_slots(prompt, decode, demand) + lim.max_draft,
                  after_prompt + (later && after_prompt > 0 ? 1 : 0));
}

/// One policy for the prompt and for decoding.
template <class P>
KVKEEP_COLD index_t slots_needed(P const& policy, cache_demand const& demand) {
  return slots_needed(policy, policy, demand);
}

namespace detail {
/// Refuses caches that are certainly too small: budgets that depend on the prompt may be lucky.
/// @param layers  the managed ones
template <class P, class D, class Layers>
KVKEEP_COLD void check_slots(P const& prompt, D const& decode, Layers const& layers,
                             limits const& lim) {
  auto const pb = prompt.budget.traits(), db = decode.budget.traits();
  if (cuts_while_decoding(decode.score) && !db.fixed && !(db.inherits && pb.fixed)) return;
  cache_demand d;
  d.shape = layers[0].kv.shape;
  d.n_layers = static_cast<index_t>(layers.size());
  d.lim = lim;
  d.longest_prompt = d.shortest_prompt = pb.fixed ? lim.max_prompt : 0;
  for (auto const& l : layers) {
    d.layer = l.number;
    index_t const least = slots_needed(prompt, decode, d);
    KVKEEP_EXPECTS(l.kv.shape.max_slots >= least,
                   ("layers[" + std::to_string(l.spec) + "].shape.max_slots").c_str(),
                   l.kv.shape.max_slots, ">= " + std::to_string(least) + " (slots_needed)");
  }
}
}  // namespace detail

}  // namespace kvkeep
