// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Judges the steps of a recorded trace one by one: each from the recorded set before it.
#pragma once

#include "replay.hpp"

namespace kvkeep::replay {

/// Holds a run to the recorded sets wherever they are as good as the library's own: where the recorded
/// victims' scores, in double from the recorded sets, are within 1e-5 of the lowest. So a near tie that
/// went the other way does not set the rest of a trace apart, and anything else still shows.
class guide {
 public:
  using positions = std::vector<index_t>;
  /// Scores in double of the live positions (ascending) of one head; heads may be joined.
  using scores =
      std::function<std::vector<double>(index_t seq, index_t head, positions const& live)>;

  /// `whole_layer`: one set for all heads.
  guide(recorded_case const& c, trace_data const& t, scores in_double, bool whole_layer = false);

  /// What holds a run. The guide must live as long as that.
  std::function<void(score_input<> const&, score_map<>)> hold();
  index_t near_ties() const { return near_ties_; }

 private:
  struct candidates;
  positions recorded(index_t entry, index_t seq, index_t head) const;
  void decide(score_input<> const& in, score_map<> out, index_t entry, index_t head);

  npy_array const& kept_;
  index_t heads_, sequences_, prompt_;
  scores in_double_;
  bool whole_layer_;
  index_t near_ties_ = 0;
};

/// Whether the steps of a case can be judged so.
bool can_guide(recorded_case const& c);

/// H2O: the recorded sums of the entry before, and the newest token's row.
guide::scores h2o_in_double(recorded_case const& c, trace_data const& t);
/// TOVA: the newest token's row, mean over all query heads.
guide::scores tova_in_double(trace_data const& t);
/// MorphKV: the rows before the next token over the old columns.
guide::scores morphkv_in_double(trace_data const& t, policy_options const& o);
/// KNorm, KeyDiff: from the live keys.
guide::scores knorm_in_double(trace_data const& t);
guide::scores keydiff_in_double(trace_data const& t);

}  // namespace kvkeep::replay
