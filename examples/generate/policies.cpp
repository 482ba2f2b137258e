// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "generate/policies.hpp"

#include <algorithm>
#include <cmath>
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
      return name == "fusion" ? std::string_view(i.name) == "morphkv"
                              : parameter(i, name) != nullptr;
    });
    if (given && !read)
      throw std::invalid_argument(std::string(option) + ": " + r.policy + " has no such parameter");
  };
  used(r.window.has_value(), "--window", "window");
  used(r.sinks.has_value(), "--sinks", "sinks");
  used(r.evict_after.has_value(), "--evict-after", "evict_after");
  used(r.fusion.has_value(), "--fusion", "fusion");
}

/// The tables' defaults fit large models; these follow the capacity.
policy_options options(policy_info const& info, policy_request const& r) {
  policy_options o;
  std::string_view const name = info.name;
  o.capacity = r.capacity;
  o.lag = std::max(1, r.capacity / 4);
  o.sinks = r.sinks.value_or(name == "streamingllm" || name == "lagkv" ? 4 : 0);
  o.fusion = r.fusion.value_or(reduction::sum);
  o.evict_after = r.evict_after.value_or(1.0);
  o.per = r.granularity;
  index_t const usual = name == "h2o" ? r.capacity / 2 : std::min(32, r.capacity / 4);
  if (parameter_info const* const p = parameter(info, "window"); p != nullptr) {
    o.window =
        r.window.value_or(static_cast<index_t>(std::clamp<double>(usual, p->least, p->most)));
    if (o.window < p->least || o.window > p->most)
      throw std::invalid_argument("--window: " + std::to_string(o.window) + ": expected " +
                                  std::to_string(static_cast<index_t>(p->least)) + ".." +
                                  std::to_string(static_cast<index_t>(p->most)) + " for " +
                                  info.name);
  }
  return o;
}

}  // namespace

bool policy_pair::cuts_prompt() const { return cuts(prompt); }
bool policy_pair::cuts_decode() const { return cuts(decode) && decode.score.traits().at_decode; }
bool policy_pair::joins_layers() const {
  return prompt.width() == scope::sequence || decode.width() == scope::sequence;
}

policy_pair make_policies(policy_request const& r) {
  if (r.capacity < 1)
    throw std::invalid_argument("--budget: " + std::to_string(r.capacity) +
                                ": expected at least 1");
  std::size_t const plus = r.policy.find('+');
  policy_info const first = find(r.policy.substr(0, plus));
  policy_info const second = plus == std::string::npos ? first : find(r.policy.substr(plus + 1));
  check_used(r, {first, second});
  policy_options o = options(first, r);
  o.budget = r.layer_budget;
  policy_pair p;
  p.name = r.policy;
  p.prompt = p.decode = make_policy<cpu::context>(first.name, o);
  if (plus == std::string::npos) return p;
  if (!second.at_decode && std::string_view(second.name) != "fullkv")
    throw std::invalid_argument("--policy: " + std::string(second.name) +
                                ": cuts prompts only, expected a policy that cuts while decoding");
  // What a prompt's policy gave unevenly to layers or heads stays so.
  auto const given = p.prompt.budget.traits();
  policy_options d = options(second, r);
  d.budget = given.varies_over_layers || given.varies_over_heads ? "inherit" : "";
  p.decode = make_policy<cpu::context>(second.name, d);
  return p;
}

/// DESIGN, contract 6: C + 1 slots, bursts max(C + 1, ceil((1 + C) x)).
index_t slots_needed(policy_pair const& p, cache_shape const& shape, index_t n_layers,
                     sequence_bounds const& b) {
  auto const most = [&](any const& policy) {
    return policy.budget.most(n_layers, shape, policy.keep.sinks + policy.keep.recent,
                              b.max_prompt);
  };
  index_t const kept = std::max(most(p.prompt), p.prompt.budget.capacity());
  index_t const prompt = p.cuts_prompt() && !b.in_place ? kept : b.max_prompt;
  if (!p.cuts_decode()) return std::max(b.max_tokens, prompt);
  auto const& when = p.decode.when;
  double const held = p.decode.budget.traits().inherits ? kept : most(p.decode);
  double const burst = std::max(held + 1, std::ceil((1 + held) * when.evict_after));
  if (burst > most_tokens)
    throw std::invalid_argument("--budget: " + std::to_string(p.decode.budget.capacity()) +
                                ": expected at most " + std::to_string(most_tokens));
  index_t const decode = static_cast<index_t>(burst) - when.room;
  return std::max({decode, prompt, 1});
}

}  // namespace kvkeep::generate
