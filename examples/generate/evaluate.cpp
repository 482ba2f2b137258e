// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "generate/evaluate.hpp"

#include <algorithm>

namespace kvkeep::generate {

namespace {

engine_options sized(std::span<episode const> episodes, evaluation_options const& o) {
  engine_options e = o.engine;
  index_t response = 1;
  for (episode const& x : episodes) {
    e.max_prompt = std::max(e.max_prompt, static_cast<index_t>(x.prompt.size()));
    response = std::max(response, static_cast<index_t>(x.response.size()));
  }
  e.max_tokens = std::max(e.max_tokens, e.max_prompt + response + (o.forced ? 0 : o.slack));
  return e;
}

/// The bound of each text is its own reference's length.
std::vector<token_list> write_freely(engine& e, std::span<episode const> episodes,
                                     evaluation_options const& o) {
  std::vector<token_list> prompts;
  generation_options g;
  g.end_tokens = o.end_tokens;
  for (episode const& x : episodes) {
    prompts.push_back(x.prompt);
    g.tokens_of.push_back(static_cast<index_t>(x.response.size()) + o.slack);
  }
  return generate(e, prompts, g);
}

}  // namespace

evaluation evaluate(runtime& rt, model const& m, policy_pair const& policies,
                    std::span<episode const> episodes, evaluation_options const& o) {
  engine e(rt, m, policies, sized(episodes, o));
  evaluation r;
  if (o.forced) {
    std::vector<forced_text> texts;
    for (episode const& x : episodes) texts.push_back({x.prompt, x.response});
    r.tokens = follow(e, texts, o.see);
  } else {
    r.tokens = write_freely(e, episodes, o);
  }
  for (std::size_t i = 0; i < episodes.size(); ++i) {
    auto& held = r.held.emplace_back();
    for (episode_check const& c : episodes[i].checks)
      held.push_back(o.forced ? holds_forced(episodes[i], c, r.tokens[i])
                              : holds_freely(episodes[i], c, r.tokens[i]));
  }
  r.usage = e.usage();
  return r;
}

void check_evaluation(runtime& rt, model const& m, policy_pair const& policies,
                      std::span<episode const> episodes, evaluation_options const& o) {
  engine const e(rt, m, policies, sized(episodes, o));
}

}  // namespace kvkeep::generate
