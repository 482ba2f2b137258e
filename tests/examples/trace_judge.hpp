// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Judges a recorded decode trace in double: every step from the recorded set before it.
#pragma once

#include <string>

#include "../support/case.hpp"
#include "../support/oracle_morph.hpp"

namespace kvkeep::test {

struct verdict {
  std::string wrong;      ///< the first decision or figure that does not hold; empty: none
  index_t decisions = 0;  ///< sets that lost tokens
  index_t near_ties = 0;  ///< of them: another victim whose score is within 1e-5 of the lowest
  double widest = 0;      ///< relative distance of such a score
};

namespace detail {

/// A simulator of the oracle that shows the scores behind its cut.
template <class S>
struct shown : S {
  using S::observe;
  using S::S;
  using S::scores;
};

class trace_judge {
 public:
  explicit trace_judge(golden_case const& c)
      : c_(c),
        policy_(c.policy()),
        prompt_(c.shape("T0")),
        steps_(c.shape("steps")),
        heads_(c.shape("Hkv")) {
    bool const streaming = policy_ == "streamingllm", h2o = policy_ == "h2o";
    rule_.capacity = streaming ? c.param("start_size") + c.param("recent_size")
                     : h2o     ? c.param("hh_size") + c.param("recent_size")
                               : c.param("capacity");
    rule_.keep.sinks = streaming ? c.param("start_size") : c.param_or("n_sink", 0);
    rule_.keep.recent = h2o                 ? c.param("recent_size")
                        : policy_ == "tova" ? (c.param<bool>("protect_last") ? 1 : 0)
                                            : c.param_or("window", 0);
    if (streaming) {
      t_.k = oracle::array({heads_, prompt_ + steps_ + 1, 1});
      t_.q = t_.k;
      return;
    }
    for (auto const& [name, to] : {std::pair{"q", &t_.q}, {"k", &t_.k}, {"v", &t_.v}}) {
      auto const& a = c.input(name);
      *to = oracle::array({static_cast<index_t>(a.shape[1]), static_cast<index_t>(a.shape[2]),
                           static_cast<index_t>(a.shape[3])},
                          a.f32);
    }
    if (h2o) sums_ = oracle::h2o_decode::prompt_acc(t_, prompt_);
  }

  verdict run() {
    if (policy_ == "streamingllm") {
      streaming();
    } else {
      // MorphKV's entries hold the token that they were decided for; the others begin after the prompt.
      index_t const entries = policy_ == "morphkv" ? steps_ : steps_ + 1;
      for (index_t e = 0; e < entries; ++e) entry(e);
    }
    return std::move(v_);
  }

 private:
  void fail(std::string const& what, index_t entry) {
    if (v_.wrong.empty()) v_.wrong = what + ", entry " + std::to_string(entry);
  }

  oracle::kept_set recorded(char const* output, index_t entry, index_t head, index_t heads) const {
    auto const& a = c_.output(output);
    auto const width = static_cast<std::size_t>(a.shape.back());
    auto const* const row = a.i32.data() + oracle::uz(entry * heads + head) * width;
    return {row, std::find(row, row + width, -1)};
  }

  void streaming() {
    for (bool const first : {false, true}) {
      char const* const name = first ? "kept_space" : "kept_post";
      oracle::streaming_decode s(t_, rule_, oracle::full_cache(t_, prompt_), first);
      if (!first) s.cut(prompt_ - 1);
      for (index_t e = 0; e <= steps_; ++e) {
        if (first || e > 0) v_.decisions += s.step(prompt_ + e - (first ? 0 : 1)).evicted ? 1 : 0;
        if (s.live()[0] != recorded(name, e, 0, 1)) fail(name, e);
      }
    }
  }

  /// All heads of one entry: from the sets of the entry before, to the recorded ones.
  void entry(index_t e) {
    bool const morph = policy_ == "morphkv";
    index_t const newest = morph ? prompt_ + e : prompt_ + e - 1;
    oracle::kept_sets live = oracle::full_cache(t_, prompt_ + (morph ? 1 : 0)), next;
    for (index_t h = 0; h < heads_; ++h) {
      next.push_back(recorded("kept", e, h, heads_));
      if (e == 0) continue;
      live[oracle::uz(h)] = recorded("kept", e - 1, h, heads_);
      live[oracle::uz(h)].push_back(newest);
    }
    auto const scores = scores_of(live, newest, e);
    for (index_t h = 0; h < heads_; ++h)
      decision(live[oracle::uz(h)], next[oracle::uz(h)], scores[oracle::uz(h)], e);
    if (morph) attention(next, e);
    if (policy_ == "h2o") check_sums(next, e);
  }

