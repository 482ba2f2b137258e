// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "trace.hpp"

#include <numeric>

namespace kvkeep::replay {

namespace {

using session_type = session<cpu::context, policy_type, policy_type>;

/// One run: the session, its cache, and the log.
class tracer {
 public:
  tracer(policy_type const& policy, trace_data const& t, trace_options const& o,
         slot_observer const& see)
      : t_(t), o_(o), see_(see), cache_(empty_cache(t, o)), layer_{layer_spec<>(cache_.view())},
        session_(bind_session(ctx_, policy, std::span<layer_spec<> const>(layer_), bounds(t))) {
    ids_.resize(uz(t.tokens.shape.n_seq));
    std::iota(ids_.begin(), ids_.end(), 0);
    for (index_t const id : ids_) {
      index_t got = -1;
      expect(session_.begin(got, {id}), "begin");
    }
  }

  trace_log run() {
    prompt();
    if (o_.after_prompt) note();
    for (index_t s = 0; s < t_.steps; ++s) step(t_.prompt + s);
    return std::move(log_);
  }

 private:
  static tools::kv_cache empty_cache(trace_data const& t, trace_options const& o) {
    cache_shape s = t.tokens.shape;
    s.max_slots = std::max(o.slots, t.prompt + 1);
    return tools::kv_cache(s, o.layout);
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
    queries q = make_queries(p.q + offset_t{first} * p.shape.dim_k, p.shape.n_q_heads, p.tokens,
                             p.shape.dim_k);
    q.n_rows = n;
    return q;
  }

  void prompt() {
    for (index_t const b : ids_) {
      for (index_t h = 0; h < t_.tokens.shape.n_kv_heads; ++h)
        for (index_t i = 0; i < t_.prompt; ++i) write(b, h, i, i);
      queries q = rows(0, t_.prompt);
      if (q.data != nullptr) q.data = static_cast<float const*>(q.data) + b * q.entry_stride;
      expect(session_.observe(0, b, q), "observe");
      expect(session_.end_prompt(b), "end_prompt");
    }
  }

  void step(index_t position) {
    cache_shape const& s = t_.tokens.shape;
    batch const all{ids_};
    std::vector<index_t> slots(ids_.size() * uz(s.n_kv_heads));
    expect(session_.append(0, all, slots.data()), "append");
    for (index_t const b : ids_)
      for (index_t h = 0; h < s.n_kv_heads; ++h)
        write(b, h, slots[uz(b) * uz(s.n_kv_heads) + uz(h)], position);
    if (o_.when == moment::appended) note();
    if (t_.tokens.q != nullptr) {
      std::size_t const at = log_.attention.size();
      log_.attention.resize(at + ids_.size() * uz(s.n_q_heads) * uz(s.dim_v));
      expect(session_.attend(0, all, rows(position, 1), log_.attention.data() + at), "attend");
    }
    expect(session_.confirm(all, 1), "confirm");
    if (o_.when == moment::settled) note();
    expect(session_.verify(), "verify");
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
        if (see_) see_(b, h, slots);
        for (index_t& i : slots) i = position(b, h, i);
        log_.kept.push_back(std::move(slots));
      }
  }

  trace_data const& t_;
  trace_options const& o_;
  slot_observer const& see_;
  cpu::context ctx_;
  tools::kv_cache cache_;
  std::vector<layer_spec<>> layer_;
  session_type session_;
  std::vector<index_t> ids_;
  trace_log log_;
};

}  // namespace

trace_log run_trace(policy_type const& policy, trace_data const& t, trace_options const& o,
                    slot_observer const& see) {
  return tracer(policy, t, o, see).run();
}

}  // namespace kvkeep::replay
