// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "generate/generate.hpp"

#include <algorithm>

namespace kvkeep::generate {

namespace {

struct running {
  index_t sequence;  ///< its prompt's number
  index_t id;        ///< the engine's
  bool over = false;
};

/// Steps all sequences. `prompt_of(i)` is the prompt of sequence i < n; `next(i, logits, token)` says the
/// token to feed, or false where the sequence has ended.
template <class P, class N>
void run_batch(engine& e, std::size_t n, P const& prompt_of, N const& next,
               index_t verify_every = 0) {
  std::vector<running> live;
  std::vector<feed> batch;
  std::size_t begun = 0;
  for (index_t step = 1; begun < n || !live.empty(); ++step) {
    for (; begun < n && live.size() < static_cast<std::size_t>(e.max_sequences()); ++begun)
      live.push_back({static_cast<index_t>(begun), e.begin(prompt_of(begun))});
    batch.clear();
    for (running& r : live) {
      index_t token = 0;
      r.over = !next(r.sequence, e.logits(r.id), token);
      if (r.over)
        e.end(r.id);
      else
        batch.push_back({r.id, token});
    }
    std::erase_if(live, [](running const& r) { return r.over; });
    if (!batch.empty()) e.step(batch);
    if (verify_every > 0 && step % verify_every == 0) e.verify();
  }
}

}  // namespace

std::vector<token_list> generate(engine& e, std::span<token_list const> prompts,
                                 generation_options const& o) {
  std::vector<token_list> out(prompts.size());
  std::vector<sampler> samplers;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    sampling_options own = o.sampling;
    own.seed += i;
    samplers.emplace_back(own);
  }
  auto const next = [&](index_t sequence, std::span<float const> logits, index_t& token) {
    auto const i = static_cast<std::size_t>(sequence);
    index_t const most = o.tokens_of.empty() ? o.tokens : o.tokens_of[i];
    if (static_cast<index_t>(out[i].size()) >= most) return false;
    token = samplers[i](logits);
    if (std::find(o.end_tokens.begin(), o.end_tokens.end(), token) != o.end_tokens.end())
      return false;
    out[i].push_back(token);
    if (o.on_token) o.on_token(sequence, token);
    return static_cast<index_t>(out[i].size()) < most;  // nobody asks what follows the last one
  };
  run_batch(
      e, prompts.size(), [&](std::size_t i) { return std::span(prompts[i]); }, next,
      o.verify_every);
  return out;
}

std::vector<token_list> follow(engine& e, std::span<forced_text const> texts,
                               see_logits const& see) {
  std::vector<token_list> best(texts.size());
  auto const next = [&](index_t sequence, std::span<float const> logits, index_t& token) {
    auto const i = static_cast<std::size_t>(sequence);
    token_list const& response = texts[i].response;
    if (best[i].size() == response.size()) return false;
    if (see) see(sequence, static_cast<index_t>(best[i].size()), logits);
    token = response[best[i].size()];
    best[i].push_back(best_token(logits));
    return best[i].size() < response.size();
  };
  run_batch(
      e, texts.size(), [&](std::size_t i) { return std::span(texts[i].prompt); }, next);
  return best;
}

}  // namespace kvkeep::generate
