// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// policy = scorer x budget x selector, guarded; plus how wide a decision is and how often it is taken.
#pragma once

#include <cmath>
#include <limits>
#include <string>

#include "../budget/uniform.hpp"
#include "../score/plain.hpp"
#include "../select/selector.hpp"
#include "../view/check.hpp"

namespace kvkeep {

/// Tokens that are never evicted, by position rank among the live ones.
struct guard {
  index_t sinks = 0;   ///< S oldest
  index_t recent = 0;  ///< W newest
};

/// How wide one kept set is.
enum class scope : std::uint8_t {
  head,     ///< per KV head
  layer,    ///< per layer: fp32 mean of the scores over KV heads, in order
  sequence  ///< per sequence: then the mean over layers, in order; uniform budgets only
};

constexpr char const* to_string(scope s) noexcept {
  return s == scope::head ? "head" : s == scope::layer ? "layer" : "sequence";
}

/// When a decode policy cuts, in terms of the slots n in use after a token's attention.
struct cadence {
  /// x >= 1: cut at n + 1 >= (1 + C) x, down to C; 1 evicts one token per step (spec 4.3, bursts).
  double evict_after = 1;
  /// Slots made free ahead of the next token: 0 lets a step attend to C + 1 tokens, 1 to C.
  index_t room = 0;
  /// Decide with the new token's own query before its attention (MorphKV's include_current).
  bool before_attention = false;
  /// Official MorphKV attention: every query head attends to its own selection (implies the above
  /// order; the current query takes no part in the decision).
  bool per_head_mask = false;
};

/// A policy is a plain value. It is immutable once bound and may be shared among sessions.
template <class Score, class Budget = uniform, class Select = top_k>
struct policy {
  using score_type = Score;
  using budget_type = Budget;
  using select_type = Select;

  char const* name = "";
  Score score{};
  Budget budget{};
  Select select{};
  guard keep{};
  scope per = scope::head;
  cadence when{};

  /// Scope after the scorer's own (TOVA decides per layer at least).
  scope width() const {
    return per == scope::head && score.traits().whole_layer ? scope::layer : per;
  }
  std::uint64_t key() const {
    return config_key(name_key(score.traits().name), score.key(), name_key(budget.traits().name),
                      budget.key(), name_key(select.traits().name), select.key(), keep.sinks,
                      keep.recent, per, when.evict_after, when.room, when.before_attention,
                      when.per_head_mask);
  }
};

/// A policy whose parts run on a backend.
template <class P, class Ctx>
concept policy_on = backend<Ctx> && scorer<typename P::score_type, Ctx> &&
    budget_rule<typename P::budget_type, Ctx> && selector<typename P::select_type, Ctx>;

namespace detail {

/// Slots in use at which a cut is due, when `k` tokens are kept: max(k + 1, ceil((1 + k) x) - 1).
KVKEEP_HD inline index_t trigger(index_t k, double evict_after) noexcept {
  double const burst = std::ceil((1.0 + k) * evict_after) - 1;
  constexpr double most = 1 << 30;  // beyond any cache
  return burst > k + 1 ? static_cast<index_t>(burst < most ? burst : most) : k + 1;
}

/// When a head is cut, and to how many tokens.
struct cut_rule {
  double evict_after;  ///< cadence::evict_after
  index_t room;        ///< cadence::room
  index_t block;       ///< selector_traits::block

