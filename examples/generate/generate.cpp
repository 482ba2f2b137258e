// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "generate/generate.hpp"

#include <algorithm>

namespace kvkeep::generate {

namespace {

struct running {
  index_t sequence;  ///< its prompt's number
  index_t id;        ///< the engine's
  sampler next;
};

}  // namespace

std::vector<std::vector<index_t>> generate(engine& e, std::span<std::vector<index_t> const> prompts,
                                           generation_options const& o) {
  std::vector<std::vector<index_t>> out(prompts.size());
  std::vector<running> live;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    sampling_options own = o.sampling;
    own.seed += i;
    live.push_back({static_cast<index_t>(i), e.begin(prompts[i]), sampler(own)});
  }
  std::vector<feed> batch;
  for (index_t step = 1; !live.empty(); ++step) {
    batch.clear();
    std::vector<running> going;
    for (running& r : live) {
      auto& tokens = out[static_cast<std::size_t>(r.sequence)];
      index_t const token = r.next(e.logits(r.id));
      bool const over =
          std::find(o.end_tokens.begin(), o.end_tokens.end(), token) != o.end_tokens.end();
      if (!over && o.tokens > 0) {
        tokens.push_back(token);
        if (o.on_token) o.on_token(r.sequence, token);
      }
      if (over || static_cast<index_t>(tokens.size()) >= o.tokens) {
        e.end(r.id);
        continue;
      }
      batch.push_back({r.id, token});
      going.push_back(std::move(r));
    }
    live = std::move(going);
    if (!batch.empty()) e.step(batch);
    if (o.verify_every > 0 && step % o.verify_every == 0) e.verify();
  }
  return out;
}

std::vector<index_t> follow(engine& e, std::span<index_t const> prompt,
                            std::span<index_t const> response,
                            std::function<void(index_t, std::span<float const>)> const& on_logits) {
  index_t const id = e.begin(prompt);
  std::vector<index_t> choices;
  for (std::size_t i = 0; i < response.size(); ++i) {
    if (on_logits) on_logits(static_cast<index_t>(i), e.logits(id));
    choices.push_back(best_token(e.logits(id)));
    feed const next{id, response[i]};
    if (i + 1 < response.size()) e.step({&next, 1});
  }
  e.end(id);
  return choices;
}

}  // namespace kvkeep::generate
