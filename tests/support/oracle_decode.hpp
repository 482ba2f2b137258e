// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Naive reference, part 4: one sequence and layer decoding under each policy, one token per step.
/// The cache is a list of live positions per KV head; q, k, v of all positions are given up front.
#pragma once

#include "oracle.hpp"

namespace kvkeep::oracle {

/// Rows by position: q {Hq, N, D}, k {Hkv, N, D}, v {Hkv, N, Dv} or empty (then no attention
/// output).
struct tokens {
  array q, k, v;
};

/// The state after a step, its token included.
struct step_result {
  kept_sets kept;           ///< live positions per KV head, ascending
  array out;                ///< attention output {Hq, Dv}
  std::vector<double> lse;  ///< {Hq}; empty when heads do not share their group's set
  bool evicted = false;     ///< whether any head lost a token
};

struct decode_rule {
  index_t capacity = 0;
  std::vector<index_t> head_capacity;  ///< one per KV head, or empty: `capacity` for all
  guard keep;                          ///< recent = N_r (H2O), 1 (TOVA with protect_last)
  index_t burst = 1;                   ///< cut back to the capacity once n >= capacity + burst
  attention_rule attention;

  index_t of(index_t c) const { return head_capacity.empty() ? capacity : head_capacity.at(uz(c)); }
};

/// Every KV head holds positions 0..n-1.
inline kept_sets full_cache(tokens const& t, index_t n) {
  return kept_sets(uz(t.k.extent(0)), iota_positions(n));
}

/// Common step: append, attend to everything live, update the scores, cut.
class simulator {
 public:
  /// Keeps a reference to t.
  simulator(tokens const& t, decode_rule rule, kept_sets live)
      : t_(t), rule_(std::move(rule)), live_(std::move(live)) {}
  simulator(tokens&&, decode_rule, kept_sets) = delete;
  virtual ~simulator() = default;

  kept_sets const& live() const { return live_; }

  /// Cuts as the policy does right after the prompt, whose last token is p. Returns whether one
  /// left.
  virtual bool cut(index_t p) {
    std::vector<std::vector<double>> s;
    for (index_t c = 0; c < heads(); ++c) s.push_back(scores(c, p));
    bool evicted = false;
    for (index_t c = 0; c < heads(); ++c) {
      kept_set& mine = live_[uz(c)];
      if (count(mine) < rule_.of(c) + rule_.burst) continue;
      index_t const before = count(mine);
      mine = select(s[uz(c)], mine, rule_.of(c), rule_.keep);
      evicted = evicted || count(mine) < before;
    }
    return evicted;
  }

  virtual step_result step(index_t p) {
    append(p);
    step_result r;
    attend_all(r, p);
    observe(p);
    r.evicted = cut(p);
    r.kept = live_;
    return r;
  }

 protected:
  /// Scores of the live entries of KV head c when token p is the newest.
  virtual std::vector<double> scores(index_t c, index_t p) const = 0;
  virtual void observe(index_t) {}

  index_t heads() const { return t_.k.extent(0); }
  index_t group() const { return t_.q.extent(0) / heads(); }
  void append(index_t p) {
    for (kept_set& mine : live_) mine.push_back(p);
  }
  void attend_all(step_result& r, index_t p) const {
    if (t_.v.empty()) return;
    attend_result a = attend(t_.q, p, t_.k, t_.v, live_, rule_.attention);
    r.out = std::move(a.out);
    r.lse = std::move(a.lse);
  }

  tokens const& t_;
  decode_rule rule_;
  kept_sets live_;
};

/// H2O: accumulated probability, group mean before accumulating; rule.keep.recent = N_r, capacity =
/// N_h + N_r.
class h2o_decode : public simulator {
 public:
  /// `acc` {Hkv, N} by position: what the prompt left (prompt_acc), or empty for zeros.
  h2o_decode(tokens const& t, decode_rule rule, kept_sets live, array acc = {},
             reduction group_rule = reduction::mean)
      : simulator(t, std::move(rule), std::move(live)),
        acc_(acc.empty() ? array({t.k.extent(0), t.k.extent(1)}) : std::move(acc)),
        group_rule_(group_rule) {}

