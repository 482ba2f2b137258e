// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Policies chosen at run time: one type for all of them, made from a name and a plain struct.
#pragma once

#include <memory>
#include <string_view>
#include <variant>

#include "../budget/ada_heads.hpp"
#include "../budget/cake_layers.hpp"
#include "../budget/dynamic_layers.hpp"
#include "../budget/inherit.hpp"
#include "../budget/per_head.hpp"
#include "../budget/pyramid.hpp"
#include "../policy/policy.hpp"
#include "detail/token_chain.hpp"

namespace kvkeep {

/// Any scorer behind a few indirect calls per layer and step. Immutable; copies share one scorer.
template <backend Ctx>
class any_scorer {
 public:
  using space = space_of<Ctx>;
  using input = score_input<space>;
  using heads_map = tensor_ref<float, 3, space>;
  template <bool Const>
  using slot_list = tensor_ref<std::conditional_t<Const, index_t const, index_t>, 2, space>;

  any_scorer() = default;
  template <class S>
  requires scorer<S, Ctx>
  explicit any_scorer(S const& s) : self_(std::make_shared<model<S> const>(s)) {}

  scorer_traits traits() const { return self().traits(); }
  state_spec state(cache_shape const& s) const { return self().state(s); }
  std::uint64_t key() const { return self().key(); }
  index_t least_tokens() const { return self().least_tokens(); }
  void check(cache_shape const& s) const { self().check(s); }
  status observe_prompt(Ctx& c, input const& in, query_rows<space> const& q, workspace& w) const {
    return self_->observe_prompt(c, in, q, w);
  }
  status settle(Ctx& c, input const& in, workspace& w) const { return self_->settle(c, in, w); }
  status fold(Ctx& c, input const& in, workspace& w) const { return self_->fold(c, in, w); }
  weight_fold<space> attention_fold(input const& in) const { return self_->attention_fold(in); }
  status score(Ctx& c, input const& in, score_map<space> out, workspace& w) const {
    return self_->score(c, in, out, w);
  }
  status score_direct(Ctx& c, input const& in, score_map<space> out, heads_map heads,
                      workspace& w) const {
    return self_->score_direct(c, in, out, heads, w);
  }
  status victims(Ctx& c, input const& in, slot_list<true> keep, slot_list<false> victim,
                 workspace& w) const {
    return self_->victims(c, in, keep, victim, w);
  }
  status decide_token(Ctx& c, input const& in, detail::token_steps<space> const& t,
                      workspace& w) const {
    return self_->decide_token(c, in, t, w);
  }

 private:
  struct base {
    virtual ~base() = default;
    virtual scorer_traits traits() const = 0;
    virtual state_spec state(cache_shape const&) const = 0;
    virtual std::uint64_t key() const = 0;
    virtual index_t least_tokens() const = 0;
    virtual void check(cache_shape const&) const = 0;
    virtual status observe_prompt(Ctx&, input const&, query_rows<space> const&,
                                  workspace&) const = 0;
    virtual status settle(Ctx&, input const&, workspace&) const = 0;
    virtual status fold(Ctx&, input const&, workspace&) const = 0;
    virtual weight_fold<space> attention_fold(input const&) const = 0;
    virtual status score(Ctx&, input const&, score_map<space>, workspace&) const = 0;
    virtual status score_direct(Ctx&, input const&, score_map<space>, heads_map,
                                workspace&) const = 0;
    virtual status victims(Ctx&, input const&, slot_list<true>, slot_list<false>,
                           workspace&) const = 0;
    virtual status decide_token(Ctx&, input const&, detail::token_steps<space> const&,
                                workspace&) const = 0;
  };
  template <class S>
  struct model final : base {
    S s;
    explicit model(S const& v) : s(v) {}
    scorer_traits traits() const override { return s.traits(); }
    state_spec state(cache_shape const& c) const override { return s.state(c); }
    std::uint64_t key() const override { return s.key(); }
    index_t least_tokens() const override { return s.least_tokens(); }
    void check(cache_shape const& c) const override { s.check(c); }
    status observe_prompt(Ctx& c, input const& in, query_rows<space> const& q,
                          workspace& w) const override {
      return s.observe_prompt(c, in, q, w);
    }
    status settle(Ctx& c, input const& in, workspace& w) const override {
      return s.settle(c, in, w);
    }
    status fold(Ctx& c, input const& in, workspace& w) const override { return s.fold(c, in, w); }
    weight_fold<space> attention_fold(input const& in) const override {
      return s.attention_fold(in);
    }
    status score(Ctx& c, input const& in, score_map<space> out, workspace& w) const override {
      return s.score(c, in, out, w);
    }
    status score_direct(Ctx& c, input const& in, score_map<space> out, heads_map heads,
                        workspace& w) const override {
      if constexpr (requires { s.score_direct(c, in, out, heads, w); })
        return s.score_direct(c, in, out, heads, w);
      else
        return status::unsupported;
    }
    status victims(Ctx& c, input const& in, slot_list<true> keep, slot_list<false> victim,
                   workspace& w) const override {
      if constexpr (finds_victims<S, Ctx>)
        return s.victims(c, in, keep, victim, w);
      else
        return status::unsupported;
    }
    status decide_token(Ctx& c, input const& in, detail::token_steps<space> const& t,
                        workspace& w) const override {
      return detail::decide_token(c, s, in, t, w);
    }
  };

