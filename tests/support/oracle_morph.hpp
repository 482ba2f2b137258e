// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Naive reference, part 5: MorphKV, recomputed from all positions at every step.
#pragma once

#include "oracle_decode.hpp"

namespace kvkeep::oracle {

struct morph_rule {
  index_t window = 4;
  bool max_fused = false;  ///< rows are fused by maximum, else by sum
  double evict_after = 1;
  index_t n_rows = 3;  ///< at most `window`
  bool include_current = false;
  bool per_head_mask =
      false;                ///< the official attention: every query head attends to its own choice
  index_t first_query = 0;  ///< oldest position whose query the ring has ever seen
  bool sink_in_scores = false;  ///< whether a sink logit joins the normaliser of the old columns
};

/// MorphKV: evicts first, then every head of a group attends to exactly the kept set. Size capacity
/// + 1.
class morph_decode : public simulator {
 public:
  morph_decode(tokens const& t, decode_rule rule, morph_rule morph, kept_sets live)
      : simulator(t, std::move(rule), std::move(live)), morph_(morph) {
    if (morph.n_rows > morph.window) throw std::invalid_argument("oracle: n_rows > window");
  }

  bool cut(index_t p) override {
    bool evicted = false;
    for (index_t c = 0; c < heads(); ++c) {
      kept_set& mine = live_[uz(c)];
      if (!due(c)) continue;
      mine = choose(c, fused(c * group(), (c + 1) * group(), p, mine));
      evicted = true;
    }
    return evicted;
  }

  step_result step(index_t p) override {
    append(p);
    step_result r;
    kept_sets seen(uz(t_.q.extent(0)));  // per query head, before anything is evicted
    for (index_t h = 0; h < t_.q.extent(0) && morph_.per_head_mask; ++h) {
      index_t const c = h / group();
      kept_set const& mine = live_[uz(c)];
      seen[uz(h)] = due(c) ? choose(c, fused(h, h + 1, p, mine)) : mine;
    }
    r.evicted = cut(p);
    if (morph_.per_head_mask) {
      if (!t_.v.empty()) r.out = attend_masked(p, seen);
    } else {
      attend_all(r, p);
    }
    r.kept = live_;
    return r;
  }

 protected:
  std::vector<double> scores(index_t c, index_t p) const override {
    return fused(c * group(), (c + 1) * group(), p, live_[uz(c)]);
  }

 private:
  bool due(index_t c) const {
    index_t const n = count(live_[uz(c)]), steady = rule_.of(c) + 1;
    return n > steady && n >= std::ceil(steady * morph_.evict_after);
  }

  /// Scores of `mine` by query heads first..last-1: maximum over heads, then rows fused. The
  /// softmax runs over the old columns only; the protected ones get 0. Without any row the newest
  /// old ones win.
  std::vector<double> fused(index_t first, index_t last, index_t p, kept_set const& mine) const {
    kept_set old = mine;
    old.resize(uz(std::max<index_t>(count(mine) - (morph_.window + 1), 0)));
    index_t const shift = morph_.include_current ? 1 : 0;
    index_t const row = std::max(morph_.first_query, p - morph_.n_rows + shift);
    std::vector<double> s(mine.size());
    if (row >= p + shift) return {mine.begin(), mine.end()};
    for (index_t i = row; i < p + shift; ++i) {
      std::vector<double> best(old.size());
      for (index_t h = first; h < last; ++h) {
        auto const a = row_probs(t_.q, h, i, t_.k, old, rule_.attention, morph_.sink_in_scores);
        for (std::size_t j = 0; j < old.size(); ++j) best[j] = std::max(best[j], a[j]);
      }
      for (std::size_t j = 0; j < old.size(); ++j)
        s[j] = morph_.max_fused ? std::max(s[j], best[j]) : s[j] + best[j];
    }
    return s;
  }

  kept_set choose(index_t c, std::vector<double> const& s) const {
    guard keep = rule_.keep;
    keep.recent = std::max(keep.recent, morph_.window + 1);
    return select(s, live_[uz(c)], rule_.of(c) + 1, keep);
  }

  array attend_masked(index_t p, kept_sets const& seen) const {
    array out({t_.q.extent(0), t_.v.extent(2)});
    for (index_t h = 0; h < t_.q.extent(0); ++h) {
      kept_sets const mine(uz(heads()), seen[uz(h)]);
      auto const all = attend(t_.q, p, t_.k, t_.v, mine, rule_.attention).out;
      for (index_t d = 0; d < out.extent(1); ++d) out.at(h, d) = all.at(h, d);
    }
    return out;
  }

  morph_rule morph_;
};

}  // namespace kvkeep::oracle
