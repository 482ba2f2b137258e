// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "contestants.hpp"

#include <algorithm>
#include <string_view>

#include "support/random_policy.hpp"

namespace kvkeep::demo {

namespace {

/// One rule for all: a window of a quarter of the budget where a policy has one (H2O: half, as in
/// its paper), four sinks where sinks are the policy's idea, and otherwise the table's defaults.
policy_options options(policy_info const& info, index_t budget) {
  policy_options o;
  o.capacity = budget - 1;  // and the current token
  o.make_room_first = false;
  o.lag = budget / 4;
  std::string_view const name = info.name;
  index_t const window = name == "h2o" ? budget / 2 : budget / 4;
  for (parameter_info const& p : info.parameters)
    if (std::string_view(p.name) == "window")
      o.window = static_cast<index_t>(std::clamp(static_cast<double>(window), p.least, p.most));
  o.rotation.interleaved = true;  // of the Llama models that traces are recorded from
  return o;
}

any morphkv_of(index_t budget, std::string_view how) {
  policy_options o;
  o.capacity = budget - 1;
  o.window = budget / 4;
  o.budget = how;
  return make_policy<cpu::context>("morphkv", o);
}

/// Slots of the longest head: the most that the prompt or decoding leaves, and the current token.
index_t slots_of(contestant const& c, trace const& t) {
  if (!c.evicts) return t.tokens;
  auto const most = [&](any const& p) {
    return p.budget.most(t.n_layers(), t.shape(t.tokens), p.keep.sinks + p.keep.recent, t.prompt());
  };
  return std::min(t.tokens, std::max(most(c.prompt), most(c.decode)) + 1);
}

}  // namespace

std::vector<contestant> make_contestants(trace const& t, index_t budget) {
  std::vector<contestant> list;
  list_policies([&](policy_info const& info) {
    policy_options o = options(info, budget);
    contestant c;
    c.name = info.name;
    c.prompt = c.decode = make_policy<cpu::context>(info.name, o);
    c.evicts = info.at_prompt || info.at_decode;
    if (info.at_prompt && !info.at_decode) {
      auto const b = c.prompt.budget.traits();
      c.name += ", then morphkv";
      bool const uneven = b.varies_over_layers || b.varies_over_heads;
      c.decode = morphkv_of(budget, uneven ? "inherit" : "");
    }
    list.push_back(c);
    if (c.name != "morphkv") return;
    o.evaluation = morph_rows::direct;
    c.name = "morphkv, recomputed";
    c.prompt = c.decode = make_policy<cpu::context>(info.name, o);
    list.push_back(c);
    o.evaluation.reset();
    o.fusion = reduction::max;
    c.name = "morphkv, max-fused";
    c.prompt = c.decode = make_policy<cpu::context>(info.name, o);
    list.push_back(c);
  });
  contestant c;
  c.name = "random (baseline)";
  c.prompt = c.decode = erase_policy<cpu::context>(tools::make_random(budget - 1, budget / 4));
  c.random = true;
  list.push_back(c);
  for (auto& each : list) each.max_slots = slots_of(each, t);
  return list;
}

}  // namespace kvkeep::demo
