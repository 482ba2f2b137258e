// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "generate/policies.hpp"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string_view>

namespace kvkeep::generate {

namespace {

bool cuts(any const& p) { return p.score.least_tokens() != std::numeric_limits<index_t>::max(); }

policy_info find(std::string const& name) {
  policy_info found{};
  std::string known;
  list_policies([&](policy_info const& info) {
    known += (known.empty() ? "" : ", ") + std::string(info.name);
    if (name == info.name) found = info;
  });
  if (found.name == nullptr)
    throw std::invalid_argument("--policy: " + name + ": expected " + known +
                                ", or two joined by +");
  return found;
}

parameter_info const* parameter(policy_info const& info, std::string_view name) {
  auto const it = std::find_if(info.parameters.begin(), info.parameters.end(),
                               [&](parameter_info const& p) { return name == p.name; });
  return it == info.parameters.end() ? nullptr : &*it;
}

/// An option of the user's is refused where no policy of the pair reads it.
void check_used(policy_request const& r, std::vector<policy_info> const& list) {
  auto const used = [&](bool given, char const* option, std::string_view name) {
    bool const read = std::any_of(list.begin(), list.end(), [&](policy_info const& i) {
      return name == "morphkv" ? name == i.name : parameter(i, name) != nullptr;
    });
    if (given && !read)
      throw std::invalid_argument(std::string(option) + ": " + r.policy + " has no such parameter");
  };
  used(r.window.has_value(), "--window", "window");
  used(r.sinks.has_value(), "--sinks", "sinks");
  used(r.evict_after.has_value(), "--evict-after", "evict_after");
  used(r.fusion.has_value(), "--fusion", "morphkv");
  used(r.rows.has_value(), "--morph-rows", "morphkv");
}

/// Sets a number of an option, unless only the other policy of a pair reads it. Refusals begin with the option.
void set_number(policy_options& o, policy_info const& info, std::string const& option,
                char const* name, std::optional<double> value) {
  if (!value || parameter(info, name) == nullptr) return;
  try {
    set_parameter(o, info.name, name, *value);
  } catch (std::invalid_argument const& e) {
    throw std::invalid_argument(option + ": " + e.what());
  }
}

/// The tables' defaults fit large models; these follow the capacity.
policy_options options(policy_info const& info, policy_request const& r) {
  policy_options o;
  std::string_view const name = info.name;
  o.capacity = r.capacity;
  o.lag = std::max(1, r.capacity / 4);
  o.rotation.theta = r.rope_base;
  o.rotation.interleaved = true;
  o.fusion = r.fusion.value_or(reduction::sum);
  o.evaluation = r.rows;
  o.per = r.granularity;
  index_t const usual = name == "h2o" ? r.capacity / 2 : std::min(32, r.capacity / 4);
  if (parameter_info const* const p = parameter(info, "window"); p != nullptr)
    o.window = static_cast<index_t>(std::clamp<double>(usual, p->least, p->most));
  set_number(o, info, "--window", "window", r.window);
  set_number(o, info, "--sinks", "sinks", r.sinks);
  set_number(o, info, "--evict-after", "evict_after", r.evict_after);
  return o;
}

}  // namespace

bool policy_pair::cuts_prompt() const { return cuts(prompt); }
bool policy_pair::cuts_decode() const { return cuts(decode) && decode.score.traits().at_decode; }
bool policy_pair::joins_layers() const {
  return prompt.width() == scope::sequence || decode.width() == scope::sequence;
}

namespace {

/// The decode policy beside another one for the prompt. What that gave unevenly to layers or heads stays so.
any decode_policy(policy_info const& info, policy_request const& r, any const& prompt) {
  if (!info.at_decode && std::string_view(info.name) != "fullkv")
    throw std::invalid_argument("--policy: " + std::string(info.name) +
                                ": cuts prompts only, expected a policy that cuts while decoding");
  auto const given = prompt.budget.traits();
  bool const uneven = given.varies_over_layers || given.varies_over_heads;
  policy_options o = options(info, r);
  o.budget = uneven ? "inherit" : "";
  return make_policy<cpu::context>(info.name, o);
}

/// A session would refuse it too, but in its own terms.
void check_guarded(policy_request const& r, any const& p) {
  offset_t const guarded = offset_t{p.keep.sinks} + p.keep.recent;
  if (!cuts(p) || r.capacity > guarded) return;
  throw std::invalid_argument("--budget: " + (r.budget.empty() ? "" : r.budget + " = ") +
                              std::to_string(r.capacity) +
                              ": expected more than sinks + window = " + std::to_string(guarded));
}

}  // namespace

policy_pair make_policies(policy_request const& r) {
  if (r.capacity < 1)
    throw std::invalid_argument("--budget: " + std::to_string(r.capacity) +
                                ": expected at least 1");
  std::size_t const plus = r.policy.find('+');
  policy_info const first = find(r.policy.substr(0, plus));
  policy_info const second = plus == std::string::npos ? first : find(r.policy.substr(plus + 1));
  check_used(r, {first, second});
  if (!r.layer_budget.empty() && !first.at_prompt)
    throw std::invalid_argument("--layer-budget: " + r.layer_budget +
                                ": expected a policy that cuts " + "prompts, not " + first.name);
  policy_options o = options(first, r);
  o.budget = r.layer_budget;
  policy_pair p;
  p.name = r.policy;
  p.prompt = p.decode = make_policy<cpu::context>(first.name, o);
  if (plus != std::string::npos) p.decode = decode_policy(second, r, p.prompt);
  for (any const& each : {p.prompt, p.decode}) check_guarded(r, each);
  return p;
}

}  // namespace kvkeep::generate
