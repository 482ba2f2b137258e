// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// KeyDiff's and LagKV's scores.
#pragma once

#include "../op/key_geometry.hpp"
#include "scorer.hpp"

namespace kvkeep {

/// Spec 3.7; arXiv 2504.15364, kvpress KeyDiffPress. Minus the cosine with the mean unit key of the
/// tokens in the cache. Reads the keys at every decision.
struct key_diff_score : scorer_base {
  scorer_traits traits() const {
    scorer_traits t;
    t.name = "key_diff";
    t.prompt = t.decode = evidence::keys;
    return t;
  }
  template <class Ctx>
  status score(Ctx& ctx, score_input<space_of<Ctx>> const& in, score_map<space_of<Ctx>> out,
               workspace& ws) const {
    return run(ctx, op::key_diff<space_of<Ctx>>{in.batch, in.layer, out}, ws);
  }
};

/// Spec 3.8; arXiv 2504.04704, kvpress LagKVPress. Ties (ranks repeat across partitions) keep the lower
/// position; a channel without range counts as 0.
struct lag_score : scorer_base {
  index_t sinks = 4;
  index_t lag = 128;
  bool cross_scoring = false;

  scorer_traits traits() const {
    scorer_traits t;
    t.name = "lag";
    t.at_decode = false;
    t.prompt = evidence::keys_values;
    t.prefix_safe = false;  // partitions are counted from the first token
    return t;
  }
  void check(cache_shape const& s) const {
    std::string const most = std::to_string(most_tokens);
    KVKEEP_EXPECTS(sinks >= 0 && sinks <= most_tokens, "sinks", sinks, ">= 0 and <= " + most);
    KVKEEP_EXPECTS(lag >= 1 && lag <= most_tokens, "lag", lag, ">= 1 and <= " + most);
    KVKEEP_EXPECTS(s.dim_k >= 2 && s.dim_v >= 2, "shape.dim_k", s.dim_k,
                   ">= 2 (a deviation over channels)");
  }
  std::uint64_t key() const { return config_key(sinks, lag, cross_scoring); }
  index_t least_tokens() const { return sinks + 2 * lag; }

  template <class Ctx>
  status score(Ctx& ctx, score_input<space_of<Ctx>> const& in, score_map<space_of<Ctx>> out,
               workspace& ws) const {
    return run(
        ctx, op::lag_score<space_of<Ctx>>{in.batch, in.layer, sinks, lag, cross_scoring, out}, ws);
  }
};

}  // namespace kvkeep