  /// Whether `n` tokens are cut to a budget of `k`. @param extra  slots that stay besides
  KVKEEP_HD bool due(index_t n, index_t k, index_t extra) const noexcept {
    return n >= trigger(k, evict_after) - room + extra && (block == 1 || n / block > k / block);
  }
  KVKEEP_HD index_t kept(index_t k, index_t extra) const noexcept {
    if (block > 1) return k / block * block;
    return (k > room ? k - room : 0) + extra;
  }
};
template <class P>
cut_rule cut_rule_of(P const& p) noexcept {
  return {p.when.evict_after, p.when.room, p.select.traits().block};
}

/// Fewest tokens that a policy can hold a head to: the protected ones and the room for the next one, or the blocks that
/// these may lie in, where blocks leave whole.
template <class P>
index_t least_budget(P const& p) noexcept {
  auto const select = p.select.traits();
  index_t const block = select.moves_tokens ? 1 : select.block;
  auto const whole = [block](index_t n) { return (n + block - 1) / block * block; };
  return whole(p.keep.sinks) + whole(p.keep.recent + p.when.room);
}

/// Most slots per head that a decode policy needs besides drafts (DESIGN contract 6).
inline index_t decode_slots(index_t k, cadence const& when) noexcept {
  index_t const peak = trigger(k, when.evict_after);
  return peak - when.room + (when.before_attention || when.per_head_mask ? 1 : 0);
}

}  // namespace detail

/// Checks a policy against a model's shape, before any cache exists.
/// @throws std::invalid_argument naming field, value and allowed range
template <class P>
KVKEEP_COLD void check_policy(P const& p, index_t n_layers, cache_shape const& shape) {
  check_shape(shape);
  auto const s = p.score.traits();
  auto const b = p.budget.traits();
  std::string const range = "0.." + std::to_string(most_tokens);
  KVKEEP_EXPECTS(p.keep.sinks >= 0 && p.keep.sinks <= most_tokens, "sinks", p.keep.sinks, range);
  KVKEEP_EXPECTS(p.keep.recent >= 0 && p.keep.recent <= most_tokens, "window", p.keep.recent,
                 range);
  KVKEEP_EXPECTS(p.budget.capacity() >= 0 && p.budget.capacity() <= most_tokens, "capacity",
                 p.budget.capacity(), range);
  KVKEEP_EXPECTS(p.when.evict_after >= 1 && p.when.evict_after <= 1024, "evict_after",
                 p.when.evict_after, "1..1024");
  KVKEEP_EXPECTS(p.when.room == 0 || p.when.room == 1, "room", p.when.room, "0 or 1");
  p.score.check(shape);
  p.select.check();
  if (p.score.least_tokens() != std::numeric_limits<index_t>::max()) {
    p.budget.check(n_layers, shape, p.keep.sinks + p.keep.recent);
    index_t const block = p.select.traits().block;
    KVKEEP_EXPECTS(b.inherits || block == 1 || p.budget.capacity() >= block, "capacity",
                   p.budget.capacity(),
                   ">= block = " + std::to_string(block) + ", for fewer tokens fill no block");
    // Otherwise a cut leaves more blocks than its budget, and is due again at once.
    index_t const least = detail::least_budget(p);
    KVKEEP_EXPECTS(b.inherits || p.select.traits().moves_tokens || p.budget.capacity() >= least,
                   "capacity", p.budget.capacity(),
                   ">= " + std::to_string(least) + ", for sinks and window may lie in " +
                       std::to_string(least / block) + " blocks of " + std::to_string(block));
  }
  KVKEEP_EXPECTS(
      !b.needs_scores || s.comparable, "budget", b.name,
      "uniform, pyramid, per_layer or per_head for scores that heads and layers cannot compare (" +
          std::string(s.name) + ")");
  KVKEEP_EXPECTS(!b.needs_spread || s.gives_spread, "budget", b.name,
                 "another one, for this is for scores that say how attention spreads (cake), not " +
                     std::string(s.name));
  KVKEEP_EXPECTS(!b.varies_over_heads || p.width() == scope::head, "budget", b.name,
                 "a budget without differences among heads, for one set per " +
                     std::string(to_string(p.width())));
  KVKEEP_EXPECTS(!b.varies_over_layers || p.width() != scope::sequence, "budget", b.name,
                 "uniform, for one set per sequence");
}

}  // namespace kvkeep
