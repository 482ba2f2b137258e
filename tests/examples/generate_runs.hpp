// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Runs of the engine on random prompts, computed in one way or another.
#pragma once

#include <algorithm>

#include "generate/generate.hpp"
#include "generate_models.hpp"

namespace kvkeep::test {

using generate::engine;
using generate::engine_options;
using generate::feed;
using generate::model;
using generate::policy_request;
using ids = std::vector<index_t>;

inline ids random_prompt(std::uint64_t seed, index_t n) {
  random_floats r{seed};
  ids p;
  for (index_t i = 0; i < n; ++i) p.push_back(static_cast<index_t>((r() + 1) / 2 * 60.99F));
  return p;
}

inline policy_request with(std::string const& policy, index_t capacity) {
  policy_request r;
  r.policy = policy;
  r.capacity = capacity;
  return r;
}

/// A way to compute that may not change a token.
struct way {
  layout_kind layout = layout_kind::strided;
  int threads = 1;
  index_t chunk = 64;
  index_t batch = 1;  ///< sequences that share the steps, the first one counts
  bool in_place = false;
};

/// Prompts of the others differ in length.
inline std::vector<ids> batch_of(ids const& prompt, index_t n) {
  std::vector<ids> list{prompt};
  for (index_t i = 1; i < n; ++i)
    list.push_back(random_prompt(static_cast<std::uint64_t>(100 + i), 7 * i + 3));
  return list;
}

inline engine_options options_of(way const& w, std::vector<ids> const& prompts, index_t tokens) {
  engine_options o;
  o.layout = {w.layout, 4};
  o.chunk = w.chunk;
  o.in_place = w.in_place;
  o.max_sequences = static_cast<index_t>(prompts.size());
  for (ids const& p : prompts)
    o.max_prompt = std::max(o.max_prompt, static_cast<index_t>(p.size()));
  o.max_tokens = o.max_prompt + tokens;
  o.sample_every = 5;
  return o;
}

inline ids written(model const& m, policy_request const& r, ids const& prompt, index_t tokens,
                   way const& w = {}) {
  auto const prompts = batch_of(prompt, w.batch);
  generate::runtime rt(w.threads);
  engine e(rt, m, generate::make_policies(r), options_of(w, prompts, tokens));
  generate::generation_options g;
  g.tokens = tokens;
  g.verify_every = 3;
  return generate::generate(e, prompts, g)[0];
}

}  // namespace kvkeep::test
