// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Policies by name: options, the list with capabilities and parameter ranges, the maker.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "../policy/adakv.hpp"
#include "../policy/cake.hpp"
#include "../policy/dynamickv.hpp"
#include "../policy/expected_attention.hpp"
#include "../policy/fullkv.hpp"
#include "../policy/h2o.hpp"
#include "../policy/keydiff.hpp"
#include "../policy/knorm.hpp"
#include "../policy/lagkv.hpp"
#include "../policy/morphkv.hpp"
#include "../policy/pyramidkv.hpp"
#include "../policy/snapkv.hpp"
#include "../policy/streamingllm.hpp"
#include "../policy/tova.hpp"
#include "any_policy.hpp"
#include "slots.hpp"

namespace kvkeep {

/// Options of all policies; a policy reads those that `policy_info::parameters` names for it.
struct policy_options {
  index_t capacity = 1024;
  index_t window = 32;  ///< W; H2O: the recent tokens; TOVA: 1 protects the newest token
  /// None: the policy's own (StreamingLLM, LagKV, ExpectedAttention: 4; else 0).
  std::optional<index_t> sinks{};
  index_t kernel = 5;
  op::pooling pooling = op::pooling::average;
  reduction group = reduction::mean;
  reduction rows = reduction::sum;
  bool group_before_pool = true;
  index_t beta = 20;
  bool exact_total = true;
  double r_max = 10;
  double r_min = 0.1;
  /// Layers between checkpoints; none: the policy's own (DynamicKV 4, CAKE 1).
  std::optional<index_t> every{};
  double tau1 = 1;
  double tau2 = 1;
  double gamma = 200;
  double alpha = 0.2;
  bool normalize = false;
  ada_form form = ada_form::exact;
  bool published = false;  ///< DynamicKV's and CAKE's published arithmetic
  reduction fusion = reduction::sum;
  index_t n_rows = 0;
  double evict_after = 1;
  bool include_current = false;
  bool per_head_mask = false;
  std::optional<morph_rows> evaluation{};  ///< none: the cheapest that serves the other options
  bool make_room_first = true;
  index_t lag = 128;
  bool cross_scoring = false;
  rope rotation{};      ///< the model's: nobody notices another one
  bool rotated = true;  ///< queries come with it
  index_t ahead = 512;
  bool covariance = true;
  bool value_norms = true;
  double epsilon = 0;
  scope per = scope::head;
  /// Replaces the policy's own budget: "", "uniform", "pyramid", "dynamic", "cake", "ada", "per_head",
  /// "inherit".
  std::string_view budget{};
  std::span<index_t const> head_tokens{};  ///< [layer][kv_head] of budget "per_head"
  index_t block = 1;                       ///< > 1: packed blocks, or whole ones
  bool whole_blocks = false;
};

/// A number that a policy reads, with its range.
struct parameter_info {
  char const* name;
  double least;
  double most;
};

/// One policy of the library.
struct policy_info {
  char const* name;
  char const* source;  ///< paper
  bool at_prompt;      ///< cuts at the end of the prompt
  bool at_decode;      ///< cuts while decoding
  evidence prompt;     ///< what it needs of a prompt
  evidence decode;     ///< what it needs of a decoded token
  bool chunk_invariant;
  bool prefix_safe;
  bool draft_safe;
  bool per_head;      ///< granularities: one set per KV head ...
  bool per_layer;     ///< ... per layer ...
  bool per_sequence;  ///< ... per sequence
  std::span<parameter_info const> parameters;
};

namespace detail {

inline constexpr double big = 2147483647.0;
inline constexpr double longest = most_tokens;
inline constexpr parameter_info capacity_only[] = {{"capacity", 1, longest}};
inline constexpr parameter_info streaming_parameters[] = {{"capacity", 1, longest},
                                                          {"sinks", 0, longest}};
inline constexpr parameter_info guarded_parameters[] = {{"capacity", 1, longest},
                                                        {"sinks", 0, longest},
                                                        {"window", 0, longest},
                                                        {"evict_after", 1, 1024}};
inline constexpr parameter_info window_parameters[] = {
    {"capacity", 2, longest}, {"window", 1, longest}, {"kernel", 1, big}, {"sinks", 0, longest}};
inline constexpr parameter_info pyramid_parameters[] = {{"capacity", 2, longest},
                                                        {"window", 1, longest},
                                                        {"kernel", 1, big},
                                                        {"sinks", 0, longest},
                                                        {"beta", 1, big}};
inline constexpr parameter_info dynamic_parameters[] = {
    {"capacity", 2, longest}, {"window", 1, longest}, {"kernel", 1, big}, {"sinks", 0, longest},
    {"r_max", 1, 1e6},        {"r_min", 0, 1},        {"every", 1, big}};
inline constexpr parameter_info cake_parameters[] = {
    {"capacity", 3, longest}, {"window", 2, longest}, {"kernel", 1, big}, {"sinks", 0, longest},
    {"gamma", 0, 1e9},        {"tau1", 0.05, 20},     {"tau2", 0.05, 20}, {"every", 1, big}};
inline constexpr parameter_info ada_parameters[] = {{"capacity", 2, longest},
                                                    {"window", 1, longest},
                                                    {"kernel", 1, big},
                                                    {"sinks", 0, longest},
                                                    {"alpha", 0, 1}};
inline constexpr parameter_info h2o_parameters[] = {{"capacity", 1, longest},
                                                    {"window", 0, longest}};
inline constexpr parameter_info tova_parameters[] = {
    {"capacity", 1, longest}, {"window", 0, 1}, {"sinks", 0, longest}};
inline constexpr parameter_info morph_parameters[] = {{"capacity", 3, longest},
                                                      {"window", 2, longest},
                                                      {"n_rows", 0, longest},
                                                      {"evict_after", 1, 1024}};
inline constexpr parameter_info lag_parameters[] = {
    {"capacity", 1, longest}, {"sinks", 0, longest}, {"lag", 1, longest}};
inline constexpr parameter_info expected_parameters[] = {
    {"capacity", 1, longest}, {"sinks", 0, longest}, {"ahead", 1, longest}, {"epsilon", 0, 1}};

/// Name, paper, parameters, and how a policy is made: the one table.
template <class F>
void each_policy(policy_options const& o, F&& f) {
  index_t const sinks = o.sinks.value_or(0), first_ones = o.sinks.value_or(4);
  window_options const w{o.capacity,          o.window, o.kernel, o.pooling, o.group, o.rows,
                         o.group_before_pool, sinks};
  dynamickv dynamic = make_dynamickv(w, {o.r_max, o.r_min, o.every.value_or(4)});
  cake spreading = make_cake(
      {o.capacity, o.window, o.kernel, o.gamma, o.tau1, o.tau2, o.every.value_or(1), sinks});
  dynamic.budget.published = spreading.budget.published = o.published;
  f(make_fullkv(), "-", std::span<parameter_info const>{});
  f(make_streamingllm({o.capacity, first_ones, o.make_room_first}), "arXiv 2309.17453",
    streaming_parameters);
  f(make_snapkv(w), "arXiv 2404.14469", window_parameters);
  f(make_pyramidkv(w, o.beta, o.exact_total), "arXiv 2406.02069", pyramid_parameters);
  f(dynamic, "arXiv 2412.14838", dynamic_parameters);
  f(spreading, "arXiv 2503.12491", cake_parameters);
  f(make_adakv(w, {o.alpha, o.normalize, o.form}), "arXiv 2407.11550", ada_parameters);
  f(make_h2o({o.capacity, o.window, o.group}), "arXiv 2306.14048", h2o_parameters);
  f(make_observed_attention(o.capacity), "kvpress", capacity_only);
  f(make_tova({o.capacity, o.window > 0, sinks}), "arXiv 2401.06104", tova_parameters);
  f(make_morphkv({o.capacity, o.window, o.fusion, o.evict_after, o.n_rows, o.include_current,
                  o.per_head_mask, o.evaluation}),
    "arXiv 2503.00979", morph_parameters);
  f(make_knorm({o.capacity, sinks, o.window, o.evict_after}), "arXiv 2406.11430",
    guarded_parameters);
  f(make_keydiff({o.capacity, o.evict_after, sinks, o.window}), "arXiv 2504.15364",
    guarded_parameters);
  f(make_lagkv({o.capacity, first_ones, o.lag, o.cross_scoring}), "arXiv 2504.04704",
    lag_parameters);
  f(make_expected_attention({o.capacity, first_ones, o.rotation, o.rotated, o.ahead, o.covariance,
                             o.value_norms, o.epsilon}),
    "arXiv 2510.00636", expected_parameters);
}

inline any_budget named_budget(policy_options const& o) {
  if (o.budget == "uniform") return uniform{o.capacity};
  if (o.budget == "pyramid") return pyramid{o.capacity, o.beta, o.exact_total};
  if (o.budget == "dynamic")
    return dynamic_layers{o.capacity, o.r_max, o.r_min, o.every.value_or(4), o.published};
  if (o.budget == "cake")
    return cake_layers{o.capacity, o.tau1, o.tau2, o.every.value_or(1), o.published};
  if (o.budget == "ada") return ada_heads{o.capacity, o.alpha, o.normalize, o.form};
  if (o.budget == "per_head") return per_head{{o.head_tokens.begin(), o.head_tokens.end()}};
  if (o.budget == "inherit") return inherit{};
  refuse("budget", std::string(o.budget),
         "uniform, pyramid, dynamic, cake, ada, per_head or inherit");
}

}  // namespace detail

/// Calls f(policy_info) for every policy, in a fixed order.
template <class F>
void list_policies(F&& f) {
  detail::each_policy({}, [&](auto const& p, char const* source,
                              std::span<parameter_info const> parameters) {
    scorer_traits const t = p.score.traits();
    budget_traits const b = p.budget.traits();
    bool const cuts = t.at_prompt && !detail::keeps_all(p.score);
    f(policy_info{p.name, source, cuts, detail::cuts_while_decoding(p.score), t.prompt, t.decode,
                  t.chunk_invariant, t.prefix_safe, t.draft_safe, !t.whole_layer,
                  !b.varies_over_heads, !b.varies_over_heads && !b.varies_over_layers, parameters});
  });
}

/// A policy by name. Ranges are checked when it is bound.
/// @throws std::invalid_argument for an unknown name, listing the known ones
template <backend Ctx>
any_policy<Ctx> make_policy(std::string_view name, policy_options const& o = {}) {
  any_policy<Ctx> r;
  bool found = false;
  std::string known;
  detail::each_policy(o, [&](auto const& p, auto const&...) {
    known += (known.empty() ? "" : ", ") + std::string(p.name);
    if (name != p.name) return;
    found = true;
    r = erase_policy<Ctx>(p);
  });
  KVKEEP_EXPECTS(found, "policy", std::string(name), known);
  r.per = o.per;
  if (!o.budget.empty()) r.budget = detail::named_budget(o);
  if (o.whole_blocks)
    r.select = whole_blocks{o.block};
  else if (o.block > 1)
    r.select = top_k{o.block};
  return r;
}

}  // namespace kvkeep