  /// Column sums of the causal matrix of the first n tokens, by position: {Hkv, N}.
  static array prompt_acc(tokens const& t, index_t n, reduction group_rule = reduction::mean,
                          attention_rule const& rule = {}) {
    array acc({t.q.extent(0), t.k.extent(1)});
    for (index_t h = 0; h < t.q.extent(0); ++h)
      for (index_t i = 0; i < n; ++i) {
        auto const p = row_probs(t.q, h, i, t.k, iota_positions(i + 1), rule);
        for (index_t j = 0; j <= i; ++j) acc.at(h, j) += p[uz(j)];
      }
    return group_reduce(acc, t.k.extent(0), group_rule);
  }

  /// Accumulated scores of KV head c, in the order of its live positions.
  std::vector<double> acc(index_t c) const { return scores(c, 0); }

 protected:
  std::vector<double> scores(index_t c, index_t) const override {
    std::vector<double> s;
    for (index_t j : live_[uz(c)]) s.push_back(acc_.at(c, j));
    return s;
  }
  void observe(index_t p) override {
    for (index_t c = 0; c < heads(); ++c) {
      kept_set const& mine = live_[uz(c)];
      array rows({group(), count(mine)});
      for (index_t g = 0; g < group(); ++g) {
        auto const a = row_probs(t_.q, c * group() + g, p, t_.k, mine, rule_.attention);
        for (std::size_t i = 0; i < a.size(); ++i) rows.at(g, i) = a[i];
      }
      array const joined = group_reduce(rows, 1, group_rule_);
      for (std::size_t i = 0; i < mine.size(); ++i) acc_.at(c, mine[i]) += joined.at(0, i);
    }
  }

 private:
  array acc_;
  reduction group_rule_;
};

/// TOVA: row of the current query, mean over all query heads; one set for all KV heads of the
/// layer.
class tova_decode : public simulator {
 public:
  using simulator::simulator;

 protected:
  std::vector<double> scores(index_t, index_t p) const override {
    for (kept_set const& other : live_)
      if (other != live_[0])
        throw std::invalid_argument("oracle: TOVA needs equal sets in all heads");
    std::vector<double> mean(live_[0].size());
    for (index_t h = 0; h < t_.q.extent(0); ++h) {
      auto const a = row_probs(t_.q, h, p, t_.k, live_[0], rule_.attention);
      for (std::size_t i = 0; i < a.size(); ++i) mean[i] += a[i];
    }
    for (double& m : mean) m /= t_.q.extent(0);
    return mean;
  }
};

/// StreamingLLM: rule.keep.sinks = S and the newest up to the capacity S + R. `make_room_first`
/// evicts before the append, so that attention never sees more than the capacity.
class streaming_decode : public simulator {
 public:
  streaming_decode(tokens const& t, decode_rule rule, kept_sets live, bool make_room_first)
      : simulator(t, std::move(rule), std::move(live)), make_room_first_(make_room_first) {}

  step_result step(index_t p) override {
    if (!make_room_first_) return simulator::step(p);
    step_result r;
    for (index_t c = 0; c < heads(); ++c) {
      index_t const before = count(live_[uz(c)]);
      live_[uz(c)] = select(scores(c, p), live_[uz(c)], rule_.of(c) - 1, rule_.keep);
      r.evicted = r.evicted || count(live_[uz(c)]) < before;
    }
    append(p);
    attend_all(r, p);
    r.kept = live_;
    return r;
  }

 protected:
  std::vector<double> scores(index_t c, index_t) const override {
    return {live_[uz(c)].begin(), live_[uz(c)].end()};
  }

 private:
  bool make_room_first_;
};

/// KNorm: minus the key norm of every live entry.
class knorm_decode : public simulator {
 public:
  using simulator::simulator;

 protected:
  std::vector<double> scores(index_t c, index_t) const override {
    std::vector<double> s;
    for (index_t j : live_[uz(c)]) s.push_back(-norm(t_.k.row(c, j)));
    return s;
  }
};

/// KeyDiff: anchor and cosine from scratch over the live entries of every step.
class keydiff_decode : public simulator {
 public:
  using simulator::simulator;

 protected:
  std::vector<double> scores(index_t c, index_t) const override {
    return keydiff_scores(t_.k, c, live_[uz(c)]);
  }
};

}  // namespace kvkeep::oracle
