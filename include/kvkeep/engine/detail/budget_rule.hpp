// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// How many tokens a head may have at most: what `verify` holds heads to.
#pragma once

#include "../slots.hpp"
#include "../state.hpp"

namespace kvkeep::detail {

KVKEEP_HD inline index_t smaller(index_t a, index_t b) noexcept { return a < b ? a : b; }
KVKEEP_HD inline index_t larger(index_t a, index_t b) noexcept { return a < b ? b : a; }

/// Of the decode policy.
struct budget_rule {
  bool any = false;     ///< somebody evicts while decoding
  bool late = false;    ///< a token more is there until it has been attended to
  index_t least = 0;    ///< heads with fewer tokens stay whole
  index_t guarded = 0;  ///< sinks and recent tokens
  index_t drafts = 0;   ///< most unconfirmed tokens
  index_t left = 0;     ///< most tokens that another policy leaves a late one of the prompt
  double evict_after = 1;

  /// Whether `live` tokens are more than a head may have. @param decided  tokens after which nothing waits to leave
  template <class Space>
  KVKEEP_HD bool exceeded(layer_state<Space> const& l, index_t id, index_t h, index_t live,
                          index_t frozen, index_t decided) const noexcept {
    // Before its first decision a late policy still holds all tokens, or what another one has left of them.
    if (!any || least > live || (late && l.appended[id] == live)) return false;
    index_t const pending = l.appended[id] - decided;
    // Confirmed drafts stay until no token is left unconfirmed.
    index_t const spare = (pending > 0 ? drafts : 0) + (late ? 1 : 0);
    index_t const most = larger(trigger(l.k(id, h), evict_after) - 1, 0) + spare;
    return live > larger(larger(most, left), smaller(live, frozen + guarded + pending));
  }
};

/// @param one      one policy serves the prompt and decoding
/// @param drafts   most unconfirmed tokens
/// @param commits  the engine evicts when it likes
template <class P, class D>
budget_rule rule_of(P const& prompt, D const& decode, bool one, index_t n_layers,
                    cache_shape const& cache, index_t drafts, bool commits) noexcept {
  budget_rule r;
  r.late = decides_late(decode.when);
  if (r.late && !one)
    r.left = prompt.budget.most(n_layers, cache, prompt.keep.sinks + prompt.keep.recent,
                                cache.max_slots);
  r.any = cuts_while_decoding(decode.score) && !commits;
  r.least = decode.score.least_tokens();
  r.guarded = decode.keep.sinks + decode.keep.recent;
  r.drafts = drafts;
  r.evict_after = decode.when.evict_after;
  return r;
}

}  // namespace kvkeep::detail
