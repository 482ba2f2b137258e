// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Scorers without evidence: by position, by nothing, and by scores that the engine brings itself.
#pragma once

#include <limits>

#include "slot_score.hpp"

namespace kvkeep {

/// The newer, the better (StreamingLLM). The score is the float whose bits are position + 2^23: normal
/// floats in the order of the positions, exact up to position 2^31 - 2^24 (a converted integer would tie
/// above 2^24).
struct position_fn {
  static constexpr char const* name = "recency";
  static constexpr bool reads_k = false;
  static constexpr bool reads_v = false;
  KVKEEP_HD float operator()(slot_values const& s) const noexcept {
    return bit_copy<float>(s.position + 0x00800000);
  }
};

/// Keeps everything (FullKV): no evidence, no state, never cut.
struct keep_all_score : scorer_base {
  scorer_traits traits() const {
    scorer_traits t;
    t.name = "keep_all";
    return t;
  }
  index_t least_tokens() const { return std::numeric_limits<index_t>::max(); }
  template <class Ctx>
  status score(Ctx&, score_input<space_of<Ctx>> const&, score_map<space_of<Ctx>>,
               workspace&) const {
    return status::ok;
  }
};

/// Scores that the engine computes: `session::observe(layer, batch, own_scores)` sets them, they move with
/// the slots, and a new slot starts at zero.
struct engine_score : scorer_base {
  scorer_traits traits() const {
    scorer_traits t;
    t.name = "engine_score";
    t.prompt = t.decode = evidence::engine_scores;
    t.draft_safe = false;  // the engine's scores are not staged
    return t;
  }
  state_spec state(cache_shape const&) const { return {1, 0, 0}; }

  template <class Ctx>
  status score(Ctx& ctx, score_input<space_of<Ctx>> const& in, score_map<space_of<Ctx>> out,
               workspace& ws) const {
    op::reduce_rows<space_of<Ctx>> copy{in.batch, in.layer.slots, in.rows, true};
    copy.out = out;
    return run(ctx, copy, ws);
  }
};

}  // namespace kvkeep
