// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Ready-made engines for the tests of a session's contracts.
#pragma once

#include "decode_reference.hpp"

namespace kvkeep::test {

/// Sizes of a small session.
struct world {
  cache_shape shape{3, 4, 2, 8, 6, 0};
  index_t n_layers = 2;
  index_t prompt = 27;
  index_t n_tokens = 90;  ///< of each text
  layout_id layout = layout_id::hnd;
  dtype type = dtype::f32;
  index_t draft = 0;
  std::uint64_t seed = 5;
  limits lim{};

  text words(std::uint64_t salt = 0) const {
    generator g(seed + salt);
    return make_text(g, shape, n_layers, n_tokens, type);
  }
  engine_options options(any const& p, index_t slots = 0) const {
    engine_options o;
    o.cache.layout = layout;
    o.cache.type = type;
    o.cache.shape = shape;
    o.cache.shape.max_slots =
        slots > 0 ? slots
                  : std::max(prompt, detail::decode_slots(p.budget.capacity(), p.when)) + 4 + draft;
    o.n_layers = n_layers;
    o.lim = lim;
    o.lim.max_draft = draft;
    return o;
  }
};

/// Ways to work with a session, besides what `lim` says.
inline std::vector<limits> all_ways(limits const& lim, index_t max_prompt) {
  std::vector<limits> all(7, lim);
  all[1].max_draft = 3;
  all[2].decode = decode_offer::attention_rows;
  all[3].decode = decode_offer::nothing;
  all[4].engine_commits = true;
  all[5].max_prompt = max_prompt;
  all[6].engine_commits = true;
  all[6].max_draft = 3;
  return all;
}

/// The token saw the same cache and left the same one.
inline void require_same(token_record const& a, token_record const& b, bool bits = true) {
  REQUIRE(a.appended == b.appended);
  REQUIRE(a.done == b.done);
  REQUIRE(a.out.size() == b.out.size());
  for (std::size_t i = 0; i < a.out.size(); ++i) {
    if (bits)
      REQUIRE(a.out[i] == b.out[i]);
    else
      REQUIRE(std::abs(a.out[i] - b.out[i]) <= 2e-5F + 1e-4F * std::abs(b.out[i]));
  }
}
inline void require_same(std::vector<token_record> const& a, std::vector<token_record> const& b,
                         bool bits = true) {
  REQUIRE(a.size() == b.size());
  for (std::size_t i = 0; i < a.size(); ++i) require_same(a[i], b[i], bits);
}

/// Whether a case may run with drafts, transient prompts and plans of the engine.
inline bool is_plain(decode_case const& c) {
  return !c.policy.when.before_attention && !c.policy.when.per_head_mask;
}

}  // namespace kvkeep::test
