// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Runs a recorded prompt and its decoded tokens through a backend's session and writes down what is cached.
#pragma once

#include <bit>

#include "prompt_on.hpp"
#include "support/watched_score.hpp"

namespace kvkeep::replay {

/// The backend's arrays are memory that the host reads too, once it has waited.
template <class To, class From>
To for_host(From const& x) {
  return std::bit_cast<To>(x);
}

/// `p` with the hooks of a trace.
template <class B>
policy_on_machine<B> watch_on(B& machine, policy_on_machine<B> const& p, trace_hooks const& hooks) {
  using space = space_on<B>;
  if (!hooks.scored && !hooks.settled) return p;
  tools::watched_score_on<typename B::context> see;
  if (hooks.scored)
    see.scored = [&](score_input<space> const& in, score_map<space> out) {
      machine.wait();
      hooks.scored(for_host<score_input<>>(in), for_host<score_map<>>(out));
    };
  if (hooks.settled)
    see.settled = [&](score_input<space> const& in) { hooks.settled(for_host<score_input<>>(in)); };
  return tools::watch(p, see);
}

/// One run: the session, its cache, and the log.
template <class B>
class tracer {
 public:
  using space = space_on<B>;

  tracer(B& machine, policy_on_machine<B> const& policy, trace_data const& t,
         trace_options const& o, trace_hooks const& hooks)
      : machine_(machine),
        t_(t),
        o_(o),
        hooks_(hooks),
        cache_(empty_cache(t, o)),
        layer_{layer_spec<space>(cache_.view())},
        session_(machine, policy, policy, layer_, bounds(t)),
        q_(copy_on<B>(t.tokens.q, size(t.tokens))),
        ids_(uz(t.tokens.shape.n_seq)) {
    std::iota(ids_.begin(), ids_.end(), 0);
    for (index_t const id : ids_) session_.begin(id);
  }

  trace_log run() {
    prompt();
    if (o_.after_prompt) note();
    for (index_t s = 0; s < t_.steps; ++s) step(t_.prompt + s);
    return std::move(log_);
  }

 private:
  static std::size_t size(prompt_data const& p) {
    return product(p.shape.n_seq, p.shape.n_q_heads, p.tokens, p.shape.dim_k);
  }
  static cache_on<B> empty_cache(trace_data const& t, trace_options const& o) {
    cache_shape s = t.tokens.shape;
    s.max_slots = std::max(o.slots, t.prompt + 1);
    return cache_on<B>(s, o.layout);
  }
  static limits bounds(trace_data const& t) {
    limits lim;
    lim.max_sequences = t.tokens.shape.n_seq;
    bool const queries = t.tokens.q != nullptr;
    lim.prompt = queries ? prompt_offer::all_queries : prompt_offer::nothing;
    lim.decode = queries ? decode_offer::attend : decode_offer::nothing;
    return lim;
  }

  void write(index_t b, index_t h, index_t slot, index_t position) {
    prompt_data const& p = t_.tokens;
    offset_t const row = (offset_t{b} * p.shape.n_kv_heads + h) * p.tokens + position;
    if (p.k == nullptr) return;
    cache_.write(b, h, slot, p.k + row * p.shape.dim_k,
                 p.v == nullptr ? nullptr : p.v + row * p.shape.dim_v);
  }

  /// Queries of `n` tokens from `first` on, of all sequences.
  queries rows(index_t first, index_t n) const {
    prompt_data const& p = t_.tokens;
    if (p.q == nullptr) return tokens_only(n);
    queries q = make_queries(q_.data() + offset_t{first} * p.shape.dim_k, p.shape.n_q_heads,
                             p.tokens, p.shape.dim_k);
    q.n_rows = n;
    return q;
  }

  void prompt() {
    for (index_t const b : ids_) {
      for (index_t h = 0; h < t_.tokens.shape.n_kv_heads; ++h)
        for (index_t i = 0; i < t_.prompt; ++i) write(b, h, i, i);
      queries q = rows(0, t_.prompt);
      if (q.data != nullptr) q.data = static_cast<float const*>(q.data) + b * q.entry_stride;
      session_.observe(0, b, q);
      session_.end_prompt(b);
      machine_.wait();
    }
  }