  /// @throws std::invalid_argument for a policy that nobody has made
  base const& self() const {
    KVKEEP_EXPECTS(self_ != nullptr, "policy", "none", "one of make_policy's or erase_policy's");
    return *self_;
  }

  std::shared_ptr<base const> self_;
};

namespace detail {
/// Whether T itself is an alternative: what derives from one would be sliced.
template <class T, class Variant>
inline constexpr bool alternative_of = false;
template <class T, class... Types>
inline constexpr bool alternative_of<T, std::variant<Types...>> = (std::same_as<T, Types> || ...);
}  // namespace detail

/// Any of the library's budgets.
class any_budget {
 public:
  using value = std::variant<uniform, per_layer, pyramid, dynamic_layers, ada_heads, inherit,
                             per_head, cake_layers>;

  any_budget() = default;
  template <class B>
  requires detail::alternative_of<B, value> any_budget(B const& b) : b_(b) {}

  budget_traits traits() const {
    return std::visit([](auto const& b) { return b.traits(); }, b_);
  }
  std::uint64_t key() const {
    return config_key(b_.index(), std::visit([](auto const& b) { return b.key(); }, b_));
  }
  index_t capacity() const {
    return std::visit([](auto const& b) { return b.capacity(); }, b_);
  }
  index_t most(index_t n_layers, cache_shape const& s, index_t protect, index_t prompt) const {
    return std::visit([&](auto const& b) { return b.most(n_layers, s, protect, prompt); }, b_);
  }
  index_t most_in(index_t layer, index_t n_layers, cache_shape const& s, index_t protect,
                  index_t prompt) const {
    return std::visit(
        [&](auto const& b) { return detail::most_in(b, layer, n_layers, s, protect, prompt); }, b_);
  }
  layer_range due(index_t layer, index_t n) const {
    return std::visit([&](auto const& b) { return b.due(layer, n); }, b_);
  }
  void check(index_t n_layers, cache_shape const& s, index_t protect) const {
    std::visit([&](auto const& b) { b.check(n_layers, s, protect); }, b_);
  }
  template <class Ctx>
  status allocate(Ctx& c, budget_input<space_of<Ctx>> const& in, workspace& w) const {
    return std::visit([&](auto const& b) { return b.allocate(c, in, w); }, b_);
  }

 private:
  value b_{};
};

/// Any of the library's selectors.
class any_selector {
 public:
  using value = std::variant<top_k, whole_blocks>;

  any_selector() = default;
  template <class L>
  requires detail::alternative_of<L, value> any_selector(L const& s) : s_(s) {}

  selector_traits traits() const {
    return std::visit([](auto const& s) { return s.traits(); }, s_);
  }
  std::uint64_t key() const {
    return config_key(s_.index(), std::visit([](auto const& s) { return s.key(); }, s_));
  }
  void check() const {
    std::visit([](auto const& s) { s.check(); }, s_);
  }
  template <class Ctx>
  status select(Ctx& c, batch_ref<space_of<Ctx>> const& b, slot_state<space_of<Ctx>> const& slots,
                tensor_ref<float const, 3, space_of<Ctx>> scores,
                tensor_ref<index_t const, 2, space_of<Ctx>> k, guard_ref<space_of<Ctx>> const& g,
                keep_plan<space_of<Ctx>> const& plan, workspace& w) const {
    return std::visit([&](auto const& s) { return s.select(c, b, slots, scores, k, g, plan, w); },
                      s_);
  }

 private:
  value s_{};
};

/// A policy chosen at run time (see policy_table.hpp for making one by name).
template <backend Ctx>
using any_policy = policy<any_scorer<Ctx>, any_budget, any_selector>;

/// A typed policy as an any_policy: its budget and selector are the library's, its scorer anybody's.
template <backend Ctx, class S, class B, class L>
requires std::is_constructible_v<any_budget, B const&> &&
    std::is_constructible_v<any_selector, L const&>
        any_policy<Ctx> erase_policy(policy<S, B, L> const& p) {
  any_policy<Ctx> r;
  r.name = p.name;
  r.score = any_scorer<Ctx>(p.score);
  r.budget = p.budget;
  r.select = p.select;
  r.keep = p.keep;
  r.per = p.per;
  r.when = p.when;
  return r;
}

}  // namespace kvkeep
