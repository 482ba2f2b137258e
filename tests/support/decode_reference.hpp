// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Decode policies paired with the oracle that they must follow, token by token.
#pragma once

#include <functional>

#include "engine.hpp"

namespace kvkeep::test {

/// An oracle simulator that shows the scores of its last cut, and can follow the library after a
/// near-tie.
class reference {
 public:
  virtual ~reference() = default;
  virtual void end_prompt(index_t last) = 0;
  virtual oracle::step_result step(index_t p) = 0;
  virtual oracle::kept_sets const& live() const = 0;
  virtual void follow(oracle::kept_sets const& sets) = 0;

  /// Whether `got` is the oracle's set, or differs by tokens whose scores are within 1e-5 of each
  /// other.
  bool agrees(oracle::kept_sets const& got, index_t& near_ties) {
    if (got == live()) return true;
    for (std::size_t c = 0; c < got.size(); ++c) {
      double worst_kept = oracle::infinity, best_gone = -oracle::infinity;
      if (c >= score.size() || got[c].size() != live()[c].size()) return false;
      for (std::size_t i = 0; i < before[c].size(); ++i) {
        index_t const p = before[c][i];
        bool const mine = std::binary_search(live()[c].begin(), live()[c].end(), p);
        bool const theirs = std::binary_search(got[c].begin(), got[c].end(), p);
        if (mine == theirs) continue;
        if (mine) worst_kept = std::min(worst_kept, score[c][i]);
        if (theirs) best_gone = std::max(best_gone, score[c][i]);
      }
      if (got[c] != live()[c] &&
          !(std::abs(worst_kept - best_gone) <= 1e-5 * std::max(std::abs(worst_kept), 1e-9)))
        return false;
    }
    ++near_ties;
    follow(got);
    return true;
  }

 protected:
  oracle::kept_sets before;
  std::vector<std::vector<double>> score;
};

template <class Sim>
class reference_of final : public reference {
 public:
  template <class... A>
  explicit reference_of(bool cuts_prompt, A&&... a)
      : cuts_prompt_(cuts_prompt), sim_(*this, std::forward<A>(a)...) {}
  void end_prompt(index_t last) override {
    if (cuts_prompt_) sim_.cut(last);
  }
  oracle::step_result step(index_t p) override { return sim_.step(p); }
  oracle::kept_sets const& live() const override { return sim_.live(); }
  void follow(oracle::kept_sets const& sets) override { sim_.set(sets); }

