// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "generate/engine.hpp"

#include <algorithm>

#include "generate/engine_state.hpp"

namespace kvkeep::generate {

using detail::expect;
using detail::stopwatch;

double engine_usage::eviction() const {
  double const alone = sampled_attend > 0 ? std::min(1.0, sampled_plain / sampled_attend) : 1.0;
  return observe + end_prompt + append + confirm + attend * (1 - alone);
}

engine::engine(runtime& rt, model const& m, policy_pair const& policies, engine_options const& o)
    : s_(std::make_unique<state>(rt, m, policies, o)) {}
engine::~engine() = default;

index_t engine::begin(std::span<index_t const> prompt) {
  if (prompt.empty()) throw std::invalid_argument("prompt: 0 tokens: expected at least 1");
  for (index_t const t : prompt) s_->check_token(t);
  auto const chunked = std::min(prompt.size(), static_cast<std::size_t>(s_->options.max_prompt));
  if (chunked < prompt.size() && !s_->evicts)
    throw std::invalid_argument("prompt: " + std::to_string(prompt.size()) +
                                " tokens: expected at most " + std::to_string(chunked) +
                                " without eviction while decoding");
  index_t id = -1;
  expect(s_->kv.begin(id), "begin");
  s_->live[static_cast<std::size_t>(id)] = true;
  try {
    {
      stopwatch const time(s_->usage.prefill);
      s_->prefill(id, prompt.first(chunked));
    }
    if (s_->options.observer != nullptr) s_->options.observer->on_confirmed({&id, 1});
    for (index_t const t : prompt.subspan(chunked)) {
      feed const one{id, t};
      step({&one, 1});
    }
  } catch (...) {
    end(id);
    throw;
  }
  return id;
}

void engine::step(std::span<feed const> tokens) { s_->step(tokens); }

void engine::end(index_t id) {
  s_->check_alive(id);
  expect(s_->kv.end(id), "end");
  s_->live[static_cast<std::size_t>(id)] = false;
  for (index_t l = 0; l < s_->config.n_layers; ++l) s_->cache.resize(l, id, 0);
}

std::span<float const> engine::logits(index_t id) const {
  s_->check_alive(id);
  return {s_->logits_of(id), static_cast<std::size_t>(s_->config.vocabulary)};
}

index_t engine::tokens(index_t id) const {
  s_->check_alive(id);
  return s_->kv.tokens(id);
}

std::vector<index_t> engine::positions(index_t id, index_t layer, index_t kv_head) const {
  s_->check_alive(id);
  auto const n = s_->kv.lengths(layer)(id, kv_head);
  index_t const* const first = s_->kv.positions(layer).at(id, kv_head);
  std::vector<index_t> list(first, first + n);
  if (index_t const free = s_->kv.free_slots(layer)(id, kv_head); free >= 0)
    list[static_cast<std::size_t>(free)] = -1;
  return list;
}

void engine::verify() const { expect(s_->kv.verify(), "verify"); }

engine_usage engine::usage() const {
  engine_usage u = s_->usage;
  u.count = s_->kv.count();
  u.peak_blocks = s_->cache.peak_blocks();
  u.block_bytes = s_->cache.block_bytes();
  return u;
}

index_t engine::slots_per_head() const { return s_->cache.shape().max_slots; }
index_t engine::max_sequences() const { return s_->options.max_sequences; }

}  // namespace kvkeep::generate
