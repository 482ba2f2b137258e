// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Policies by name: the list with capabilities and parameter ranges, the setter of a parameter, the maker.
#pragma once

#include <cmath>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>

#include "any_policy.hpp"
#include "policy_parameters.hpp"
#include "slots.hpp"

namespace kvkeep {

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

/// Name, paper, parameters, and how a policy is made: the one table.
template <class F>
void each_policy(policy_options const& o, F&& f) {
  auto const window = [&](auto own) { return o.window.value_or(own.window); };
  auto const sinks = [&](auto own) { return o.sinks.value_or(own.sinks); };
  auto const every = [&](auto own) { return o.every.value_or(own.every); };
  window_options const own{}, w{o.capacity, window(own),         o.kernel,  o.pooling, o.group,
                                o.rows,     o.group_before_pool, sinks(own)};
  dynamickv dynamic = make_dynamickv(w, {o.r_max, o.r_min, every(dynamickv_options{})});
  cake_options const c{};
  cake spreading =
      make_cake({o.capacity, window(c), o.kernel, o.gamma, o.tau1, o.tau2, every(c), sinks(c)});
  dynamic.budget.published = spreading.budget.published = o.published;
  bool const newest = o.window ? *o.window > 0 : tova_options{}.protect_last;
  f(make_fullkv(), "-", std::span<parameter_info const>{});
  f(make_streamingllm({o.capacity, sinks(streamingllm_options{}), o.make_room_first}),
    "arXiv 2309.17453", streaming_parameters);
  f(make_snapkv(w), "arXiv 2404.14469", window_parameters);
  f(make_pyramidkv(w, o.beta, o.exact_total), "arXiv 2406.02069", pyramid_parameters);
  f(dynamic, "arXiv 2412.14838", dynamic_parameters);
  f(spreading, "arXiv 2503.12491", cake_parameters);
  f(make_adakv(w, {o.alpha, o.normalize, o.form}), "arXiv 2407.11550", ada_parameters);
  f(make_h2o({o.capacity, o.window.value_or(o.capacity / 2), o.group}), "arXiv 2306.14048",
    h2o_parameters);
  f(make_observed_attention(o.capacity), "kvpress", capacity_only);
  f(make_tova({o.capacity, newest, sinks(tova_options{})}), "arXiv 2401.06104", tova_parameters);
  f(make_morphkv({o.capacity, window(morphkv_options{}), o.fusion, o.evict_after, o.n_rows,
                  o.include_current, o.per_head_mask, o.evaluation}),
    "arXiv 2503.00979", morph_parameters);
  knorm_options const k{};
  f(make_knorm({o.capacity, sinks(k), window(k), o.evict_after}), "arXiv 2406.11430",
    guarded_parameters);
  keydiff_options const d{};
  f(make_keydiff({o.capacity, o.evict_after, sinks(d), window(d)}), "arXiv 2504.15364",
    guarded_parameters);
  f(make_lagkv({o.capacity, sinks(lagkv_options{}), o.lag, o.cross_scoring}), "arXiv 2504.04704",
    lag_parameters);
  f(make_expected_attention({o.capacity, sinks(expected_attention_options{}), o.rotation, o.rotated,
                             o.ahead, o.covariance, o.value_norms, o.epsilon}),
    "arXiv 2510.00636", expected_parameters);
}

inline any_budget named_budget(policy_options const& o) {
  if (o.budget == "uniform") return uniform{o.capacity};
  if (o.budget == "pyramid") return pyramid{o.capacity, o.beta, o.exact_total};
  if (o.budget == "dynamic")
    return dynamic_layers{o.capacity, o.r_max, o.r_min, o.every.value_or(dynamic_layers{}.every),
                          o.published};
  if (o.budget == "cake")
    return cake_layers{o.capacity, o.tau1, o.tau2, o.every.value_or(cake_layers{}.every),
                       o.published};
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

/// Sets the option that a policy reads under this name (see `policy_info::parameters`), as command lines and
/// configuration files have it. What a policy makes of several options together is checked when it is bound.
/// @throws std::invalid_argument for an unknown policy, a name that it does not read, a value out of range and
/// a fraction where an integer is read; the options are then as before
inline void set_parameter(policy_options& o, std::string_view policy, std::string_view name,
                          double value) {
  policy_info info{};
  std::string known, read;
  list_policies([&](policy_info const& i) {
    known += (known.empty() ? "" : ", ") + std::string(i.name);
    if (policy == i.name) info = i;
  });
  std::string const field = std::string(policy) + "." + std::string(name);
  std::string const text = detail::number_text(value);
  if (info.name == nullptr) refuse(field.c_str(), text, "policies " + known);
  parameter_info const* p = nullptr;
  for (parameter_info const& x : info.parameters) {
    read += (read.empty() ? "" : ", ") + std::string(x.name);
    if (name == x.name) p = &x;
  }
  if (p == nullptr)
    refuse(field.c_str(), text, read.empty() ? "no parameter" : "parameters " + read);
  bool const found = detail::with_parameter(o, name, [&](auto& option) {
    constexpr bool real = std::is_same_v<decltype(option), double&>;
    bool const fits = value >= p->least && value <= p->most;  // NaN does not
    if (!fits || !(real || value == std::floor(value)))
      refuse(field.c_str(), text,
             detail::number_text(p->least) + ".." + detail::number_text(p->most) +
                 (real ? "" : ", integers"));
    if constexpr (real)
      option = value;
    else
      option = static_cast<index_t>(value);
  });
  KVKEEP_EXPECTS(found, "parameter", std::string(name), "a name that with_parameter knows");
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