 private:
  struct watched : Sim {
    template <class... A>
    explicit watched(reference_of& o, A&&... a) : Sim(std::forward<A>(a)...), owner(o) {}
    bool cut(index_t p) override {
      owner.before = this->live_;
      owner.score.clear();
      for (index_t c = 0; c < this->heads(); ++c) owner.score.push_back(this->scores(c, p));
      return Sim::cut(p);
    }
    void set(oracle::kept_sets const& sets) { this->live_ = sets; }
    reference_of& owner;
  };
  bool cuts_prompt_;
  watched sim_;
};

struct decode_case {
  std::string name;
  any policy;
  bool at_append;  ///< the oracle's set is the one that the token attends to, else the one after it
  std::function<std::unique_ptr<reference>(oracle::tokens const&, index_t prompt,
                                           oracle::attention_rule const&)>
      make;
};

struct decode_sizes {
  index_t capacity = 16, window = 4, sinks = 2;
  index_t frozen = 0;  ///< tokens of a shared prefix
};

template <class Sim, class... A>
std::unique_ptr<reference> make_reference(bool cuts_prompt, A&&... a) {
  return std::make_unique<reference_of<Sim>>(cuts_prompt, std::forward<A>(a)...);
}

inline oracle::decode_rule decode_rule_of(policy_options const& o, oracle::guard const& keep,
                                          oracle::attention_rule const& rule) {
  oracle::decode_rule r;
  r.capacity = o.capacity;
  r.keep = keep;
  r.burst = detail::trigger(o.capacity, o.evict_after) - o.capacity;
  r.attention = rule;
  return r;
}

inline decode_case morph_case(std::string name, policy_options const& o, index_t frozen = 0) {
  return {std::move(name), make("morphkv", o), !o.include_current && !o.per_head_mask,
          [o, frozen](oracle::tokens const& t, index_t n, oracle::attention_rule const& rule) {
            oracle::morph_rule m;
            m.window = o.window.value();
            m.max_fused = o.fusion == reduction::max;
            m.evict_after = o.evict_after;
            m.n_rows = o.n_rows > 0 ? o.n_rows : m.window - 1;
            m.include_current = o.include_current;
            m.per_head_mask = o.per_head_mask;
            m.first_query = frozen;
            return make_reference<oracle::morph_decode>(
                false, t, decode_rule_of(o, {0, 0, frozen}, rule), m, oracle::full_cache(t, n));
          }};
}

/// MorphKV in all its forms.
inline std::vector<decode_case> morph_cases(decode_sizes const& z) {
  std::vector<decode_case> cases;
  policy_options o;
  o.capacity = z.capacity;
  o.window = z.window;
  o.evaluation = morph_rows::cached;
  cases.push_back(morph_case("morph sum cached", o, z.frozen));
  auto const with = [&](char const* name, auto&& edit) {
    policy_options x = o;
    edit(x);
    cases.push_back(morph_case(name, x, z.frozen));
  };
  with("morph max cached", [](auto& x) { x.fusion = reduction::max; });
  with("morph sum direct", [](auto& x) { x.evaluation = morph_rows::direct; });
  with("morph max direct", [](auto& x) {
    x.evaluation = morph_rows::direct;
    x.fusion = reduction::max;
  });
  if (z.window >= lazy_shape::ahead) {
    with("morph sum lazy", [](auto& x) { x.evaluation = morph_rows::lazy; });
    with("morph max lazy", [](auto& x) {
      x.evaluation = morph_rows::lazy;
      x.fusion = reduction::max;
    });
  }
  with("morph n_rows = W", [](auto& x) { x.n_rows = *x.window; });
  with("morph n_rows = 1", [](auto& x) { x.n_rows = 1; });
  with("morph burst", [](auto& x) { x.evict_after = 1.25; });
  with("morph burst direct max", [](auto& x) {
    x.evict_after = 1.4;
    x.evaluation = morph_rows::direct;
    x.fusion = reduction::max;
  });
  with("morph include_current", [](auto& x) { x.include_current = true; });
  with("morph include_current max burst", [](auto& x) {
    x.include_current = true;
    x.fusion = reduction::max;
    x.evict_after = 1.25;
  });
  with("morph per_head_mask", [](auto& x) { x.per_head_mask = true; });
  with("morph per_head_mask include_current", [](auto& x) {
    x.per_head_mask = x.include_current = true;
    x.fusion = reduction::max;
  });
  return cases;
}

/// The other policies that cut while decoding.
inline std::vector<decode_case> other_cases(decode_sizes const& z) {
  std::vector<decode_case> cases;
  policy_options o;
  o.capacity = z.capacity;
  auto const add = [&](std::string name, char const* policy, policy_options const& x,
                       bool at_append, auto&& f) {
    cases.push_back({std::move(name), make(policy, x), at_append, f});
  };
  using oracle::full_cache;
  policy_options s = o;
  s.sinks = z.sinks;
  add("streamingllm room first", "streamingllm", s, true,
      [s, z](auto const& t, index_t n, auto const& r) {
        return make_reference<oracle::streaming_decode>(
            false, t, decode_rule_of(s, {*s.sinks, 0, z.frozen}, r), full_cache(t, n), true);
      });
  s.make_room_first = false;
  add("streamingllm after", "streamingllm", s, false,
      [s, z](auto const& t, index_t n, auto const& r) {
        return make_reference<oracle::streaming_decode>(
            true, t, decode_rule_of(s, {*s.sinks, 0, z.frozen}, r), full_cache(t, n), false);
      });
  policy_options h = o;
  h.window = z.window;
  add("h2o", "h2o", h, false, [h, z](auto const& t, index_t n, auto const& r) {
    return make_reference<oracle::h2o_decode>(
        true, t, decode_rule_of(h, {0, *h.window, z.frozen}, r), full_cache(t, n),
        oracle::h2o_decode::prompt_acc(t, n, oracle::reduction::mean, r));
  });
  policy_options v = o;
  v.window = 0;
  add("tova", "tova", v, false, [v, z](auto const& t, index_t n, auto const& r) {
    return make_reference<oracle::tova_decode>(true, t, decode_rule_of(v, {0, 0, z.frozen}, r),
                                               full_cache(t, n));
  });
  v.window = 1;
  add("tova protect_last", "tova", v, false, [v, z](auto const& t, index_t n, auto const& r) {
    return make_reference<oracle::tova_decode>(true, t, decode_rule_of(v, {0, 1, z.frozen}, r),
                                               full_cache(t, n));
  });
  policy_options k = o;
  k.window = 0;
  add("knorm", "knorm", k, false, [k, z](auto const& t, index_t n, auto const& r) {
    return make_reference<oracle::knorm_decode>(true, t, decode_rule_of(k, {0, 0, z.frozen}, r),
                                                full_cache(t, n));
  });
  k.window = z.window;
  k.sinks = z.sinks;
  add("knorm guarded", "knorm", k, false, [k, z](auto const& t, index_t n, auto const& r) {
    return make_reference<oracle::knorm_decode>(
        true, t, decode_rule_of(k, {*k.sinks, *k.window, z.frozen}, r), full_cache(t, n));
  });
  policy_options burst = k;
  burst.evict_after = 1.3;
  add("knorm burst", "knorm", burst, false, [burst, z](auto const& t, index_t n, auto const& r) {
    return make_reference<oracle::knorm_decode>(
        true, t, decode_rule_of(burst, {*burst.sinks, *burst.window, z.frozen}, r),
        full_cache(t, n));
  });
  add("keydiff guarded", "keydiff", k, false, [k, z](auto const& t, index_t n, auto const& r) {
    return make_reference<oracle::keydiff_decode>(
        true, t, decode_rule_of(k, {*k.sinks, *k.window, z.frozen}, r), full_cache(t, n));
  });
  k.window = 0, k.sinks = 0;
  k.evict_after = 1.3;
  add("keydiff burst", "keydiff", k, false, [k, z](auto const& t, index_t n, auto const& r) {
    return make_reference<oracle::keydiff_decode>(true, t, decode_rule_of(k, {0, 0, z.frozen}, r),
                                                  full_cache(t, n));
  });
  return cases;
}

inline std::vector<decode_case> all_decode_cases(decode_sizes const& z = {}) {
  auto cases = other_cases(z);
  for (auto& c : morph_cases(z)) cases.push_back(std::move(c));
  return cases;
}

}  // namespace kvkeep::test