  void step(index_t position) {
    cache_shape const& s = t_.tokens.shape;
    array_on<B, index_t> slots(ids_.size() * uz(s.n_kv_heads));
    session_.append(ids_, slots.data());
    machine_.wait();
    for (index_t const b : ids_)
      for (index_t h = 0; h < s.n_kv_heads; ++h)
        write(b, h, slots[uz(b) * uz(s.n_kv_heads) + uz(h)], position);
    if (o_.when == moment::appended) note();
    array_on<B, float> out(ids_.size() * uz(s.n_q_heads) * uz(s.dim_v));
    session_.attend(ids_, rows(position, 1), out.data());
    machine_.wait();
    if (t_.tokens.q != nullptr) log_.attention.insert(log_.attention.end(), out.begin(), out.end());
    if (o_.when == moment::settled) note();
    session_.verify();
  }

  /// Writes down the live slots of all heads: those in use, without the one that is free for reuse.
  void note() {
    auto const length = session_.lengths(0), free = session_.free_slots(0);
    auto const position = session_.positions(0);
    for (index_t const b : ids_)
      for (index_t h = 0; h < t_.tokens.shape.n_kv_heads; ++h) {
        std::vector<index_t> slots;
        for (index_t i = 0; i < length(b, h); ++i)
          if (i != free(b, h)) slots.push_back(i);
        std::sort(slots.begin(), slots.end(),
                  [&](index_t x, index_t y) { return position(b, h, x) < position(b, h, y); });
        if (hooks_.noted) hooks_.noted(b, h, slots);
        for (index_t& i : slots) i = position(b, h, i);
        log_.kept.push_back(std::move(slots));
      }
  }

  B& machine_;
  trace_data const& t_;
  trace_options const& o_;
  trace_hooks const& hooks_;
  cache_on<B> cache_;
  std::vector<layer_spec<space>> layer_;
  typename B::session session_;
  array_on<B, float> q_;
  array_on<B, index_t> ids_;
  trace_log log_;
};

/// All of a backend, from its machine.
template <class B>
class backend_on final : public backend {
 public:
  char const* name() const override { return backend_traits<typename B::context>::name; }
  prompt_demand demand_of(chosen const& p, cache_shape const& s) const override {
    auto const policy = make_policy<typename B::context>(p.name, p.options);
    return {policy.score.traits().prompt, policy.score.state(s).query_ring};
  }
  int_rows keep_of_prompt(chosen const& p, prompt_data const& d, layout_kind layout,
                          index_t n_layers, index_t layer) override {
    return keep_on(machine_, p, d, layout, n_layers, layer);
  }
  std::vector<float> scores_of_prompt(chosen const& p, prompt_data const& d,
                                      layout_kind layout) override {
    return scores_on(machine_, p, d, layout);
  }
  trace_log trace(chosen const& p, trace_data const& t, trace_options const& o,
                  trace_hooks const& hooks) override {
    auto const policy = make_policy<typename B::context>(p.name, p.options);
    return tracer<B>(machine_, watch_on(machine_, policy, hooks), t, o, hooks).run();
  }
  std::vector<index_t> counts(joint_scores const& s) override { return counts_on(machine_, s); }
  int_rows budgets(dynamic_layers const& b, index_t window, joint_scores const& s) override {
    return dynamic_on(machine_, b, window, s);
  }
  std::vector<index_t> budgets(pyramid const& b, index_t n_layers, index_t window,
                               index_t tokens) override {
    return pyramid_on(machine_, b, n_layers, window, tokens);
  }
  int_rows parts(splits const& s) override { return parts_on(machine_, s); }
  int_rows select(float const* scores, index_t const* k, index_t rows, index_t n) override {
    return select_on(machine_, scores, k, rows, n);
  }

 private:
  B machine_;
};

}  // namespace kvkeep::replay
