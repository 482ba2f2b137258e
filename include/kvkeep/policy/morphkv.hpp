// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// MorphKV: constant size at every decode step, by what the recent queries attend to.
#pragma once

#include <optional>

#include "../score/recent_fused.hpp"
#include "policy.hpp"

namespace kvkeep {

/// Spec 4.3; arXiv 2503.00979, ghadiaravi13/MorphKV patch_{mistral,qwen2,phi3,llama}.py, morph_cache.py.
/// Keeps the W newest tokens, the C - W best old ones, and the current one: C + 1 slots.
/// The decision for a token depends only on queries before it, so it is taken when the token before it
/// has been attended to, and the new token takes the victim's slot at once.
/// Victims are exact in every evaluation (see morph_rows); without a choice the cheapest is taken.
/// Canonical choices and deviations:
/// - every query head of a group attends to exactly the kept set (`per_head_mask` = the published form);
/// - group maximum of per-head softmax rows (the llama file sums raw logits, and under GQA prunes its rows
///   by another mask than K and V; with n_rows = W and one head per group it equals ours);
/// - n_rows = W - 1 as in mistral, qwen2 and phi3; `include_current` adds the current row;
/// - burst threshold computed once as an integer, ceil((1 + C) x) (the llama-free files crash there);
/// - a prompt shorter than the window keeps its rows; without rows the most recent tokens stay;
/// - sequences of a batch are independent (the published code asserts batch 1).
template <class Budget = uniform>
using morph_policy = policy<recent_fused_score, Budget>;
using morphkv = morph_policy<>;

struct morphkv_options {
  index_t capacity = 1024;            ///< C; C + 1 slots with the current token
  index_t window = 32;                ///< W
  reduction fusion = reduction::sum;  ///< sum_fused or max_fused
  double evict_after = 1;             ///< burst factor x >= 1
  index_t n_rows = 0;                 ///< 0: W - 1
  bool include_current = false;
  bool per_head_mask = false;
  std::optional<morph_rows> evaluation{};  ///< none: the cheapest that serves the other options
};

/// The fastest form: decisions with the token's own query are direct, bursts score all slots, from cached
/// rows; else bounds, which last eight steps.
inline morph_rows cheapest_rows(morphkv_options const& o) {
  if (o.include_current || o.per_head_mask) return morph_rows::direct;
  index_t const rows = o.n_rows > 0 ? o.n_rows : o.window - 1;
  bool const one_leaves = o.evict_after == 1 && o.window >= lazy_shape::ahead;
  return one_leaves && rows <= lazy_shape::most_rows ? morph_rows::lazy : morph_rows::cached;
}

inline morphkv make_morphkv(morphkv_options const& o) {
  recent_fused_score s;
  s.window = o.window;
  s.n_rows = o.n_rows;
  s.fusion = o.fusion;
  s.evaluation = o.evaluation.value_or(cheapest_rows(o));
  cadence when;
  when.evict_after = o.evict_after;
  when.before_attention = o.include_current;
  when.per_head_mask = o.per_head_mask;
  return {"morphkv", s, {o.capacity}, {}, {0, o.window}, scope::head, when};
}

}  // namespace kvkeep
