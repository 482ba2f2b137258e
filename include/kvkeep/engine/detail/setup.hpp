// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Session set-up: checks, sizes, memory.
#pragma once

#include <algorithm>
#include <string>

#include "../session.hpp"
#include "bind_checks.hpp"

namespace kvkeep {

template <backend Ctx, class P, class D>
void session<Ctx, P, D>::check_setup(std::span<layer_spec<space> const> layers) const {
  KVKEEP_EXPECTS(!layers_.empty(), "layers", layers.size(), "at least one that is not skipped");
  detail::check_layers(layers_);
  auto const n = static_cast<index_t>(layers_.size());
  check_policy(prompt_, n, layers_[0].kv.shape);
  check_policy(decode_, n, layers_[0].kv.shape);
  detail::check_evidence(prompt_, decode_, one_policy_, layers_, limits_);
  detail::check_pair(prompt_, decode_, one_policy_, layers_, limits_);
  detail::check_slots(prompt_, decode_, layers_, limits_);
}

template <backend Ctx, class P, class D>
void session<Ctx, P, D>::plan_state() {
  cache_shape cache = layers_[0].kv.shape;
  for (auto const& l : layers_) cache.max_slots = std::max(cache.max_slots, l.kv.shape.max_slots);
  shape_.cache = cache;
  shape_.n_sequences = limits_.max_sequences;
  shape_.max_prompt = limits_.max_prompt;
  shape_.drafts = std::max(1, limits_.max_draft);
  detail::bound_rows const bound = detail::plan_rows(prompt_, decode_, one_policy_, limits_, cache);
  shape_.rows = bound.rows;
  attention_folds_ = bound.attention_folds;
  cache_demand d{shape_.cache, static_cast<index_t>(layers_.size()), -1, limits_};
  d.longest_prompt = limits_.max_prompt;
  slots_needed_ = kvkeep::slots_needed(prompt_, decode_, d);
}

template <backend Ctx, class P, class D>
void session<Ctx, P, D>::carve(workspace& w) {
  auto const n_layers = static_cast<index_t>(layers_.size());
  for (auto& l : layers_) {
    detail::state_shape s = shape_;
    s.cache = l.kv.shape;
    detail::carve_layer(w, l, s);
  }
  bool const scores = prompt_.budget.traits().needs_scores;
  bool const wide = prompt_.width() == scope::sequence || decode_.width() == scope::sequence;
  detail::carve_shared(w, shared_, shape_, n_layers, scores ? n_layers : 0,
                       wide ? limits_.max_batch : 0);
  bool const whole = !prompt_.select.traits().moves_tokens || !decode_.select.traits().moves_tokens;
  detail::carve_plan(w, plan_, layers_, shape_, limits_.engine_commits ? limits_.max_batch : 0,
                     whole);
}

/// Binds policies to the layers of a model. @see session
/// @param layers  one entry per layer; views of the pool that all sequences share
/// @param memory  `session_bytes` bytes in the backend's memory space, or empty: allocated here (host)
/// @throws std::invalid_argument naming field, value and allowed range
template <backend Ctx, policy_on<Ctx> P, policy_on<Ctx> D>
session<Ctx, P, D> bind_session(Ctx& ctx, P const& prompt, D const& decode,
                                std::span<layer_spec<space_of<Ctx>> const> layers,
                                limits const& lim, std::span<std::byte> memory = {}) {
  session<Ctx, P, D> s(ctx, prompt, decode, layers, lim);
  s.place(memory);
  return s;
}

/// One policy for the prompt and for decoding.
template <backend Ctx, policy_on<Ctx> P>
session<Ctx, P, P> bind_session(Ctx& ctx, P const& policy,
                                std::span<layer_spec<space_of<Ctx>> const> layers,
                                limits const& lim, std::span<std::byte> memory = {}) {
  return bind_session(ctx, policy, policy, layers, lim, memory);
}

/// Bytes of memory that `bind_session` with the same arguments needs.
template <backend Ctx, policy_on<Ctx> P, policy_on<Ctx> D>
std::size_t session_bytes(Ctx& ctx, P const& prompt, D const& decode,
                          std::span<layer_spec<space_of<Ctx>> const> layers, limits const& lim) {
  return session<Ctx, P, D>(ctx, prompt, decode, layers, lim).bytes();
}

template <backend Ctx, class P, class D>
session<Ctx, P, D>::session(Ctx& ctx, P const& p, D const& d,
                            std::span<layer_spec<space> const> layers, limits const& lim)
    : ctx_(&ctx), prompt_(p), decode_(d), limits_(lim) {
  if (limits_.max_batch == 0) limits_.max_batch = limits_.max_sequences;
  detail::check_limits(limits_);  // first: sizes are computed from them
  if constexpr (std::is_same_v<P, D>) one_policy_ = p.key() == d.key();
  n_all_layers_ = static_cast<index_t>(layers.size());
  for (auto const& spec : layers) {
    bool const skip = spec.skip;
    number_of_.push_back(skip ? -1 : static_cast<index_t>(layers_.size()));
    if (skip) continue;
    layer_data l;
    l.kv = spec.kv;
    l.spec = static_cast<index_t>(number_of_.size()) - 1;
    l.number = number_of_.back();
    layers_.push_back(l);
  }
  if (!layers_.empty()) {
    check_shape(layers_[0].kv.shape);
    check_policy(prompt_, static_cast<index_t>(layers_.size()), layers_[0].kv.shape);
    plan_state();
  }
  check_setup(layers);
  workspace counting;
  carve(counting);
  state_bytes_ = counting.peak() + workspace::alignment;
  measure();
}

}  // namespace kvkeep

#include "common.hpp"
