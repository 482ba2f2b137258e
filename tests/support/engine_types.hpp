// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// What the test engine is told and what it shows.
#pragma once

#include <ostream>
#include <string>

#include <kvkeep/engine/policy_table.hpp>
#include <kvkeep/kvkeep.hpp>

#include "text.hpp"

namespace kvkeep {

inline std::ostream& operator<<(std::ostream& out, status s) { return out << to_string(s); }

namespace test {

using any = any_policy<cpu::context>;
using any_session = session<cpu::context, any, any>;

inline any make(std::string_view name, policy_options const& o = {}) {
  return make_policy<cpu::context>(name, o);
}

struct engine_options {
  cache_options cache{};  ///< of every layer
  index_t n_layers = 1;
  std::vector<index_t> slots{};  ///< max_slots per layer, where they differ
  std::vector<bool> skip{};      ///< layers that the session leaves alone
  limits lim{};
  cpu::context* ctx = nullptr;  ///< null: one thread
};

/// Of a cache for one transient prompt: row 1 has it.
inline cache_options prompt_cache(engine_options const& o) {
  cache_options c = o.cache;
  c.shape.n_seq = 2;
  c.shape.max_slots = o.lim.max_prompt;
  c.capacities.clear();
  return c;
}

struct token_record {
  oracle::kept_sets appended;  ///< live positions per head when the token has its slot
  oracle::kept_sets done;      ///< after confirm
  std::vector<float> out;      ///< [q_head, dim_v]
};

/// One sequence of the engine.
struct stream {
  text const* words = nullptr;
  index_t id = -1, row = 0;
  index_t tokens = 0;  ///< appended
};

/// The newest tokens' keys and values in one layer, times `factor`, `[entry, kv_head, dim]`.
inline test_cache new_rows(std::vector<stream*> const& who, index_t l, cache_shape shape,
                           dtype type, float factor = 1) {
  shape.n_seq = oracle::count(who);
  shape.max_slots = 1;
  test_cache rows = test_cache::make(layout_id::hnd, type, shape);
  auto const times = [&](auto const& x) {
    std::vector<float> y;
    for (double e : x) y.push_back(factor * static_cast<float>(e));
    return y;
  };
  for (index_t i = 0; i < shape.n_seq; ++i)
    for (index_t h = 0; h < shape.n_kv_heads; ++h) {
      auto const& words = who[uz(i)]->words->layer[uz(l)];
      rows.set_k(i, h, 0, times(words.k.row(h, who[uz(i)]->tokens)));
      rows.set_v(i, h, 0, times(words.v.row(h, who[uz(i)]->tokens)));
    }
  return rows;
}
/// Rows of a cache of one slot, as a session takes them.
inline token_kv token_of(kv_ref<> const& rows, float scale = 1) {
  auto const one = [&](plane_ref<> const& p) {
    return head_vectors{p.data, p.type, p.layout.strided.seq_stride, p.layout.strided.head_stride,
                        scale};
  };
  return {one(rows.k), one(rows.v)};
}

/// How a prompt reaches the session.
struct prompt_options {
  std::vector<index_t> chunks{};  ///< tokens per observe; empty: one chunk
  bool lse = false;
  bool queries = true;
  index_t last_rows = -1;  ///< >= 0: only so many queries of each chunk
  log_base base = log_base::natural;
};

}  // namespace test
}  // namespace kvkeep