  std::vector<std::vector<double>> scores_of(oracle::kept_sets const& live, index_t newest,
                                             index_t e) {
    std::vector<std::vector<double>> s;
    auto const all = [&](auto const& simulator) {
      for (index_t h = 0; h < heads_; ++h) s.push_back(simulator.scores(h, newest));
    };
    if (policy_ == "h2o") {
      shown<oracle::h2o_decode> now(t_, rule_, live, sums_);
      if (e > 0) now.observe(newest);
      all(now);
      for (index_t h = 0; h < heads_; ++h)
        for (std::size_t i = 0; i < live[oracle::uz(h)].size(); ++i)
          sums_.at(h, live[oracle::uz(h)][i]) = s[oracle::uz(h)][i];
    } else if (policy_ == "tova") {
      all(shown<oracle::tova_decode>(t_, rule_, live));
    } else if (policy_ == "knorm") {
      all(shown<oracle::knorm_decode>(t_, rule_, live));
    } else if (policy_ == "keydiff") {
      all(shown<oracle::keydiff_decode>(t_, rule_, live));
    } else {
      oracle::morph_rule m;
      m.window = c_.param("window");
      m.n_rows = c_.param("n_query_rows");
      m.max_fused = c_.param<std::string>("fusion") == "max_fused";
      all(shown<oracle::morph_decode>(t_, rule_, m, live));
    }
    return s;
  }

  /// Tokens that are to remain of n: bursts wait for ceil((1 + C) x), MorphKV's new token counts besides.
  index_t remaining(index_t n) const {
    index_t const kept = rule_.capacity, more = policy_ == "morphkv" ? 1 : 0;
    double const burst = std::ceil((1.0 + kept) * c_.param_or("evict_after", 1.0));
    return n > kept + more && n + 1 - more >= burst ? kept + more : n;
  }

  void decision(oracle::kept_set const& live, oracle::kept_set const& next,
                std::vector<double> const& scores, index_t e) {
    index_t const k = remaining(oracle::count(live));
    if (oracle::count(next) != k)
      return fail(std::to_string(next.size()) + " tokens, expected " + std::to_string(k), e);
    oracle::guard keep = rule_.keep;
    if (policy_ == "morphkv") ++keep.recent;  // the new token
    v_.decisions += k < oracle::count(live) ? 1 : 0;
    if (oracle::select(scores, live, k, keep) == next) return;
    double best_gone = -oracle::infinity, worst_kept = oracle::infinity;
    std::size_t held = 0;
    for (std::size_t i = 0; i < live.size(); ++i) {
      bool const kept = std::binary_search(next.begin(), next.end(), live[i]);
      held += kept ? 1 : 0;
      if (oracle::is_protected(keep, live, live[i])) {
        if (!kept) return fail("token " + std::to_string(live[i]) + " was protected", e);
      } else if (kept) {
        worst_kept = std::min(worst_kept, scores[i]);
      } else {
        best_gone = std::max(best_gone, scores[i]);
      }
    }
    if (held != next.size()) return fail("a token came back", e);
    double const distance =
        (best_gone - worst_kept) / std::max(std::abs(best_gone), std::abs(worst_kept));
    ++v_.near_ties;
    v_.widest = std::max(v_.widest, distance);
    if (!(distance <= 1e-5))
      fail("a victim is " + std::to_string(distance) + " above the lowest", e);
  }

  void close(double mine, float expected, double absolute, char const* what, index_t e) {
    if (!(std::abs(mine - expected) <= absolute + 2e-4 * std::abs(mine))) fail(what, e);
  }

  void check_sums(oracle::kept_sets const& next, index_t e) {
    auto const& acc = c_.output("acc");
    auto const width = static_cast<std::size_t>(acc.shape.back());
    for (index_t h = 0; h < heads_; ++h)
      for (std::size_t i = 0; i < next[oracle::uz(h)].size(); ++i)
        close(sums_.at(h, next[oracle::uz(h)][i]), acc.f32[oracle::uz(e * heads_ + h) * width + i],
              1e-6, "acc", e);
    if (e > 0 || c_.output_info.count("acc_prompt") == 0) return;
    auto const& all = c_.output("acc_prompt").f32;
    for (index_t h = 0; h < heads_; ++h)
      for (index_t j = 0; j < prompt_; ++j)
        close(sums_.at(h, j), all.at(oracle::uz(h * prompt_ + j)), 1e-6, "acc_prompt", e);
  }

  void attention(oracle::kept_sets const& kept, index_t e) {
    auto const mine = oracle::attend(t_.q, prompt_ + e, t_.k, t_.v, kept).out.data;
    for (std::size_t i = 0; i < mine.size(); ++i)
      close(mine[i], c_.output("attn_out_kept").f32[oracle::uz(e) * mine.size() + i], 2e-5,
            "attn_out_kept", e);
    auto const size = [&](index_t at) { return oracle::count(recorded("kept", at, 0, heads_)); };
    index_t const before = e == 0 ? prompt_ : size(e - 1);
    if (c_.output("lens").i32[oracle::uz(e)] != size(e)) fail("lens", e);
    if (c_.output("evicted").i32[oracle::uz(e)] != (size(e) <= before ? 1 : 0)) fail("evicted", e);
  }

  golden_case const& c_;
  std::string policy_;
  index_t prompt_, steps_, heads_;
  oracle::tokens t_;
  oracle::decode_rule rule_;
  oracle::array sums_;  ///< H2O, by position: over the recorded sets, in double
  verdict v_;
};

}  // namespace detail

/// Does not use the library. H2O's sums are its own, over the recorded sets.
inline verdict judge(golden_case const& c) { return detail::trace_judge(c).run(); }

}  // namespace kvkeep::test
